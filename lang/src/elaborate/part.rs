//! Parts: one application of a configuration, and the capabilities that it provides.

use std::rc::Rc;
use std::sync::Arc;

use super::context::{Elaborator, Vars};
use super::effect::{Applied, Provider, Use};
use super::growing::{Below, Inherited};
use crate::diagnostic::{Code, Diagnostic};
use crate::model::{Check, Part};
use crate::resolve::{At, Capability, Configuration};
use crate::source::Span;
use crate::template::Scope;

impl Elaborator<'_> {
    /// Applies a configuration, and adds the part to what is inherited.
    pub(super) fn part<'d>(
        &mut self,
        wanted: &Use<'d>,
        inherited: &mut Inherited<'d>,
        below: &Below<'_, 'd>,
    ) -> Arc<Part> {
        let Use { at, configuration, .. } = *wanted;
        let name = configuration.at.name();
        let times = inherited.times.entry(name).or_default();
        *times += 1;
        let times = *times;
        let id = if times == 1 { name.to_owned() } else { format!("{name}#{times}") };
        let mut provides = Vec::new();
        let part = self.fill(wanted, &id, inherited, below, &mut provides).unwrap_or_else(|| {
            // Add broken providers, so that layers that require their capabilities are
            // not reported as well.
            for (name, _) in &configuration.provides {
                let configuration = configuration.at.name().to_owned();
                let (id, span, values) = (id.clone(), at.head(), Vars::new());
                let provider = Provider { configuration, id, span, values, broken: true };
                inherited.providers.entry(name).or_insert(provider);
            }
            Part {
                id: id.clone(),
                configuration: name.to_owned(),
                span: at.head(),
                steps: Vec::new(),
                reads: Vars::new(),
                booted: false,
                checks: Vec::new(),
            }
        });
        for (name, provider) in &provides {
            inherited.providers.insert(name, Provider::clone(provider));
        }
        let part = Arc::new(part);
        let applied = Applied { wanted: wanted.clone(), part: part.clone(), provides, times };
        inherited.effect.push(Rc::new(applied));
        part
    }

    /// Elaborates the part and adds its capabilities to `provides`. Returns `None` after
    /// a mistake.
    fn fill<'d>(
        &mut self,
        wanted: &Use<'d>,
        id: &str,
        inherited: &Inherited<'d>,
        below: &Below<'_, 'd>,
        provides: &mut Vec<(&'d str, Provider)>,
    ) -> Option<Part> {
        let Use { at, configuration, were } = wanted;
        let own = self.inputs(*at, configuration, were, below.params);
        let mut vars = below.params.clone();
        for (name, span) in &configuration.requires {
            match inherited.providers.get(*name) {
                Some(provider) if provider.broken => return None,
                Some(provider) => vars.extend(provider.values.clone()),
                None => {
                    self.unmet(*at, configuration, name, *span, below);
                    // Its inputs are unknown: rendering would only add noise.
                    return None;
                }
            }
        }
        let own = own?;
        vars.extend(own.clone());
        let scope = Scope::new(vars.clone());
        let steps = self.steps(configuration.at, &scope);
        let reads = scope.reads();
        let mut checks: Vec<Check> =
            configuration.at.children_named("check").map(|c| self.check(c, &scope)).collect();
        for (name, _) in &configuration.provides {
            let Some(capability) = below.declarations.capabilities.get(name) else { continue };
            let provider = self.provide(*at, configuration, capability, (&own, id), inherited);
            let scope = Scope::new(provider.values.clone());
            checks.extend(capability.at.children_named("check").map(|c| self.check(c, &scope)));
            provides.push((*name, provider));
        }
        Some(Part {
            id: id.to_owned(),
            configuration: configuration.at.name().to_owned(),
            span: at.head(),
            booted: needs_booted(configuration.at) || steps.iter().any(|step| step.primitive.reboots()),
            steps,
            reads,
            checks,
        })
    }

    fn unmet(
        &mut self,
        at: At,
        configuration: &Configuration,
        name: &str,
        span: Span,
        below: &Below<'_, '_>,
    ) {
        let providers: Vec<String> = below
            .declarations
            .configurations
            .values()
            .filter(|c| c.provides.iter().any(|(p, _)| *p == name))
            .map(|c| format!("`layer \"{}\"`", c.at.name()))
            .collect();
        let help = if providers.is_empty() {
            "no configuration provides this capability; declare one".to_owned()
        } else {
            let mut providers = providers;
            providers.sort();
            format!("add {} before this layer", providers.join(" or "))
        };
        self.out.push(
            Diagnostic::error(
                Code::UnmetRequirement,
                at.head(),
                format!("no layer below `{}` provides `{name}`", configuration.at.name()),
            )
            .related(span, "required here")
            .help(help),
        );
    }

    fn provide(
        &mut self,
        at: At,
        configuration: &Configuration,
        capability: &Capability,
        (own, id): (&Vars, &str),
        inherited: &Inherited,
    ) -> Provider {
        let name = capability.at.name();
        if let Some(other) = inherited.providers.get(name) {
            self.out.push(
                Diagnostic::error(
                    Code::TwoProviders,
                    at.head(),
                    format!("`{name}` is already provided by `{}`", other.configuration),
                )
                .related(other.span, "by this layer")
                .help(format!(
                    "an image has one provider of a capability; delete one of the layers, or write \
                     `replace \"{name}\" with=\"{}\"`",
                    configuration.at.name()
                )),
            );
        }
        let values = capability
            .inputs
            .iter()
            .filter_map(|i| {
                let name = crate::value::template_name(i.at.name());
                let value = own.get(&name)?.clone();
                Some((name, value))
            })
            .collect();
        let configuration = configuration.at.name().to_owned();
        Provider { configuration, id: id.to_owned(), span: at.head(), values, broken: false }
    }
}

/// Whether a configuration or one of its scripts says `needs "booted"`.
fn needs_booted(configuration: At) -> bool {
    configuration.child("needs").is_some()
        || configuration.children_named("run").any(|run| run.child("needs").is_some())
}
