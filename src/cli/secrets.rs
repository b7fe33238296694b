//! Reads the secrets of a recipe from where the user allows.

use std::io::Read;
use std::sync::Arc;

use vimg_lang::Model;
use vimg_lang::model::{Secret, SecretSource};

use super::consent::{self, Consent};
use crate::execute::Secrets;
use crate::files::Project;

/// Size limit of a secret, in bytes.
const MAX_SECRET: u64 = 1 << 20;

/// Reads the values of the recipe's secrets: from the source that the user names,
/// or from the recipe's source if the user allowed that.
pub(super) fn read_all(model: &Model, project: &Project, consent: &Consent) -> Secrets {
    let read = |secret: &Secret| -> Result<Arc<[u8]>, String> {
        let given = consent.given.iter().rev().find(|(name, _)| *name == secret.name);
        let (source, own) = match given {
            Some((_, source)) => (source, false),
            None => match consent.refuses(secret) {
                Some(why) => return Err(why),
                None => (&secret.source, true),
            },
        };
        match source {
            SecretSource::Env(name) => std::env::var_os(name)
                .map(|value| Arc::from(value.as_encoded_bytes()))
                .ok_or_else(|| format!("the variable {name} is not set")),
            SecretSource::File(path) => {
                let fail = |why: String| format!("{path}: {why}");
                // Files of the project are opened beneath its root, without
                // following links out of it.
                let opened = match own && consent::is_inside(path) {
                    true => project.open_file(path),
                    false => std::fs::File::open(if own { project.root().join(path) } else { path.into() }),
                };
                let file = opened.map_err(|e| fail(e.to_string()))?;
                let meta = file.metadata().map_err(|e| fail(e.to_string()))?;
                if !meta.is_file() || meta.len() > MAX_SECRET {
                    return Err(fail("expected a file of at most 1 MiB".into()));
                }
                let mut bytes = Vec::new();
                file.take(MAX_SECRET).read_to_end(&mut bytes).map_err(|e| fail(e.to_string()))?;
                Ok(Arc::from(bytes))
            }
        }
    };
    model.secrets.iter().map(|secret| (secret.name.clone(), read(secret))).collect()
}

#[cfg(test)]
mod tests {
    use vimg_lang::{FileRef, Request, Sources, compile};

    use super::*;

    #[test]
    fn secrets_are_read_only_from_where_the_user_says() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "main.vimg",
            "secret \"own\" file=\"own\"\nsecret \"far\" file=\"../far\"\nsecret \"k\" env=\"PATH\"\n",
        );
        write("own", "of the project");
        let outside = tempfile::tempdir().unwrap();
        let far = outside.path().join("far");
        std::fs::write(&far, "of the user").unwrap();
        let project = Project::open(dir.path()).unwrap();
        let mut sources = Sources::default();
        let entry = FileRef::project("main.vimg");
        let request =
            Request { files: &project, entry, set: &[], values: None, rebuilt: None, distributions: &[] };
        let model = compile(&request, &mut sources).unwrap();
        let read = |consent: &Consent, name: &str| read_all(&model, &project, consent)[name].clone();

        let none = Consent::for_tests(project.root(), &[], Vec::new());
        assert_eq!(&*read(&none, "own").unwrap(), b"of the project");
        assert!(read(&none, "far").unwrap_err().contains("far is not allowed; see `vimg trust`"));
        assert!(read(&none, "k").unwrap_err().contains("the variable PATH"));
        let given = vec![
            ("k".to_owned(), SecretSource::Env("HOME".into())),
            ("far".to_owned(), SecretSource::File(far.to_str().unwrap().to_owned())),
        ];
        let given = Consent::for_tests(project.root(), &[], given);
        assert_eq!(&*read(&given, "far").unwrap(), b"of the user");
        assert_eq!(&*read(&given, "k").unwrap(), std::env::var("HOME").unwrap().as_bytes());
        let allowed =
            Consent::for_tests(project.root(), &["the variable PATH as the secret `k`"], Vec::new());
        assert_eq!(&*read(&allowed, "k").unwrap(), std::env::var("PATH").unwrap().as_bytes());
        assert!(read(&allowed, "far").is_err());
    }
}
