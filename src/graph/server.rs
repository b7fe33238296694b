//! Servers: the parts that should be in effect in a running machine, and the
//! steps that get there.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vimg_agent::protocol::{Order, Primitive as Made};
use vimg_lang::Span;
use vimg_lang::model::{Forward, InEffect, Layer, Machine, Model, Part, Primitive, When};
use vimg_model::Turn;

use super::dag::Graph;
use super::describe;
use super::node::{CheckOrder, CheckWork, GraphError, LayerOrder, LayerWork, NodeId};
use crate::digest::Key;
use crate::files::Project;

/// A part that is in effect in a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerPart {
    /// Its name in the machine.
    pub id: String,
    /// The hash of its description.
    pub key: Key,
    /// The capabilities that it requires.
    pub requires: Vec<String>,
    /// The capabilities that it provides.
    pub provides: Vec<String>,
    /// Whether each of its scripts has an `undo`.
    pub undoable: bool,
    /// The kernel parameters that it declares.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernel_parameters: Vec<String>,
}

/// A server as the recipe declares it.
#[derive(Debug)]
pub struct ServerPlan {
    /// Its name.
    pub name: String,
    /// Where it is declared.
    pub span: Span,
    /// The state that it starts from.
    pub image: NodeId,
    /// The machine.
    pub machine: Machine,
    /// Ports that are forwarded into it.
    pub forwards: Vec<Forward>,
    /// Where each of these forwards is declared.
    pub places: Vec<Span>,
    /// The parts in effect in the image.
    pub base: Vec<ServerPart>,
    /// The parts that should be in effect.
    pub wanted: Vec<ServerPart>,
    /// The parts of `wanted`.
    parts: Vec<Arc<Part>>,
}

/// The changes to a server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// Parts to revert, in this order, by their names in the machine.
    pub reverts: Vec<String>,
    /// Parts to apply, by their indices in `wanted`.
    pub apply: Vec<usize>,
    /// Parts that stay.
    pub stays: Vec<ServerPart>,
    /// Parts to revert that have no `undo`.
    pub stuck: Vec<String>,
}

/// The work that brings a server to what the recipe says.
#[derive(Debug)]
pub struct ServerWork {
    /// The steps that revert and apply parts.
    pub layer: LayerWork,
    /// The checks of the applied parts.
    pub checks: CheckWork,
    /// The parts in effect afterwards.
    pub after: Vec<ServerPart>,
}

impl Difference {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.reverts.is_empty() && self.apply.is_empty()
    }
}

impl ServerPlan {
    /// Plans the server with this name; `None` if the recipe has none.
    pub fn new(
        graph: &Graph,
        model: &Model,
        project: &Project,
        name: &str,
    ) -> Option<Result<Self, Vec<GraphError>>> {
        let server = model.servers.iter().find(|s| s.name == name)?;
        let image = graph.image(&model.images[server.image].name)?;
        let parts = |all: &[InEffect]| -> Result<Vec<ServerPart>, Vec<GraphError>> {
            all.iter().map(|one| part(one, &server.machine, project)).collect()
        };
        let plan = parts(&server.base).and_then(|base| Ok((base, parts(&server.parts)?)));
        Some(plan.map(|(base, wanted)| Self {
            name: server.name.clone(),
            span: server.span,
            image,
            machine: server.machine,
            forwards: server.forwards.clone(),
            places: server.places.clone(),
            base,
            wanted,
            parts: server.parts.iter().map(|one| one.part.clone()).collect(),
        }))
    }

    /// Whether it has a `decommission` hook.
    pub fn has_parting(&self) -> bool {
        let parting = |p: &Primitive| matches!(p, Primitive::Hook { when: When::Decommission, .. });
        self.parts.iter().flat_map(|part| &part.steps).any(|step| parting(&step.primitive))
    }

    /// Returns the changes to a server where `current` is in effect.
    pub fn difference(&self, current: &[ServerPart]) -> Difference {
        difference(current, &self.wanted)
    }

