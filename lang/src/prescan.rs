//! The guard in front of the KDL parser: one linear walk over a text that
//! refuses what would cost the parser its stack or exponential time.
//!
//! Measured with kdl 6.7.1: about 1,270 nested braces overflow an 8 MiB stack
//! (315 on a thread of 2 MiB), and n nested `/-{` take 2^n time.

use crate::diagnostic::{Code, Diagnostic};
use crate::lexer::{Kind, tokens};
use crate::source::{SourceId, Span};

/// Largest recipe in bytes. The parser takes about 0.6 µs a byte.
pub const MAX_RECIPE: usize = 2 << 20;
/// Deepest nesting of `{}`.
const MAX_BRACES: usize = 64;
/// Deepest nesting of `/* */`.
const MAX_COMMENTS: usize = 32;
/// Deepest nesting of blocks that a `/-` takes out.
const MAX_SLASHDASH: usize = 4;

/// Refuses text that must not reach the parser.
pub(crate) fn check(source: SourceId, text: &str) -> Result<(), Diagnostic> {
    // For each open brace, whether a slashdash stands before it.
    let mut open: Vec<bool> = Vec::new();
    let mut slashed = 0;
    let mut pending = false;
    for token in tokens(text) {
        let too_deep = |what: &str, limit: usize| {
            let start = token.start as u32;
            let span = Span {
                source,
                start,
                end: start + token.text.chars().next().map_or(0, char::len_utf8) as u32,
            };
            Diagnostic::error(Code::TooDeep, span, format!("{what} are nested too deep"))
                .label(format!("more than {limit} levels"))
                .help("a recipe needs only a few levels; is a closing brace missing?")
        };
        match token.kind {
            Kind::Open => {
                open.push(pending);
                slashed += usize::from(pending);
                pending = false;
                if open.len() > MAX_BRACES {
                    return Err(too_deep("braces", MAX_BRACES));
                }
                if slashed > MAX_SLASHDASH {
                    return Err(too_deep("blocks taken out by `/-`", MAX_SLASHDASH));
                }
            }
            Kind::Close => {
                if let Some(was_slashed) = open.pop() {
                    slashed -= usize::from(was_slashed);
                }
                pending = false;
            }
            Kind::Slashdash => pending = true,
            Kind::Newline | Kind::Semicolon => pending = false,
            Kind::BlockComment { depth } if depth > MAX_COMMENTS => {
                return Err(too_deep("comments", MAX_COMMENTS));
            }
            _ => {}
        }
    }
    Ok(())
}
