//! The kernel parameters that layers declare.

use serde::{Deserialize, Serialize};
use vimg_agent::protocol::Order;

/// The kernel parameters in effect in a machine that boots from a state, besides vimg's
/// own: those that the layers below declare.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelParameters(Vec<Declared>);

/// What a layer declares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Declared {
    /// Its name in the machine.
    layer: String,
    /// The words, in their order.
    words: Vec<String>,
}

impl KernelParameters {
    /// Returns the parameters after steps of a layer, on a state with these
    /// parameters. `layer` is the name in the machine of the part that the steps begin
    /// with.
    pub fn after(&self, layer: Option<&str>, steps: &[Order]) -> Self {
        let mut all = self.0.clone();
        let mut part = layer.unwrap_or_default();
        for step in steps {
            match step {
                Order::Layer { name } => part = name,
                Order::Revert { layer } => all.retain(|one| one.layer != *layer),
                Order::Make(primitive) => {
                    let words = primitive.kernel_parameters().to_vec();
                    if !words.is_empty() {
                        all.push(Declared { layer: part.to_owned(), words });
                    }
                }
                Order::Preinstall { .. } | Order::Leave { .. } => {}
            }
        }
        Self(all)
    }

    /// Returns the words, with spaces between them. Of equal words, only the last one is
    /// left.
    pub fn line(&self) -> String {
        let words: Vec<&str> = self.0.iter().flat_map(|one| &one.words).map(String::as_str).collect();
        let last = |(n, word): &(usize, &&str)| !words[n + 1..].contains(word);
        let left: Vec<&str> = words.iter().enumerate().filter(last).map(|(_, word)| *word).collect();
        left.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use vimg_agent::protocol::Primitive;

    use super::*;

    #[test]
    fn parameters_go_with_their_layers() {
        let add = |word: &str| Order::Make(Primitive::KernelParameter { words: vec![word.into()] });
        let part = |name: &str| Order::Layer { name: name.into() };
        let first =
            KernelParameters::default().after(Some("a"), &[add("quiet"), Order::Make(Primitive::Reboot)]);
        assert_eq!(first.line(), "quiet");
        let both = first.after(None, &[part("b"), add("x=1"), part("c"), add("x=2")]);
        assert_eq!(both.line(), "quiet x=1 x=2");
        let left = both.after(None, &[Order::Revert { layer: "b".into() }, part("d"), add("y")]);
        assert_eq!(left.line(), "quiet x=2 y");
        assert_eq!(left.after(Some("e"), &[]), left);
        assert_eq!(left.after(Some("e"), &[add("x=2")]).line(), "quiet y x=2");
    }
}