    /// Returns the work for the changes.
    pub fn work(&self, difference: &Difference, project: &Project) -> Result<ServerWork, Vec<GraphError>> {
        let mut after = difference.stays.clone();
        let mut parts = Vec::new();
        for place in &difference.apply {
            let mut part = Part::clone(&self.parts[*place]);
            // Names in the machine's ledger are unique.
            for n in 2.. {
                let going = difference.reverts.contains(&part.id);
                if !going && !after.iter().any(|other| other.id == part.id) {
                    break;
                }
                part.id = format!("{}#{n}", part.configuration);
            }
            after.push(ServerPart { id: part.id.clone(), ..self.wanted[*place].clone() });
            parts.push(Arc::new(part));
        }
        let order = CheckOrder { probes: Vec::new(), labels: Vec::new(), network: true };
        let mut checks = CheckWork { order, spans: Vec::new() };
        for check in parts.iter().flat_map(|part: &Arc<Part>| &part.checks) {
            let (work, _) = describe::check(check, &self.machine);
            checks.order.probes.extend(work.order.probes);
            let labels = work.order.labels.iter().map(|what| format!("check {}: {what}", check.name));
            checks.order.labels.extend(labels);
            checks.spans.extend(work.spans);
        }
        let layer = Layer {
            name: self.name.clone(),
            span: self.span,
            reverts: difference.reverts.clone(),
            parts,
            booted: true,
        };
        let (mut layer, _) = describe::layer(&layer, true, &self.machine, project)?;
        switch_over(&mut layer);
        Ok(ServerWork { layer, checks, after })
    }
}

/// When an update both adds and removes packages, orders the steps so that the
/// old service runs as long as possible: new packages are installed first, and
/// old ones are purged when the new parts work.
fn switch_over(work: &mut LayerWork) {
    let LayerWork { order: LayerOrder { steps, labels, .. }, spans, .. } = work;
    let places = spans.drain(..).zip(labels.drain(..));
    let all: Vec<_> = steps.drain(..).zip(places).collect();
    let (going, coming): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(step, _)| matches!(step, Order::Revert { .. }));
    let leaving: Vec<String> = going
        .iter()
        .filter_map(|(step, _)| if let Order::Revert { layer } = step { Some(layer.clone()) } else { None })
        .collect();
    let turns = || coming.iter().filter_map(|(step, _)| step.primitive()).map(Made::turn);
    let adds = turns().any(|turn| matches!(turn, Turn::Early(_)));
    let plain = turns().any(|turn| turn == Turn::AfterAll);
    let sorted: Vec<_> = if leaving.is_empty() || !adds || plain {
        going.into_iter().chain(coming).collect()
    } else {
        let (mut ahead, mut paths) = (Vec::new(), Vec::new());
        for (step, place) in &coming {
            let primitive = match step {
                Order::Make(primitive) => primitive,
                // All parts begin their page here, so that the ledger has them
                // in their order.
                Order::Layer { .. } => {
                    ahead.push((step.clone(), place.clone()));
                    continue;
                }
                Order::Preinstall { .. } | Order::Leave { .. } | Order::Revert { .. } => continue,
            };
            paths.extend(primitive.path().map(str::to_owned));
            if let Turn::Early(names) = primitive.turn() {
                let order = Order::Preinstall { names: names.to_vec(), leaving: leaving.clone() };
                ahead.push((order, (place.0, format!("{} early", place.1))));
            }
        }
        let place = going.first().map(|(_, (span, _))| (*span, format!("stop {}", leaving.join(" "))));
        let leave = place.map(|place| (Order::Leave { layers: leaving, paths }, place));
        ahead.into_iter().chain(leave).chain(coming).chain(going).collect()
    };
    for (step, (span, label)) in sorted {
        steps.push(step);
        labels.push(label);
        spans.push(span);
    }
}

fn part(one: &InEffect, machine: &Machine, project: &Project) -> Result<ServerPart, Vec<GraphError>> {
    // The key must not depend on the name in the machine.
    let plain = Part { id: one.part.configuration.clone(), ..Part::clone(&one.part) };
    let undoable = plain.steps.iter().all(|step| step.primitive.has_undo());
    let layer = Layer {
        name: String::new(),
        span: one.part.span,
        reverts: Vec::new(),
        parts: vec![Arc::new(plain)],
        booted: false,
    };
    let (_, description) = describe::layer(&layer, false, machine, project)?;
    Ok(ServerPart {
        id: one.part.id.clone(),
        key: description.key(),
        requires: one.requires.clone(),
        provides: one.provides.clone(),
        undoable,
        kernel_parameters: one
            .part
            .steps
            .iter()
            .flat_map(|s| s.primitive.kernel_parameters())
            .cloned()
            .collect(),
    })
}

