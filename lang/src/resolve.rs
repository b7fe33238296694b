//! Collects the declarations of all files. Checks that each used name is declared
//! exactly once, and that providers have the inputs of their capabilities. Does not
//! look at values.

use std::collections::HashMap;

use crate::diagnostic::{Code, Diagnostic};
use crate::load::Loaded;
use crate::source::Span;

mod declarations;

pub(crate) use declarations::{At, Capability, Configuration, Declarations, Image, Input, Server};

/// Collects and checks the declarations of `files`.
pub(crate) fn resolve<'a>(files: &'a [Loaded], out: &mut Vec<Diagnostic>) -> Declarations<'a> {
    let mut declarations = Declarations::default();
    let nodes: Vec<At<'a>> = files
        .iter()
        .flat_map(|loaded| loaded.document.nodes.iter().map(move |node| At { node, loaded }))
        .collect();
    let named = |kind: &'static str| nodes.iter().copied().filter(move |at| at.node.name == kind);

    declarations.params = unique(named("param"), "parameter", out).into_iter().map(Input::new).collect();
    declarations.secrets = unique(named("secret"), "secret", out);
    for at in unique(named("capability"), "capability", out) {
        let inputs = inputs(at, out);
        declarations.capabilities.insert(at.name(), Capability { at, inputs });
    }
    for at in unique(named("configuration"), "configuration", out) {
        let configuration = configuration(at, &declarations.capabilities, out);
        declarations.configurations.insert(at.name(), configuration);
    }
    images(&mut declarations, unique(named("image"), "image", out), out);
    servers(&mut declarations, unique(named("server"), "server", out), out);
    declarations
}

/// Reports and drops repeated declarations.
fn unique<'a>(nodes: impl Iterator<Item = At<'a>>, what: &str, out: &mut Vec<Diagnostic>) -> Vec<At<'a>> {
    let mut first: HashMap<String, At<'a>> = HashMap::new();
    let mut kept = Vec::new();
    // Templates can't tell `a-b` from `a_b`.
    let read = matches!(what, "input" | "parameter");
    for at in nodes {
        let name = if read { crate::value::template_name(at.name()) } else { at.name().to_owned() };
        if let Some(earlier) = first.get(&name) {
            out.push(
                Diagnostic::error(
                    Code::DuplicateName,
                    at.arg_span(),
                    format!("the {what} `{}` is already declared", at.name()),
                )
                .related(earlier.arg_span(), "declared here")
                .help("give one of them another name"),
            );
        } else {
            first.insert(name, at);
            kept.push(at);
        }
    }
    kept
}

fn inputs<'a>(at: At<'a>, out: &mut Vec<Diagnostic>) -> Vec<Input<'a>> {
    unique(at.children_named("input"), "input", out).into_iter().map(Input::new).collect()
}

fn configuration<'a>(
    at: At<'a>,
    capabilities: &HashMap<&'a str, Capability<'a>>,
    out: &mut Vec<Diagnostic>,
) -> Configuration<'a> {
    let mut provides: Vec<(&str, Span)> =
        at.children_named("provides").map(|c| (c.name(), c.arg_span())).collect();
    if let Some(arg) = at.node.prop("provides")
        && let crate::syntax::Scalar::String(name) = &arg.value
    {
        provides.push((name, at.span(&arg.range)));
    }
    let requires: Vec<(&str, Span)> =
        at.children_named("requires").map(|c| (c.name(), c.arg_span())).collect();
    for (name, span) in provides.iter().chain(&requires) {
        if !capabilities.contains_key(name) {
            out.push(
                Diagnostic::error(Code::UnknownCapability, *span, format!("there is no capability `{name}`"))
                    .suggest(name, capabilities.keys().copied())
                    .help_if_none("declare it with `capability`, or `use` the file that does"),
            );
        }
    }
    let inputs = inputs(at, out);
    for (name, span) in &provides {
        for wanted in capabilities.get(name).iter().flat_map(|c| &c.inputs) {
            let own = inputs.iter().find(|i| i.at.name() == wanted.at.name());
            if own.is_some_and(|own| own.ty == wanted.ty) {
                continue;
            }
            let input = wanted.at.name();
            out.push(
                Diagnostic::error(
                    Code::CapabilityInput,
                    own.map_or(*span, |own| own.at.head()),
                    format!("a provider of `{name}` needs an input `{input}` of type {}", wanted.ty.name()),
                )
                .related(wanted.at.head(), "required here")
                .help(format!("add `input \"{input}\" type=\"{}\"`", wanted.ty.name())),
            );
        }
    }
    let mut from: HashMap<&str, &str> = HashMap::new();
    for (name, span) in &requires {
        for input in capabilities.get(name).iter().flat_map(|c| &c.inputs) {
            if let Some(other) = from.insert(input.at.name(), name)
                && other != *name
            {
                out.push(
                    Diagnostic::error(
                        Code::AmbiguousInput,
                        *span,
                        format!("`{other}` and `{name}` both have an input `{}`", input.at.name()),
                    )
                    .help("rename it in one of the capabilities, or split the configuration"),
                );
            }
        }
    }
    Configuration { at, inputs, provides, requires }
}

