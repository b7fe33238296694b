//! Secrets: declared in the recipe, and used by scripts.

use std::collections::BTreeMap;

use super::context::{Elaborator, Vars};
use crate::diagnostic::{Code, Diagnostic};
use crate::model::{Secret, SecretSource, SecretUse};
use crate::resolve::{At, Declarations};
use crate::syntax::Scalar;
use crate::template::Scope;

/// Checks the name of an environment variable that a secret may read. Variables of vimg
/// and of GitHub Actions are not allowed: they contain credentials of the job.
fn variable(text: &str) -> Result<String, String> {
    let named = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !named {
        return Err("expected a variable name: letters, digits and `_`".into());
    }
    if text.starts_with("VIMG_") || text.starts_with("ACTIONS_") {
        return Err(
            "expected a variable of your own: variables of vimg and of the CI system can't be secrets".into(),
        );
    }
    Ok(text.to_owned())
}

impl Elaborator<'_> {
    /// Reads all secrets of the recipe, and stores their versions.
    pub(super) fn all_secrets(&mut self, declarations: &Declarations, params: &Vars) -> Vec<Secret> {
        let scope = Scope::new(params.clone());
        let secrets: Vec<Secret> =
            declarations.secrets.iter().filter_map(|at| self.secret(*at, &scope)).collect();
        self.secrets = secrets.iter().map(|s| (s.name.clone(), s.version.clone())).collect();
        secrets
    }

    fn secret(&mut self, at: At, scope: &Scope) -> Option<Secret> {
        let name = at.name().to_owned();
        let source = match (at.node.prop("env"), at.node.prop("file")) {
            (Some(env), None) => SecretSource::Env(self.parsed(env, at, scope, variable)?),
            (None, Some(file)) => SecretSource::File(self.text(file, at, scope)?),
            (given, _) => {
                let (code, message) = match given {
                    None => (Code::Missing, format!("the secret `{name}` has no source")),
                    Some(_) => (Code::Conflict, format!("the secret `{name}` has two sources")),
                };
                let help = "give exactly one of `env=` and `file=`";
                self.out.push(Diagnostic::error(code, at.head(), message).help(help));
                return None;
            }
        };
        let version = match at.node.prop("version").map(|arg| (arg, &arg.value)) {
            Some((arg, Scalar::String(_))) => self.text(arg, at, scope)?,
            Some((_, Scalar::Int(n))) => n.to_string(),
            Some((_, Scalar::Bool(b))) => b.to_string(),
            Some((_, Scalar::Float(n))) => n.to_string(),
            Some((_, Scalar::Null)) | None => String::new(),
        };
        let cache = match at.node.prop("cache") {
            Some(arg) => self.boolean(arg, at, scope)?,
            None => false,
        };
        Some(Secret { name, source, version, cache })
    }

    /// The secrets of a script, sorted by name; reports unknown ones.
    pub(super) fn handed(&mut self, run: At) -> Vec<SecretUse> {
        let mut handed = BTreeMap::new();
        for at in run.children_named("secret") {
            match self.secrets.get(at.name()) {
                Some(version) => {
                    handed.insert(at.name().to_owned(), version.clone());
                }
                None => self.out.push(
                    Diagnostic::error(
                        Code::UnknownSecret,
                        at.arg_span(),
                        format!("there is no secret `{}`", at.name()),
                    )
                    .suggest(at.name(), self.secrets.keys().map(String::as_str))
                    .help_if_none("declare it with `secret`"),
                ),
            }
        }
        handed.into_iter().map(|(name, version)| SecretUse { name, version }).collect()
    }
}
