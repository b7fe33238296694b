//! Servers: their image, forwarded ports, and the parts that are applied to them.

use std::collections::HashMap;

use super::context::Elaborator;
use super::effect::Effect;
use super::growing::{Below, Growing, Made};
use crate::diagnostic::{Code, Diagnostic};
use crate::model::{Forward, Image, InEffect, Origin, Server};
use crate::resolve::At;
use crate::source::Span;
use crate::template::Scope;

impl Elaborator<'_> {
    pub(super) fn server<'d>(&mut self, at: At<'d>, image: usize, below: &Below<'_, 'd>) -> Server {
        let inherited = below.made[image].inherited.clone();
        let start = inherited.effect.clone();
        // A server applies layers like an image that starts from the same image.
        let grown = Image {
            name: at.name().to_owned(),
            span: at.arg_span(),
            origin: Origin::Image(image, below.images[image].layers.len()),
            origin_span: at.head(),
            machine: inherited.machine,
            layers: Vec::new(),
            outputs: Vec::new(),
            checks: Vec::new(),
            needed: true,
            complete: true,
        };
        let base = in_effect(&start);
        let mut growing = Growing { image: grown, made: Made { inherited, below: start, after: Vec::new() } };
        self.layers(at, &mut growing, below);
        let scope = Scope::new(below.params.clone());
        let forwards =
            at.children_named("forward").filter_map(|f| Some((self.forward(f, &scope)?, f.head())));
        let forwards: Vec<(Forward, Span)> = forwards.collect();
        let mut taken: HashMap<(String, u16), Span> = HashMap::new();
        for (forward, span) in &forwards {
            if let Some(first) = taken.insert((forward.address.clone(), forward.host), *span) {
                let message = format!("port {} of the host is forwarded twice", forward.host);
                self.out.push(
                    Diagnostic::error(Code::Conflict, *span, message)
                        .related(first, "the other one")
                        .help("give each `forward` its own `host=`"),
                );
            }
        }
        Server {
            name: growing.image.name,
            span: growing.image.span,
            image,
            machine: growing.image.machine,
            places: forwards.iter().map(|(_, place)| *place).collect(),
            forwards: forwards.into_iter().map(|(forward, _)| forward).collect(),
            base,
            parts: in_effect(&growing.made.inherited.effect),
        }
    }

    fn forward(&mut self, at: At, scope: &Scope) -> Option<Forward> {
        let host = self.ranged(at.node.prop("host")?, at, scope, 1, 65535)? as u16;
        let guest = self.ranged(at.node.prop("guest")?, at, scope, 1, 65535)? as u16;
        let address = match at.node.prop("address") {
            Some(arg) => self.parsed(arg, at, scope, |text| {
                text.parse::<std::net::Ipv4Addr>()
                    .map(|address| address.to_string())
                    .map_err(|_| "expected an IPv4 address such as `127.0.0.1` or `0.0.0.0`".to_owned())
            })?,
            None => "127.0.0.1".into(),
        };
        Some(Forward { address, host, guest })
    }
}

fn in_effect(effect: &Effect) -> Vec<InEffect> {
    let names = |all: &[(&str, Span)]| all.iter().map(|(name, _)| (*name).to_owned()).collect();
    effect
        .list()
        .iter()
        .map(|applied| InEffect {
            part: applied.part.clone(),
            requires: names(&applied.wanted.configuration.requires),
            provides: names(&applied.wanted.configuration.provides),
        })
        .collect()
}
