//! Splits KDL 2 text into tokens that cover every byte of it.
//!
//! The lexer never fails and never recurses: it yields tokens for invalid KDL, too.
//! [`crate::prescan`] and the formatter use it; it does not know about nodes.
//! Grammar: KDL 2.0.0, <https://kdl.dev/spec>.

/// The kind of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Whitespace without a newline.
    Space,
    /// One newline (CRLF counts as one).
    Newline,
    /// `// ...` up to the newline.
    LineComment,
    /// `/* ... */`, and how deeply comments are nested in it.
    BlockComment { depth: usize },
    /// `\`, which joins the next line to this one.
    Continuation,
    /// `/-`
    Slashdash,
    /// `{`
    Open,
    /// `}`
    Close,
    /// `;`
    Semicolon,
    /// `=`
    Equals,
    /// `(`
    ParenOpen,
    /// `)`
    ParenClose,
    /// A quoted string on one line, raw or not.
    Quoted,
    /// A string in triple quotes, raw or not.
    MultiLine,
    /// An identifier, number or keyword.
    Bare,
}

/// A token and the text that it covers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Token<'a> {
    pub(crate) kind: Kind,
    pub(crate) text: &'a str,
    /// Byte offset of the token.
    pub(crate) start: usize,
}

/// Iterates over the tokens of `text`.
pub(crate) fn tokens(text: &str) -> Tokens<'_> {
    Tokens { text, at: 0 }
}

pub(crate) struct Tokens<'a> {
    text: &'a str,
    at: usize,
}

pub(crate) fn is_newline(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{85}' | '\u{0B}' | '\u{0C}' | '\u{2028}' | '\u{2029}')
}

pub(crate) fn is_space(c: char) -> bool {
    matches!(
        c,
        '\t' | ' ' | '\u{A0}' | '\u{1680}' | '\u{2000}'
            ..='\u{200A}' | '\u{202F}' | '\u{205F}' | '\u{3000}' | '\u{FEFF}'
    )
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        let rest = &self.text[self.at..];
        let first = rest.chars().next()?;
        let (kind, len) = scan(rest, first);
        let start = self.at;
        self.at += len;
        Some(Token { kind, text: &rest[..len], start })
    }
}

fn scan(rest: &str, first: char) -> (Kind, usize) {
    match first {
        '{' => (Kind::Open, 1),
        '}' => (Kind::Close, 1),
        ';' => (Kind::Semicolon, 1),
        '=' => (Kind::Equals, 1),
        '(' => (Kind::ParenOpen, 1),
        ')' => (Kind::ParenClose, 1),
        '\\' => (Kind::Continuation, 1),
        '/' if rest.starts_with("/-") => (Kind::Slashdash, 2),
        '/' if rest.starts_with("//") => (Kind::LineComment, rest.find(is_newline).unwrap_or(rest.len())),
        '/' if rest.starts_with("/*") => block_comment(rest),
        '"' => quoted(rest, 0),
        '#' => {
            let hashes = rest.len() - rest.trim_start_matches('#').len();
            if rest[hashes..].starts_with('"') {
                quoted(rest, hashes)
            } else {
                (Kind::Bare, hashes + bare_len(&rest[hashes..]))
            }
        }
        '\r' if rest.starts_with("\r\n") => (Kind::Newline, 2),
        c if is_newline(c) => (Kind::Newline, c.len_utf8()),
        c if is_space(c) => (Kind::Space, rest.find(|c| !is_space(c)).unwrap_or(rest.len())),
        c => (Kind::Bare, c.len_utf8() + bare_len(&rest[c.len_utf8()..])),
    }
}

fn bare_len(rest: &str) -> usize {
    rest.find(|c| is_newline(c) || is_space(c) || "\\/(){};[]\"#=".contains(c)).unwrap_or(rest.len())
}

fn block_comment(rest: &str) -> (Kind, usize) {
    let bytes = rest.as_bytes();
    let (mut at, mut depth, mut deepest) = (2, 1_usize, 1);
    while depth > 0 && at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'/', Some(b'*')) => {
                depth += 1;
                deepest = deepest.max(depth);
                at += 2;
            }
            (b'*', Some(b'/')) => {
                depth -= 1;
                at += 2;
            }
            _ => at += 1,
        }
    }
    (Kind::BlockComment { depth: deepest }, at)
}

/// Scans a string that starts after `hashes` hash signs. An unclosed string reaches
/// to the end of the line, or, with triple quotes, to the end of the text.
fn quoted(rest: &str, hashes: usize) -> (Kind, usize) {
    let raw = hashes > 0;
    let multi = rest[hashes..].starts_with("\"\"\"");
    let quotes = if multi { 3 } else { 1 };
    let kind = if multi { Kind::MultiLine } else { Kind::Quoted };
    let bytes = rest.as_bytes();
    let mut at = hashes + quotes;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if !raw => {
                // An escape covers the next character, or all the whitespace
                // that follows.
                at += 1;
                if bytes.get(at).is_some_and(|b| b" \t\r\n".contains(b)) {
                    while bytes.get(at).is_some_and(|b| b" \t\r\n".contains(b)) {
                        at += 1;
                    }
                } else {
                    at += 1;
                }
                continue;
            }
            b'\n' if !multi => return (kind, at),
            b'"' => {
                let tail = &bytes[at..];
                let closing = tail.len() >= quotes + hashes
                    && tail[..quotes].iter().all(|b| *b == b'"')
                    && tail[quotes..quotes + hashes].iter().all(|b| *b == b'#');
                if closing {
                    return (kind, at + quotes + hashes);
                }
            }
            _ => {}
        }
        at += 1;
    }
    let mut end = at.min(bytes.len());
    while !rest.is_char_boundary(end) {
        end += 1;
    }
    (kind, end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kinds(text: &str) -> Vec<Kind> {
        tokens(text).map(|t| t.kind).filter(|k| *k != Kind::Space).collect()
    }

    #[test]
    fn every_kind_is_seen() {
        assert_eq!(
            kinds("a \"b{\" #\"c\"}\"# /-d { /* x /* y */ */ e=#true // {\n}"),
            [
                Kind::Bare,
                Kind::Quoted,
                Kind::Quoted,
                Kind::Slashdash,
                Kind::Bare,
                Kind::Open,
                Kind::BlockComment { depth: 2 },
                Kind::Bare,
                Kind::Equals,
                Kind::Bare,
                Kind::LineComment,
                Kind::Newline,
                Kind::Close,
            ]
        );
        assert_eq!(kinds("\"\"\"\n}\n\"\"\"")[0], Kind::MultiLine);
        assert_eq!(kinds("\"a\\\"}\" {"), [Kind::Quoted, Kind::Open]);
    }

    proptest! {
        #[test]
        fn tokens_cover_any_text(text in "[ -~\n\r\té\"#\\\\/{}*-]{0,80}") {
            let joined: String = tokens(&text).map(|t| t.text).collect();
            prop_assert_eq!(joined, text);
        }
    }
}
