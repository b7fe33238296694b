//! The primitives of a configuration, one function each.

use std::collections::{BTreeMap, HashMap};

use super::context::Elaborator;
use crate::diagnostic::{Code, Diagnostic};
use crate::model::{Around, Content, Owner, Primitive, Run, Script, ServiceState, Step, User, When};
use crate::resolve::At;
use crate::source::{FileKind, Span};
use crate::syntax::Scalar;
use crate::template::Scope;
use crate::value;

/// Default time limit of a script, in seconds.
const RUN_TIMEOUT: u64 = 30 * 60;

impl Elaborator<'_> {
    /// All steps of a configuration, in order. Its packages are joined at the place of
    /// the first `package`; a step that may change the package sources starts a new
    /// group of packages.
    pub(super) fn steps(&mut self, at: At, scope: &Scope) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        let mut packages: Option<usize> = None;
        let mut places: HashMap<String, Span> = HashMap::new();
        for node in at.children() {
            if let "on" | "operation" = node.node.name.as_str() {
                self.hooks(node, scope, &mut steps);
            }
            let Some(primitive) = self.primitive(node, scope) else { continue };
            if let Some(resource) = primitive.resource()
                && let Some(first) = places.insert(resource.clone(), node.head())
            {
                self.out.push(
                    Diagnostic::error(Code::Conflict, node.head(), format!("{resource} is declared twice"))
                        .related(first, "the other one")
                        .help("declare each resource once in a configuration"),
                );
            }
            match (primitive, packages) {
                (Primitive::Package { names: more }, Some(index)) => {
                    if let Primitive::Package { names } = &mut steps[index].primitive {
                        names.extend(more);
                        names.sort();
                        names.dedup();
                    }
                }
                (primitive, _) => {
                    if matches!(primitive, Primitive::Package { .. }) {
                        packages = Some(steps.len());
                    } else if primitive.may_change_sources() {
                        packages = None;
                    }
                    steps.push(Step { primitive, span: node.head() });
                }
            }
        }
        steps
    }

    fn primitive(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        match at.node.name.as_str() {
            "package" => self.package(at, scope),
            "file" => self.file(at, scope),
            "directory" => self.directory(at, scope),
            "symlink" => Some(Primitive::Symlink {
                path: self.guest_path(at.node.args.first()?, at, scope)?,
                target: self.prop_text(at, "target", scope)?,
            }),
            "archive" => self.archive(at, scope),
            "group" => Some(Primitive::Group {
                name: self.account(at, scope)?,
                gid: self.prop_id(at, "gid", scope),
                system: self.prop_bool(at, "system", scope).unwrap_or(false),
            }),
            "user" => self.user(at, scope),
            "service" => self.service(at, scope),
            "sysctl" => self.sysctl(at, scope),
            "kernel-module" => self.kernel_module(at, scope),
            "reboot" => Some(Primitive::Reboot),
            "run" => self.run(at, scope),
            _ => None,
        }
    }

    fn package(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let mut names = Vec::new();
        for arg in &at.node.args {
            names.push(self.parsed(arg, at, scope, package_name)?);
        }
        names.sort();
        names.dedup();
        Some(Primitive::Package { names })
    }

    fn file(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let path = self.guest_path(at.node.args.first()?, at, scope);
        let sources: Vec<&str> =
            ["content", "template", "from"].into_iter().filter(|p| at.node.prop(p).is_some()).collect();
        let content = match sources.as_slice() {
            ["content"] => self.prop_text(at, "content", scope).map(Content::Text),
            ["template"] => self.rendered(at.node.prop("template")?, at, scope),
            [_] => self.host_path(at.node.prop("from")?, at, scope, FileKind::File).map(Content::File),
            [] => {
                self.out.push(
                    Diagnostic::error(Code::Missing, at.head(), "this file has no content")
                        .help("add one of `content=`, `template=` and `from=`"),
                );
                None
            }
            [first, second, ..] => {
                let message = format!("`{first}` and `{second}` can't be combined");
                self.out.push(Diagnostic::error(Code::Conflict, at.head(), message).help("keep one of them"));
                None
            }
        };
        let mode = self.mode(at, scope);
        let owner = self.owner(at, scope);
        Some(Primitive::File { path: path?, content: content?, mode, owner })
    }

    fn directory(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let path = self.guest_path(at.node.args.first()?, at, scope)?;
        let tree = match at.node.prop("from") {
            Some(arg) => Some(self.host_path(arg, at, scope, FileKind::Directory)?),
            None => None,
        };
        Some(Primitive::Directory { path, tree, mode: self.mode(at, scope), owner: self.owner(at, scope) })
    }

    fn archive(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let path = self.guest_path(at.node.args.first()?, at, scope)?;
        let content = Content::File(self.host_path(at.node.prop("from")?, at, scope, FileKind::File)?);
        let strip = match at.node.prop("strip") {
            Some(arg) => self.ranged(arg, at, scope, 0, 64)? as u32,
            None => 0,
        };
        Some(Primitive::Archive { path, content, strip, owner: self.owner(at, scope) })
    }

    fn user(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let name = self.account(at, scope)?;
        let groups = self.prop_text(at, "groups", scope).unwrap_or_default();
        let mut path = |name: &str| at.node.prop(name).and_then(|arg| self.guest_path(arg, at, scope));
        let (home, shell) = (path("home"), path("shell"));
        Some(Primitive::User(User {
            name,
            uid: self.prop_id(at, "uid", scope),
            group: self.prop_text(at, "group", scope),
            groups: groups.split(',').map(str::trim).filter(|g| !g.is_empty()).map(str::to_owned).collect(),
            home,
            shell,
            comment: self.prop_text(at, "comment", scope),
            system: self.prop_bool(at, "system", scope).unwrap_or(false),
        }))
    }

    fn service(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let unit = self.parsed(at.node.args.first()?, at, scope, unit_name)?;
        let state = match self.prop_text(at, "state", scope) {
            Some(word) => {
                let state = ServiceState::parse(&word);
                if state.is_none() {
                    let span = at.node.prop("state").map_or_else(|| at.head(), |a| at.span(&a.range));
                    self.out.push(
                        Diagnostic::error(Code::InvalidValue, span, format!("invalid state `{word}`"))
                            .suggest(&word, ServiceState::WORDS.iter().copied()),
                    );
                }
                Some(state?)
            }
            None => None,
        };
        Some(Primitive::Service { unit, enabled: self.prop_bool(at, "enabled", scope), state })
    }

    fn sysctl(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let key = self.parsed(at.node.args.first()?, at, scope, |t| {
            let good = !t.is_empty() && t.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
            let help = "expected words with dots between them, such as `vm.swappiness`";
            if good { Ok(t.to_owned()) } else { Err(help.into()) }
        })?;
        let arg = at.node.prop("value")?;
        let value = match &arg.value {
            Scalar::Int(n) => n.to_string(),
            Scalar::Bool(b) => u8::from(*b).to_string(),
            _ => self.parsed(arg, at, scope, |t| {
                if t.contains('\n') { Err("expected a single line".into()) } else { Ok(t.to_owned()) }
            })?,
        };
        Some(Primitive::Sysctl { key, value })
    }

    fn kernel_module(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let name = self.parsed(at.node.args.first()?, at, scope, |t| {
            let good = !t.is_empty() && t.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
            if good { Ok(t.to_owned()) } else { Err("expected letters, digits, `-` and `_`".into()) }
        })?;
        Some(Primitive::KernelModule { name })
    }

    fn run(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let script = self.script(at, scope)?;
        let undo = match at.child("undo") {
            Some(node) => Some(self.text(node.node.args.first()?, node, scope)?),
            None => None,
        };
        Some(Primitive::Run(Run { script, undo, secrets: self.handed(at) }))
    }

    /// Adds a step for each script of an `on` or `operation`.
    fn hooks(&mut self, at: At, scope: &Scope, steps: &mut Vec<Step>) {
        let when = match at.node.name.as_str() {
            "operation" => Some(When::Operation(at.name().to_owned())),
            _ => When::event(at.name()),
        };
        let Some(when) = when else {
            self.unknown(at, When::WORDS);
            return;
        };
        if at.children().next().is_none() {
            let message = "there is nothing to run";
            self.out.push(
                Diagnostic::error(Code::Missing, at.head(), message)
                    .help("add a `run`: `run \"FILE\"` or `run { script \"...\" }`"),
            );
        }
        for run in at.children_named("run") {
            if let Some(script) = self.script(run, scope) {
                let when = when.clone();
                steps.push(Step { primitive: Primitive::Hook { when, script }, span: run.head() });
            }
        }
    }

    fn script(&mut self, at: At, scope: &Scope) -> Option<Script> {
        let inline = at.child("script");
        let given = usize::from(!at.node.args.is_empty())
            + usize::from(at.node.prop("template").is_some())
            + usize::from(inline.is_some());
        if given != 1 {
            let (code, message) = if given == 0 {
                (Code::Missing, "this `run` has no script")
            } else {
                (Code::Conflict, "this `run` has more than one script")
            };
            self.out.push(
                Diagnostic::error(code, at.head(), message)
                    .help("give exactly one of: a script file, `template=`, a `script \"...\"` child"),
            );
            return None;
        }
        let content = if let Some(inline) = inline {
            Content::Text(self.text(inline.node.args.first()?, inline, scope)?)
        } else if let Some(arg) = at.node.prop("template") {
            self.rendered(arg, at, scope)?
        } else {
            Content::File(self.host_path(at.node.args.first()?, at, scope, FileKind::File)?)
        };
        let mut env = BTreeMap::new();
        for node in at.children_named("env") {
            for prop in &node.node.props {
                let value = match &prop.arg.value {
                    Scalar::String(_) => self.text(&prop.arg, node, scope)?,
                    Scalar::Int(n) => n.to_string(),
                    Scalar::Bool(b) => b.to_string(),
                    Scalar::Float(n) => n.to_string(),
                    Scalar::Null => String::new(),
                };
                if let Err(help) = variable(&prop.name, &value) {
                    let message = format!("invalid environment variable `{}`", prop.name);
                    self.out.push(
                        Diagnostic::error(Code::InvalidValue, node.span(&prop.name_range), message)
                            .help(help),
                    );
                }
                env.insert(prop.name.clone(), value);
            }
        }
        let workdir = match at.node.prop("workdir") {
            Some(arg) => self.guest_path(arg, at, scope)?,
            None => "/".into(),
        };
        let timeout = match at.node.prop("timeout") {
            Some(arg) => self.duration(arg, at, scope)?,
            None => RUN_TIMEOUT,
        };
        let user = self.prop_text(at, "user", scope).unwrap_or_else(|| "root".into());
        let network = self.prop_bool(at, "network", scope).unwrap_or_default();
        Some(Script { content, around: Around { env, user, workdir, timeout, network } })
    }

    fn account(&mut self, at: At, scope: &Scope) -> Option<String> {
        self.parsed(at.node.args.first()?, at, scope, |t| {
            let good = !t.is_empty()
                && t.len() <= 32
                && t.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
                && t.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c));
            let help = "expected 1 to 32 lower-case letters, digits, `-` and `_`, with no digit first";
            if good { Ok(t.to_owned()) } else { Err(help.into()) }
        })
    }

    fn owner(&mut self, at: At, scope: &Scope) -> Owner {
        let mut prop = |name| self.prop_text(at, name, scope).unwrap_or_else(|| "root".into());
        Owner { user: prop("owner"), group: prop("group") }
    }

    fn mode(&mut self, at: At, scope: &Scope) -> Option<u32> {
        self.parsed(at.node.prop("mode")?, at, scope, value::mode)
    }

    fn prop_text(&mut self, at: At, name: &str, scope: &Scope) -> Option<String> {
        self.text(at.node.prop(name)?, at, scope)
    }

    fn prop_bool(&mut self, at: At, name: &str, scope: &Scope) -> Option<bool> {
        self.boolean(at.node.prop(name)?, at, scope)
    }

    fn prop_id(&mut self, at: At, name: &str, scope: &Scope) -> Option<u32> {
        self.ranged(at.node.prop(name)?, at, scope, 0, 4_294_967_294).map(|n| n as u32)
    }
}