/// Compares parts. A part with an equal key stays, unless it requires something
/// that goes: then it is reverted and applied again.
fn difference(current: &[ServerPart], wanted: &[ServerPart]) -> Difference {
    let mut open: Vec<usize> = (0..wanted.len()).collect();
    let mut gone: Vec<&str> = Vec::new();
    let mut out = Difference::default();
    let mut reverts: Vec<&ServerPart> = Vec::new();
    for part in current {
        let place = open.iter().position(|n| wanted[*n].key == part.key);
        let stands_on_it = part.requires.iter().any(|name| gone.contains(&name.as_str()));
        match place {
            Some(place) if !stands_on_it => {
                open.remove(place);
                out.stays.push(part.clone());
            }
            _ => {
                gone.extend(part.provides.iter().map(String::as_str));
                reverts.push(part);
            }
        }
    }
    out.stuck = reverts.iter().filter(|p| !p.undoable).map(|p| p.id.clone()).collect();
    out.reverts = reverts.iter().rev().map(|p| p.id.clone()).collect();
    out.apply = open;
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn part(id: &str, what: &str, requires: &[&str], provides: &[&str]) -> ServerPart {
        let names = |all: &[&str]| all.iter().map(|n| (*n).to_owned()).collect();
        let key = Key(Digest::of(what.as_bytes()));
        ServerPart {
            id: id.into(),
            key,
            requires: names(requires),
            provides: names(provides),
            undoable: id != "run",
            kernel_parameters: Vec::new(),
        }
    }

    #[test]
    fn what_goes_works_until_what_comes_is_there() {
        let source = vimg_lang::Sources::default().add("x", "");
        let span = Span { source, start: 0, end: 0 };
        let package =
            |name: &str| Order::Make(Made::Package { names: vec![name.into()], recommends: Vec::new() });
        let layer = |name: &str| Order::Layer { name: name.into() };
        let revert = |layer: &str| Order::Revert { layer: layer.into() };
        let link = || Order::Make(Made::Symlink { path: "/x".into(), target: "y".into() });
        let work = |steps: &[Order]| LayerWork {
            order: LayerOrder {
                layer: None,
                steps: steps.to_vec(),
                labels: vec![String::new(); steps.len()],
                notes: Vec::new(),
            },
            spans: vec![span; steps.len()],
            blobs: Default::default(),
        };
        let mut whole = work(&[
            revert("site"),
            revert("nginx"),
            layer("light"),
            package("lighttpd"),
            layer("site#2"),
            link(),
        ]);
        switch_over(&mut whole);
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let ahead = Order::Preinstall { names: names(&["lighttpd"]), leaving: names(&["site", "nginx"]) };
        let leave = Order::Leave { layers: names(&["site", "nginx"]), paths: names(&["/x"]) };
        let (first, second) = whole.order.steps.split_at(4);
        assert_eq!(first, [layer("light"), ahead, layer("site#2"), leave]);
        let rest =
            [layer("light"), package("lighttpd"), layer("site#2"), link(), revert("site"), revert("nginx")];
        assert_eq!((second, whole.spans.len(), whole.order.labels.len()), (&rest[..], 10, 10));
        // Nothing is added, nothing is removed, or there is an account: the
        // plain order.
        let group = || Order::Make(Made::Group { name: "g".into(), gid: None, system: false });
        let plain = [
            vec![revert("site"), layer("x")],
            vec![layer("x"), package("y")],
            vec![revert("site"), layer("x"), package("y"), group()],
        ];
        for steps in plain {
            let mut same = work(&steps);
            switch_over(&mut same);
            assert_eq!(same.order.steps, steps);
        }
    }

    #[test]
    fn only_what_differs_is_done() {
        let nginx = part("nginx", "nginx", &[], &["http"]);
        let light = part("lighttpd", "lighttpd", &[], &["http"]);
        let site = part("site", "site", &["http"], &[]);
        let apart = part("apart", "apart", &[], &[]);
        let run = part("run", "run", &[], &[]);
        let current = [nginx.clone(), site.clone(), apart.clone(), run.clone()];
        assert!(difference(&current, &current).is_empty());
        // Another provider: the part that requires it is applied again, the
        // rest stays.
        let other = difference(&current, &[light, site.clone(), apart.clone(), run.clone()]);
        assert_eq!(other.reverts, ["site", "nginx"]);
        assert_eq!((other.apply, other.stuck.len(), other.stays.len()), (vec![0, 1], 0, 2));
        // An edit affects only its part.
        let edited = difference(&current, &[nginx, part("site", "edited", &["http"], &[]), apart]);
        assert_eq!((edited.reverts, edited.apply), (vec!["run".to_owned(), "site".to_owned()], vec![1]));
        assert_eq!(edited.stuck, ["run"]);
    }
}