fn images<'a>(declarations: &mut Declarations<'a>, nodes: Vec<At<'a>>, out: &mut Vec<Diagnostic>) {
    let index: HashMap<&str, usize> = nodes.iter().enumerate().map(|(i, at)| (at.name(), i)).collect();
    for at in nodes {
        let sources: Vec<At> =
            at.children().filter(|c| matches!(c.node.name.as_str(), "from" | "bootstrap" | "disk")).collect();
        match sources.as_slice() {
            [] => out.push(
                Diagnostic::error(
                    Code::Missing,
                    at.arg_span(),
                    format!("the image `{}` has no origin", at.name()),
                )
                .help("add `from \"IMAGE\"`, or `bootstrap \"debian\" suite=\"bookworm\"`"),
            ),
            [_] => {}
            [first, second, ..] => out.push(
                Diagnostic::error(Code::Conflict, second.head(), format!("`{}` has two origins", at.name()))
                    .related(first.head(), "the other one")
                    .help("keep one of `from`, `bootstrap` and `disk`"),
            ),
        }
        if out.len() >= crate::diagnostic::MOST {
            break;
        }
        layers(declarations, at, out);
        let from = at.child("from").and_then(|from| made_from(&index, from, out));
        declarations.images.push(Image { at, from });
    }
    declarations.order = order(&declarations.images, out);
}

/// Reports unknown names in `layer`, `replace` and `remove`.
fn layers(declarations: &Declarations, at: At, out: &mut Vec<Diagnostic>) {
    for child in at.children() {
        if out.len() >= crate::diagnostic::MOST {
            break;
        }
        match child.node.name.as_str() {
            "layer" => known(declarations, child.name(), child.arg_span(), out),
            "replace" => replace(declarations, child, out),
            "remove" => offered(declarations, child, out),
            _ => {}
        }
    }
}

/// Looks up the image that a node names; reports an unknown one.
fn made_from(index: &HashMap<&str, usize>, from: At, out: &mut Vec<Diagnostic>) -> Option<usize> {
    let found = index.get(from.name()).copied();
    if found.is_none() {
        out.push(
            Diagnostic::error(
                Code::UnknownImage,
                from.arg_span(),
                format!("there is no image `{}`", from.name()),
            )
            .suggest(from.name(), index.keys().copied())
            .help_if_none("declare it with `image`, or `use` the file that does"),
        );
    }
    found
}

fn servers<'a>(declarations: &mut Declarations<'a>, nodes: Vec<At<'a>>, out: &mut Vec<Diagnostic>) {
    let index: HashMap<&str, usize> =
        declarations.images.iter().enumerate().map(|(i, image)| (image.at.name(), i)).collect();
    for at in nodes {
        if let Some(image) = index.get(at.name()) {
            let message = format!("there is already an image `{}`", at.name());
            out.push(
                Diagnostic::error(Code::DuplicateName, at.arg_span(), message)
                    .related(declarations.images[*image].at.arg_span(), "declared here")
                    .help("rename the server: commands take images and servers by name"),
            );
        }
        layers(declarations, at, out);
        let Some(from) = at.child("image") else {
            let message = format!("the server `{}` has no image", at.name());
            out.push(Diagnostic::error(Code::Missing, at.arg_span(), message).help("add `image \"NAME\"`"));
            continue;
        };
        if let Some(image) = made_from(&index, from, out) {
            declarations.servers.push(Server { at, image });
        }
    }
}