/// Checks a package name: `name`, `name:arch`, `name=version` or `name/suite`, and never
/// an option of apt-get.
pub(super) fn package_name(text: &str) -> Result<String, String> {
    // For apt, `-` or `+` after a name means: remove or install this package.
    let ordered = text.ends_with(['-', '+']) && !text.ends_with("++");
    let good = text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.len() <= 200 && !ordered;
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.:=~/_".contains(c));
    if good && plain {
        Ok(text.to_owned())
    } else {
        Err("expected a package name, optionally with `=VERSION`, `/SUITE` or `:ARCH`".into())
    }
}

fn unit_name(text: &str) -> Result<String, String> {
    const SUFFIXES: &[&str] = &[".service", ".socket", ".timer", ".path", ".mount", ".target"];
    let good = text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c));
    if !good {
        return Err("expected a unit name: letters, digits and `:-_.\\@`".into());
    }
    let whole = SUFFIXES.iter().any(|s| text.ends_with(s));
    Ok(if whole { text.to_owned() } else { format!("{text}.service") })
}

fn variable(name: &str, value: &str) -> Result<(), String> {
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !good || value.contains('\0') {
        return Err("expected a variable name: letters, digits and `_`".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_never_options() {
        assert!(package_name("nginx-light").is_ok());
        assert!(package_name("libstdc++6=12.2.0-14~x").is_ok());
        assert!(package_name("g++").is_ok());
        assert!(package_name("-oDPkg::Pre-Invoke::=sh").is_err());
        assert!(package_name("nginx-").is_err());
        assert!(package_name("-oDir::Bin=/x++").is_err());
        assert!(package_name("a,b").is_err());
        assert_eq!(unit_name("nginx"), Ok("nginx.service".into()));
        assert_eq!(unit_name("apt-daily.timer"), Ok("apt-daily.timer".into()));
        assert!(unit_name("--now").is_err());
    }
}
