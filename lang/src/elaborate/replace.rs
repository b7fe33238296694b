//! `replace` and `remove`: which parts are reverted, which are applied again, and
//! whether that is possible.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::context::Elaborator;
use super::effect::{Applied, Effect, Use};
use super::growing::{Below, Growing, Inherited, Made};
use crate::diagnostic::{Code, Diagnostic};
use crate::model::{Image, Layer, Origin};
use crate::resolve::{self, At};
use crate::source::Span;
use crate::syntax::Scalar;

/// A layer that reverts some parts and applies others.
struct Exchange<'a, 'd> {
    name: String,
    /// All parts in effect.
    list: &'a [Rc<Applied<'d>>],
    /// The indexes of those to revert.
    taken: &'a [usize],
    apply: Vec<Use<'d>>,
}

impl Elaborator<'_> {
    /// Replaces the provider of a capability by another.
    pub(super) fn replace<'d>(&mut self, at: At<'d>, growing: &mut Growing<'d>, below: &Below<'_, 'd>) {
        let Some((name, _)) = resolve::with(at) else { return };
        let Some(configuration) = below.declarations.configurations.get(name) else { return };
        let Some((list, place)) = self.provider(at, growing, below) else { return };
        // Inputs of the capability keep their values, unless the recipe sets them.
        let were = growing.made.inherited.providers.get(at.name()).map(|p| p.values.clone());
        let wanted = Use { at, configuration, were: were.unwrap_or_default() };
        if by_rebuild(at) {
            let rest = list[place + 1..].iter().map(|applied| applied.wanted.clone());
            let rest: Vec<Use> = std::iter::once(wanted).chain(rest).collect();
            self.rebuild(&list, place, rest, growing, below);
            return;
        }
        let taken = dependents(&list, place);
        self.can_be_taken_back(at, &list, &taken);
        let again = taken.iter().filter(|n| **n != place).map(|n| list[*n].wanted.clone());
        let apply: Vec<Use> = std::iter::once(wanted).chain(again).collect();
        let exchange = Exchange { name: name.to_owned(), list: &list, taken: &taken, apply };
        self.exchange(at, exchange, growing, below);
    }

    /// Removes the provider of a capability.
    pub(super) fn remove<'d>(&mut self, at: At<'d>, growing: &mut Growing<'d>, below: &Below<'_, 'd>) {
        let Some((list, place)) = self.provider(at, growing, below) else { return };
        let taken = dependents(&list, place);
        if let Some(needs) = taken.iter().find(|n| **n != place).map(|n| &list[*n]) {
            let name = &needs.part.configuration;
            let provider = &list[place].part.configuration;
            let message = format!("`{name}` requires a capability that `{provider}` provides");
            self.out.push(
                Diagnostic::error(Code::UnmetRequirement, at.head(), message)
                    .related(needs.part.span, "applied here")
                    .help("use `replace`, or first remove what requires the capability"),
            );
            return;
        }
        if by_rebuild(at) {
            let rest = list[place + 1..].iter().map(|applied| applied.wanted.clone()).collect();
            self.rebuild(&list, place, rest, growing, below);
            return;
        }
        self.can_be_taken_back(at, &list, &taken);
        let name = format!("remove-{}", at.name());
        let exchange = Exchange { name, list: &list, taken: &taken, apply: Vec::new() };
        self.exchange(at, exchange, growing, below);
    }

    /// All parts in effect, and the index of the one that provides the capability.
    fn provider<'d>(
        &mut self,
        at: At<'d>,
        growing: &Growing<'d>,
        below: &Below<'_, 'd>,
    ) -> Option<(Vec<Rc<Applied<'d>>>, usize)> {
        let inherited = &growing.made.inherited;
        below.declarations.capabilities.get(at.name())?;
        let Some(provider) = inherited.providers.get(at.name()) else {
            let known: Vec<&str> = inherited.providers.keys().copied().collect();
            let help = match known.as_slice() {
                [] => "no capability has a provider here; did you mean `layer`?".to_owned(),
                known => format!("provided here: `{}`", known.join("`, `")),
            };
            let message = format!("no layer below provides `{}`", at.name());
            self.out.push(Diagnostic::error(Code::UnmetRequirement, at.arg_span(), message).help(help));
            return None;
        };
        let list = inherited.effect.list();
        let place = list.iter().position(|applied| applied.part.id == provider.id)?;
        Some((list, place))
    }

    /// Reports parts that vimg can't revert: a script has no `undo`, or a part that
    /// stays has changed the same resource later.
    fn can_be_taken_back(&mut self, at: At, list: &[Rc<Applied>], taken: &[usize]) {
        let mut owned: HashMap<String, Span> = HashMap::new();
        for (n, applied) in list.iter().enumerate() {
            let goes = taken.contains(&n);
            for step in &applied.part.steps {
                if goes && !step.primitive.has_undo() {
                    let configuration = &applied.part.configuration;
                    self.out.push(
                        Diagnostic::error(
                            Code::NoUndo,
                            at.head(),
                            format!("a script of `{configuration}` can't be reverted"),
                        )
                        .related(step.span, "it has no `undo`")
                        .help("add an `undo`, or write `by=\"rebuild\"`"),
                    );
                }
                let Some(resource) = step.primitive.resource() else { continue };
                if goes {
                    owned.insert(resource, step.span);
                } else if let Some(span) = owned.get(&resource) {
                    let configuration = &applied.part.configuration;
                    self.out.push(
                        Diagnostic::error(
                            Code::Conflict,
                            step.span,
                            format!("`{configuration}` also changes {resource}, but is not reverted"),
                        )
                        .related(*span, "this would be reverted")
                        .related(at.head(), "because of this")
                        .help(format!(
                            "let `{configuration}` require the capability, or write `by=\"rebuild\"`"
                        )),
                    );
                }
            }
        }
    }

    /// Adds one layer that reverts some parts, the last first, and applies others.
    fn exchange<'d>(
        &mut self,
        at: At<'d>,
        Exchange { name, list, taken, apply }: Exchange<'_, 'd>,
        growing: &mut Growing<'d>,
        below: &Below<'_, 'd>,
    ) {
        let stays = list.iter().enumerate().filter(|(n, _)| !taken.contains(n)).map(|(_, a)| a.clone());
        let times = std::mem::take(&mut growing.made.inherited.times);
        in_effect(stays, &mut growing.made.inherited);
        // Ids stay unique: an id of a reverted part is not used again.
        growing.made.inherited.times = times;
        let reverts: Vec<String> = taken.iter().rev().map(|n| list[*n].part.id.clone()).collect();
        let mut booted = taken.iter().any(|n| list[*n].part.booted);
        let mut parts = Vec::new();
        for wanted in apply {
            let part = self.part(&wanted, &mut growing.made.inherited, below);
            booted |= part.booted;
            parts.push(part);
        }
        growing.push(Layer { name, span: at.head(), reverts, parts, booted });
    }

    /// Goes back to the highest state that has only parts before `place`. Applies the
    /// other parts before `place`, and then `rest`, there.
    fn rebuild<'d>(
        &mut self,
        list: &[Rc<Applied<'d>>],
        place: usize,
        rest: Vec<Use<'d>>,
        growing: &mut Growing<'d>,
        below: &Below<'_, 'd>,
    ) {
        let same = |effect: &Effect<'d>| -> Option<usize> {
            let there = effect.list();
            let fits = there.len() <= place && there.iter().zip(list).all(|(a, b)| Rc::ptr_eq(a, b));
            fits.then_some(there.len())
        };
        // Its own layers first, then those of the images below.
        let own = (0..growing.made.after.len()).rev().find_map(|n| Some((n, same(&growing.made.after[n])?)));
        let mut kept = None;
        if let Some((n, length)) = own {
            growing.image.layers.truncate(n + 1);
            growing.made.after.truncate(n + 1);
            kept = Some(length);
        } else {
            growing.image.layers.clear();
            growing.made.after.clear();
            let mut origin = match growing.image.origin {
                Origin::Image(image, layers) => Some((image, layers)),
                _ => None,
            };
            if let Some(length) = same(&growing.made.below) {
                kept = Some(length);
                origin = None;
            }
            while let Some((image, layers)) = origin {
                let made = &below.made[image];
                let found = (0..layers).rev().find_map(|n| Some((n + 1, same(&made.after[n])?)));
                let found = found.or_else(|| Some((0, same(&made.below)?)));
                if let Some((layers, length)) = found {
                    growing.image.origin = Origin::Image(image, layers);
                    kept = Some(length);
                    break;
                }
                origin = match below.images[image].origin {
                    Origin::Image(image, layers) => Some((image, layers)),
                    _ => None,
                };
            }
        }
        let kept = kept.unwrap_or(0);
        in_effect(list[..kept].iter().cloned(), &mut growing.made.inherited);
        if growing.image.layers.is_empty() {
            growing.made.below = growing.made.inherited.effect.clone();
        }
        let between = list[kept..place].iter().map(|applied| applied.wanted.clone());
        for wanted in between.chain(rest) {
            let part = self.part(&wanted, &mut growing.made.inherited, below);
            growing.push_plain(part);
        }
    }
}

