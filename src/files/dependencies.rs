//! The dependency record: what a build saw of a project. The next build uses it
//! to decide whether it would see the same, without reading, parsing or hashing
//! anything.
//!
//! It contains every access to the project: files that were read or hashed,
//! names that did not exist, directories that were listed. A new or removed
//! name changes the times of its directory, so a listing need not be repeated.

use serde::{Deserialize, Serialize};

use vimg_lang::ReadError;

use super::dependency::Dependency;
use super::error::read_error;
use super::project::Project;
use super::stamps::{self, SETTLED};

/// All that a build saw of a project.
#[derive(Debug, Serialize, Deserialize)]
pub struct DependencyRecord {
    dependencies: Vec<Dependency>,
}

impl DependencyRecord {
    /// Whether a build would see the same again.
    pub fn holds(&self, project: &Project) -> bool {
        let mut seen = project.seen();
        self.dependencies.iter().all(|look| match project.look(&mut seen, &look.path, look.follow) {
            Ok(stat) => look.stamp == Some(stamps::stamp(&stat)),
            Err(e) => look.stamp.is_none() && matches!(read_error(&e), ReadError::NotFound),
        })
    }
}

impl Project {
    /// Returns what this process has seen of the project. `None` if a part
    /// changed so recently that another change might not show, or could not be
    /// examined.
    pub fn dependency_record(&self) -> Option<DependencyRecord> {
        let mut seen = self.seen();
        let dependencies = std::mem::take(&mut seen.dependencies);
        let old = |look: &Dependency| {
            look.stamp
                .is_none_or(|[.., mtime, _, ctime, _]| (mtime.max(ctime) as i64) + SETTLED < self.opened)
        };
        (!seen.unsure && dependencies.iter().all(old)).then_some(DependencyRecord { dependencies })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;
    use vimg_lang::{FileRef, Files};

    /// Reads a project as if its files were old enough.
    fn see(dir: &Path) -> DependencyRecord {
        let project = Project::open(dir).unwrap().later(1000);
        let _ = project.read(&FileRef::project("main"), 100);
        let _ = project.kind(&FileRef::project("absent"));
        let _ = project.hash(&FileRef::project("link"));
        project.tree(&FileRef::project("tree")).unwrap();
        project.dependency_record().unwrap()
    }

    #[test]
    fn whatever_was_seen_and_changes_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("tree/sub")).unwrap();
        for name in ["main", "target", "other", "tree/a", "tree/sub/b", "unread"] {
            fs::write(at(name), name).unwrap();
        }
        std::os::unix::fs::symlink("target", at("link")).unwrap();
        std::os::unix::fs::symlink("a", at("tree/link")).unwrap();
        let holds = |dependency_record: &DependencyRecord| {
            dependency_record.holds(&Project::open(dir.path()).unwrap())
        };
        assert!(
            Project::open(dir.path()).unwrap().dependency_record().is_some(),
            "nothing seen, nothing young"
        );
        let project = Project::open(dir.path()).unwrap();
        let _ = project.read(&FileRef::project("main"), 100);
        assert!(project.dependency_record().is_none(), "what was written just now may change unseen");

        let pause = || std::thread::sleep(std::time::Duration::from_millis(20));
        let edits: [(&str, &dyn Fn()); 11] = [
            ("content", &|| fs::write(at("main"), "niam").unwrap()),
            ("appeared", &|| fs::write(at("absent"), "").unwrap()),
            ("gone again", &|| fs::remove_file(at("absent")).unwrap()),
            ("behind a link", &|| fs::write(at("target"), "tegrat").unwrap()),
            ("link", &|| {
                fs::remove_file(at("link")).unwrap();
                std::os::unix::fs::symlink("other", at("link")).unwrap();
            }),
            ("in a tree", &|| fs::write(at("tree/sub/b"), "B").unwrap()),
            ("new in a tree", &|| fs::write(at("tree/sub/c"), "").unwrap()),
            ("renamed in a tree", &|| fs::rename(at("tree/sub/c"), at("tree/sub/d")).unwrap()),
            ("mode", &|| {
                use std::os::unix::fs::PermissionsExt;
                fs::set_permissions(at("tree/a"), fs::Permissions::from_mode(0o600)).unwrap();
            }),
            ("link in a tree", &|| {
                fs::remove_file(at("tree/link")).unwrap();
                std::os::unix::fs::symlink("b", at("tree/link")).unwrap();
            }),
            ("directory", &|| {
                fs::rename(at("tree"), at("was")).unwrap();
                fs::create_dir(at("tree")).unwrap();
            }),
        ];
        for (what, edit) in edits {
            let dependency_record = see(dir.path());
            assert!(holds(&dependency_record), "before {what}");
            fs::write(at("unread"), what).unwrap();
            assert!(holds(&dependency_record), "what was not read does not count");
            pause();
            edit();
            assert!(!holds(&dependency_record), "{what}");
        }
    }
}
