//! Protects the KDL parser: rejects, in linear time, text on which the parser would
//! overflow its stack or take exponential time.
//!
//! Measured with kdl 6.7.1: about 1,270 nested braces overflow an 8 MiB stack
//! (315 on a thread of 2 MiB), and n nested `/-{` take 2^n time.

use crate::diagnostic::{Code, Diagnostic};
use crate::lexer::{Kind, tokens};
use crate::source::{SourceId, Span};

/// Largest recipe in bytes. The parser takes about 0.6 µs and 100 bytes of memory per
/// byte.
pub const MAX_RECIPE: usize = 768 << 10;
/// Deepest nesting of `{}`.
const MAX_BRACES: usize = 64;
/// Deepest nesting of `/* */`.
const MAX_COMMENTS: usize = 32;
/// Deepest nesting of blocks commented out with `/-`.
const MAX_SLASHDASH: usize = 4;

/// Deepest nesting of braces, counting those in strings; the parser survives 315 of
/// them on a stack of 2 MiB.
const MAX_RAW_BRACES: usize = 256;
/// Deepest nesting of `/-` blocks, counting those in strings. Eight nested `/-{` take
/// the parser 13 ms.
const MAX_RAW_SLASHDASH: usize = 8;

/// Rejects text that must not reach the parser.
pub(crate) fn check(source: SourceId, text: &str) -> Result<(), Diagnostic> {
    raw(source, text)?;
    // For each open brace, whether a slashdash precedes it.
    let mut open: Vec<bool> = Vec::new();
    let mut slashed = 0;
    let mut pending = false;
    // Only whitespace has followed the slashdash so far: newlines are still allowed.
    let mut fresh = false;
    for token in tokens(text) {
        let too_deep = |what: &str, limit: usize| {
            let start = token.start as u32;
            let span = Span {
                source,
                start,
                end: start + token.text.chars().next().map_or(0, char::len_utf8) as u32,
            };
            Diagnostic::error(Code::TooDeep, span, format!("{what} are nested too deeply"))
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
                    return Err(too_deep("`/-` blocks", MAX_SLASHDASH));
                }
            }
            Kind::Close => {
                if let Some(was_slashed) = open.pop() {
                    slashed -= usize::from(was_slashed);
                }
                pending = false;
            }
            Kind::Slashdash => {
                pending = true;
                fresh = true;
                continue;
            }
            Kind::Newline if !fresh => pending = false,
            Kind::Semicolon => pending = false,
            Kind::BlockComment { depth } if depth > MAX_COMMENTS => {
                return Err(too_deep("comments", MAX_COMMENTS));
            }
            _ => {}
        }
        let blank = matches!(
            token.kind,
            Kind::Space | Kind::Newline | Kind::LineComment | Kind::BlockComment { .. } | Kind::Continuation
        );
        fresh &= blank;
    }
    Ok(())
}

/// Checks the nesting again with looser limits, and counts braces in strings, too: the
/// parser recovers from an invalid string by parsing its braces as blocks.
fn raw(source: SourceId, text: &str) -> Result<(), Diagnostic> {
    let (mut open, mut slashed) = (Vec::new(), 0);
    let mut pending = false;
    let bytes = text.as_bytes();
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'{' => {
                open.push(pending);
                slashed += usize::from(pending);
                pending = false;
            }
            b'}' => slashed -= usize::from(open.pop().unwrap_or(false)),
            b'-' if at > 0 && bytes[at - 1] == b'/' => pending = true,
            _ => {}
        }
        if open.len() > MAX_RAW_BRACES || slashed > MAX_RAW_SLASHDASH {
            let span = Span { source, start: at as u32, end: at as u32 + 1 };
            return Err(Diagnostic::error(Code::TooDeep, span, "braces are nested too deeply")
                .label(format!("more than {MAX_RAW_BRACES} open braces, including those in strings"))
                .help("is a closing brace or quote missing? Put long text into a file"));
        }
    }
    Ok(())
}