impl Elaborator<'_> {
    /// Builds a clean rebuild: an image with the same parts, and without any revert.
    pub(super) fn rebuilt<'d>(&mut self, index: usize, below: &Below<'_, 'd>) -> Image {
        let (image, made) = (&below.images[index], &below.made[index]);
        let list = made.inherited.effect.list();
        let mut chain = vec![(index, image.layers.len())];
        while let Some((image, _)) = chain.last()
            && let Origin::Image(image, layers) = below.images[*image].origin
        {
            chain.push((image, layers));
        }
        // The highest state that has only parts of the image, and no revert below.
        let (mut origin, mut kept) = ((chain[chain.len() - 1].0, 0), 0);
        let clean = chain.iter().rev().flat_map(|(image, layers)| (0..=*layers).map(move |n| (*image, n)));
        for (image, layers) in clean {
            if layers > 0 && !below.images[image].layers[layers - 1].reverts.is_empty() {
                break;
            }
            let made = &below.made[image];
            let there = if layers == 0 { made.below.list() } else { made.after[layers - 1].list() };
            if there.len() <= list.len() && there.iter().zip(&list).all(|(a, b)| Rc::ptr_eq(a, b)) {
                (origin, kept) = ((image, layers), there.len());
            }
        }
        let mut inherited = Inherited { machine: image.machine, ..Inherited::default() };
        in_effect(list[..kept].iter().cloned(), &mut inherited);
        let new = Image {
            name: super::context::rebuilt_name(&image.name),
            span: image.span,
            origin: Origin::Image(origin.0, origin.1),
            origin_span: image.origin_span,
            machine: image.machine,
            layers: Vec::new(),
            outputs: Vec::new(),
            checks: Vec::new(),
            needed: true,
            complete: true,
        };
        let start = inherited.effect.clone();
        let mut growing = Growing { image: new, made: Made { inherited, below: start, after: Vec::new() } };
        for applied in &list[kept..] {
            let part = self.part(&applied.wanted, &mut growing.made.inherited, below);
            growing.push_plain(part);
        }
        growing.image.name_layers();
        growing.image
    }
}

