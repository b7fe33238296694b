//! The steps of a configuration.

use std::collections::HashMap;

use super::context::Elaborator;
use super::primitive::TABLE;
use crate::diagnostic::{Code, Diagnostic};
use crate::model::{Primitive, Step};
use crate::resolve::At;
use crate::source::Span;
use crate::template::Scope;

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
                continue;
            }
            // The other nodes of a configuration, such as `input`, are no steps.
            let known = TABLE.iter().find(|(kind, _)| kind.name == node.node.name);
            let Some(primitive) = known.and_then(|(_, read)| read(self, node, scope)) else { continue };
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
                (Primitive::Package { names: more, recommends: with }, Some(index)) => {
                    if let Primitive::Package { names, recommends } = &mut steps[index].primitive {
                        for (all, new) in [(names, more), (recommends, with)] {
                            all.extend(new);
                            all.sort();
                            all.dedup();
                        }
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
}
