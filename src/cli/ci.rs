//! The trust domains of a CI run, from the variables that CI systems set.

use crate::digest::Digest;

/// The trust domains of caches without `domain=`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CiDomains {
    pub(super) read: Vec<String>,
    pub(super) write: Option<String>,
    /// Why vimg writes nothing, if `write` is `None`.
    pub(super) why: &'static str,
}

/// The trust domain of builds of the default branch, and of builds outside CI.
const MAIN: &str = "main";
const FORK: &str = "a pull request from a fork writes to no cache";
const EVENT: &str = "this event may run a stranger's code; to write, name a domain with `domain=`";
const UNKNOWN: &str = "this CI is unknown; to write, name a domain with `domain=`";

/// Derives the trust domains from this process's environment.
pub(super) fn ci_domains() -> CiDomains {
    ci_domains_of(&|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
}

/// Derives the trust domains from the variables that CI systems set. A pull
/// request reads `main` and its own domain and writes its own; one from a fork
/// writes nothing.
fn ci_domains_of(var: &dyn Fn(&str) -> Option<String>) -> CiDomains {
    let of = |domain: String, fork: bool| CiDomains {
        read: if domain == MAIN { vec![MAIN.into()] } else { vec![domain.clone(), MAIN.into()] },
        write: (!fork).then_some(domain),
        why: FORK,
    };
    let branch = |name: &str| {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let short: String = name.chars().map(plain).take(31).collect();
        if short == name {
            return format!("branch-{short}");
        }
        // A domain with a hash is longer than any without, so no two branches
        // share one.
        let short: String = short.chars().take(8).collect();
        format!("branch-{short}-{}", &Digest::of(name.as_bytes()).to_string()[..32])
    };
    if var("GITHUB_ACTIONS").is_some() {
        let event = var("GITHUB_EVENT_PATH").and_then(|path| std::fs::read(path).ok());
        let event: serde_json::Value =
            event.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        let event_name = var("GITHUB_EVENT_NAME").unwrap_or_default();
        if event_name.starts_with("pull_request") {
            let number = event["pull_request"]["number"].as_u64().or_else(|| event["number"].as_u64());
            let from = event["pull_request"]["head"]["repo"]["full_name"].as_str().map(str::to_owned);
            // An event without a source repository counts as one from a fork.
            let fork = from.is_none() || from != var("GITHUB_REPOSITORY");
            return of(format!("pr-{}", number.unwrap_or_default()), fork);
        }
        let name = var("GITHUB_REF_NAME").unwrap_or_default();
        let default = event["repository"]["default_branch"].as_str().unwrap_or(MAIN);
        let is_branch = var("GITHUB_REF_TYPE").is_none_or(|kind| kind == "branch");
        // Other events, such as a comment, may run with the rights of the main
        // branch on data from strangers.
        if !matches!(
            event_name.as_str(),
            "push" | "schedule" | "workflow_dispatch" | "release" | "merge_group"
        ) {
            return CiDomains { read: vec![MAIN.into()], write: None, why: EVENT };
        }
        return of(if is_branch && name == default { MAIN.into() } else { branch(&name) }, false);
    }
    if var("GITLAB_CI").is_some() {
        if let Some(number) = var("CI_MERGE_REQUEST_IID") {
            let fork = var("CI_MERGE_REQUEST_SOURCE_PROJECT_ID") != var("CI_MERGE_REQUEST_PROJECT_ID");
            return of(format!("pr-{number}"), fork);
        }
        let name = var("CI_COMMIT_REF_NAME").unwrap_or_default();
        let is_main =
            var("CI_DEFAULT_BRANCH").is_some_and(|default| default == name) && var("CI_COMMIT_TAG").is_none();
        return of(if is_main { MAIN.into() } else { branch(&name) }, false);
    }
    if var("CI").is_some() {
        return CiDomains { read: vec![MAIN.into()], write: None, why: UNKNOWN };
    }
    of(MAIN.into(), false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::spec::is_name;

    fn ci_domains(vars: &[(&str, &str)]) -> (String, Option<String>) {
        let found = ci_domains_of(&|name| {
            vars.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        });
        (found.read.join(";"), found.write)
    }

    #[test]
    fn a_pull_request_writes_its_own_and_a_forks_none() {
        let event = tempfile::NamedTempFile::new().unwrap();
        let path = event.path().to_str().unwrap().to_owned();
        let write = |text: &str| std::fs::write(event.path(), text).unwrap();
        let github = |name: &str, rest: &[(&str, &str)]| {
            let mut vars = vec![
                ("GITHUB_ACTIONS", "true"),
                ("GITHUB_EVENT_NAME", name),
                ("GITHUB_EVENT_PATH", path.as_str()),
                ("GITHUB_REPOSITORY", "we/web"),
            ];
            vars.extend(rest);
            ci_domains(&vars)
        };
        write(r#"{"pull_request":{"number":7,"head":{"repo":{"full_name":"we/web"}}}}"#);
        assert_eq!(github("pull_request", &[]), ("pr-7;main".into(), Some("pr-7".into())));
        write(r#"{"pull_request":{"number":7,"head":{"repo":{"full_name":"they/web"}}}}"#);
        assert_eq!(github("pull_request_target", &[]), ("pr-7;main".into(), None));
        write("what?");
        assert_eq!(github("pull_request", &[]), ("pr-0;main".into(), None));
        write(r#"{"repository":{"default_branch":"trunk"}}"#);
        assert_eq!(github("push", &[("GITHUB_REF_NAME", "trunk")]), ("main".into(), Some("main".into())));
        let other = github("push", &[("GITHUB_REF_NAME", "a/b")]);
        let name = other.1.clone().unwrap();
        assert!(name.starts_with("branch-a-b-") && is_name(&name), "{name}");
        assert_eq!(other.0, format!("{name};main"));
        // No name that needs no hash has the same domain.
        for plain in ["a-b", name.strip_prefix("branch-").unwrap(), &name] {
            assert_ne!(name, github("push", &[("GITHUB_REF_NAME", plain)]).1.unwrap());
        }
        let long = github("push", &[("GITHUB_REF_NAME", &"x/".repeat(60))]).1.unwrap();
        assert!(is_name(&long), "{long}");
        let tag = github("push", &[("GITHUB_REF_NAME", "trunk"), ("GITHUB_REF_TYPE", "tag")]);
        assert_eq!(tag.1.unwrap(), "branch-trunk");
        assert_eq!(github("issue_comment", &[("GITHUB_REF_NAME", "trunk")]).1, None);
    }

    #[test]
    fn other_ci_systems_are_told_apart() {
        let gitlab = |rest: &[(&str, &str)]| {
            ci_domains(&[&[("GITLAB_CI", "true"), ("CI_DEFAULT_BRANCH", "main")], rest].concat())
        };
        let ids = |source| {
            [
                ("CI_MERGE_REQUEST_IID", "3"),
                ("CI_MERGE_REQUEST_PROJECT_ID", "1"),
                ("CI_MERGE_REQUEST_SOURCE_PROJECT_ID", source),
            ]
        };
        assert_eq!(gitlab(&ids("1")).1, Some("pr-3".into()));
        assert_eq!(gitlab(&ids("2")).1, None);
        assert_eq!(gitlab(&[("CI_COMMIT_REF_NAME", "main")]).1, Some("main".into()));
        let tag = [("CI_COMMIT_REF_NAME", "main"), ("CI_COMMIT_TAG", "main")];
        assert_eq!(gitlab(&tag).1, Some("branch-main".into()));
        assert_eq!(ci_domains(&[]), ("main".into(), Some("main".into())));
        assert_eq!(ci_domains(&[("CI", "true")]), ("main".into(), None));
    }
}