/// Whether a `replace` or `remove` says `by="rebuild"`.
fn by_rebuild(at: At) -> bool {
    at.node.prop("by").is_some_and(|arg| arg.value == Scalar::String("rebuild".into()))
}

/// Indexes of a part and of all parts that depend on it, directly or indirectly.
fn dependents(list: &[Rc<Applied>], place: usize) -> Vec<usize> {
    let mut taken = vec![place];
    let offers = |applied: &Applied| -> Vec<String> {
        applied.wanted.configuration.provides.iter().map(|(name, _)| (*name).to_owned()).collect()
    };
    let mut gone: HashSet<String> = offers(&list[place]).into_iter().collect();
    for (n, applied) in list.iter().enumerate().skip(place + 1) {
        if applied.wanted.configuration.requires.iter().any(|(name, _)| gone.contains(*name)) {
            taken.push(n);
            gone.extend(offers(applied));
        }
    }
    taken
}

/// Resets what is inherited: exactly these parts are in effect.
fn in_effect<'d>(list: impl Iterator<Item = Rc<Applied<'d>>>, inherited: &mut Inherited<'d>) {
    let machine = inherited.machine;
    *inherited = Inherited { machine, ..Inherited::default() };
    for applied in list {
        for (name, provider) in &applied.provides {
            inherited.providers.insert(name, provider.clone());
        }
        let times = inherited.times.entry(applied.wanted.configuration.at.name()).or_default();
        *times = applied.times.max(*times);
        inherited.effect.push(applied);
    }
}
