//! Scripts: the nodes that describe one, and the hooks and operations that run later.

use std::collections::BTreeMap;

use super::context::Elaborator;
use crate::diagnostic::{Code, Diagnostic};
use crate::kind::{Args, Field, Kind, Ty, kind, opt, req};
use crate::model::{Around, Content, Primitive, Script, Step, When};
use crate::resolve::At;
use crate::source::FileKind;
use crate::syntax::Scalar;
use crate::template::Scope;

/// Default time limit of a script, in seconds.
const RUN_TIMEOUT: u64 = 30 * 60;

pub(crate) const NEEDS: Kind = kind(
    "needs",
    "The state of the machine in which vimg applies the configuration. By default, vimg applies it offline, to the disk of a machine that is switched off: it enables services without starting them, and writes kernel settings for the next boot. `booted` applies the whole configuration in the booted machine, for steps that need running services or the machine's own kernel.",
    Args::One(req("what", Ty::Word(&["booted"]), "`booted`")),
)
.once();

pub(super) const SCRIPT_FILE: Args = Args::One(opt("file", Ty::HostPath, "a script file of the project"));
pub(super) const TEMPLATE: Field =
    opt("template", Ty::HostPath, "a template file of the project; the rendered text is the script");
pub(super) const RUN_AS: Field = opt("user", Ty::Str, "user that runs the script [default: `root`]");
pub(super) const WORKDIR: Field = opt("workdir", Ty::GuestPath, "working directory [default: `/`]");
pub(super) const TIMEOUT: Field = opt("timeout", Ty::Duration, "time limit [default: `30m`]");
pub(crate) const NETWORK: Field = opt(
    "network",
    Ty::Bool,
    "allow network access [default: `#false`]; private networks also need the user's permission",
);
pub(super) const INLINE: Kind =
    kind("script", "The text of the script.", Args::One(req("text", Ty::Str, "shell commands"))).once();
pub(super) const ENV: Kind =
    kind("env", "Environment variables of the script, as properties.", Args::None).open();

const LATER: Kind = kind(
    "run",
    "A script, with the same environment as any other `run`. Several scripts run in order, up to the first that fails.",
    SCRIPT_FILE,
)
.props(&[TEMPLATE, RUN_AS, WORKDIR, TIMEOUT])
.of(&[INLINE, ENV]);

pub(crate) const ON: Kind = kind(
    "on",
    "Scripts that run in the finished machine, once its services are up. `first-boot` scripts run on the first start of a server, or on the boots of a written disk until they have succeeded once. `each-boot` scripts run on each boot. `decommission` scripts run when a server is removed. None of them runs while vimg builds or checks an image.",
    Args::One(req("when", Ty::Word(When::WORDS), "the event")),
)
.of(&[LATER]);

pub(crate) const OPERATION: Kind = kind(
    "operation",
    "Scripts that run on request: `vimg exec SERVER --operation NAME`. If several configurations have an operation with the same name, the scripts of all of them run, in the order of the layers.",
    Args::One(req("name", Ty::Name, "the name of the operation")),
)
.of(&[LATER]);

impl Elaborator<'_> {
    /// Adds a step for each script of an `on` or `operation`.
    pub(super) fn hooks(&mut self, at: At, scope: &Scope, steps: &mut Vec<Step>) {
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

    pub(super) fn script(&mut self, at: At, scope: &Scope) -> Option<Script> {
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
}

fn variable(name: &str, value: &str) -> Result<(), String> {
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !good || value.contains('\0') {
        return Err("expected a variable name: letters, digits and `_`".into());
    }
    Ok(())
}