/// Reports an unknown configuration.
fn known(declarations: &Declarations, name: &str, span: Span, out: &mut Vec<Diagnostic>) {
    if !declarations.configurations.contains_key(name) {
        out.push(
            Diagnostic::error(
                Code::UnknownConfiguration,
                span,
                format!("there is no configuration `{name}`"),
            )
            .suggest(name, declarations.configurations.keys().copied())
            .help_if_none("declare it with `configuration`, or `use` the file that does"),
        );
    }
}

/// Reports an unknown capability.
fn offered(declarations: &Declarations, at: At, out: &mut Vec<Diagnostic>) {
    let name = at.name();
    if !declarations.capabilities.contains_key(name) {
        out.push(
            Diagnostic::error(
                Code::UnknownCapability,
                at.arg_span(),
                format!("there is no capability `{name}`"),
            )
            .suggest(name, declarations.capabilities.keys().copied())
            .help_if_none("declare it with `capability`, or `use` the file that does"),
        );
    }
}

/// Reports a `replace` with a configuration that does not provide the capability.
fn replace(declarations: &Declarations, at: At, out: &mut Vec<Diagnostic>) {
    offered(declarations, at, out);
    let Some((name, span)) = with(at) else { return };
    known(declarations, name, span, out);
    let (Some(configuration), Some(capability)) =
        (declarations.configurations.get(name), declarations.capabilities.get(at.name()))
    else {
        return;
    };
    let provides = |c: &Configuration| c.provides.iter().any(|(p, _)| *p == at.name());
    if !provides(configuration) {
        let others = declarations.configurations.values().filter(|c| provides(c)).map(|c| c.at.name());
        let mut others: Vec<String> = others.map(|name| format!("`{name}`")).collect();
        others.sort();
        let help = match others.is_empty() {
            true => format!("add `provides \"{}\"` to it", at.name()),
            false => format!("providers: {}", others.join(", ")),
        };
        let message = format!("`{name}` does not provide `{}`", at.name());
        out.push(
            Diagnostic::error(Code::UnmetRequirement, span, message)
                .related(capability.at.arg_span(), "declared here")
                .help(help),
        );
    }
}

/// The configuration that a `replace` names.
pub(crate) fn with<'a>(at: At<'a>) -> Option<(&'a str, Span)> {
    let arg = at.node.prop("with")?;
    match &arg.value {
        crate::syntax::Scalar::String(name) => Some((name, at.span(&arg.range))),
        _ => None,
    }
}

/// Orders images so that parents come before children, and reports cycles. Each image
/// has at most one parent, so one walk up from each image suffices.
fn order(images: &[Image], out: &mut Vec<Diagnostic>) -> Vec<usize> {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Walking,
        Done,
    }
    let mut marks = vec![Mark::New; images.len()];
    let mut order = Vec::with_capacity(images.len());
    for start in 0..images.len() {
        let mut way = Vec::new();
        let mut at = Some(start);
        while let Some(i) = at
            && marks[i] == Mark::New
        {
            marks[i] = Mark::Walking;
            way.push(i);
            at = images[i].from;
        }
        if let Some(i) = at
            && marks[i] == Mark::Walking
        {
            let circle: Vec<&str> =
                way.iter().skip_while(|j| **j != i).map(|j| images[*j].at.name()).collect();
            let image = images[i].at;
            out.push(
                Diagnostic::error(
                    Code::ImageCycle,
                    image.child("from").map_or_else(|| image.arg_span(), |f| f.arg_span()),
                    format!("the image `{}` starts from itself", image.name()),
                )
                .help(format!("{} -> {}", circle.join(" -> "), image.name())),
            );
        }
        for i in way.into_iter().rev() {
            marks[i] = Mark::Done;
            order.push(i);
        }
    }
    order
}
