//! `vimg fmt`: changes the layout of a recipe, but not its meaning.
//!
//! Works on the tokens of [`crate::lexer`], because kdl's own `autoformat`
//! (6.7.1) deletes comments, flattens multi-line strings and rewrites numbers.
//! Only whitespace between tokens changes: comments, slashdashes, numbers and
//! strings keep their spelling. Lines are not split or joined.

use crate::diagnostic::Diagnostic;
use crate::lexer::{Kind, Token, tokens};
use crate::source::SourceId;
use crate::syntax;

const INDENT: &str = "    ";

/// Formats the text of a recipe.
///
/// # Errors
///
/// The diagnostics of the parser, if the text is not valid KDL.
pub fn format(source: SourceId, text: &str) -> Result<String, Vec<Diagnostic>> {
    syntax::parse(source, text)?;
    Ok(layout(text))
}

fn layout(text: &str) -> String {
    let mut layout = Layout::default();
    for token in tokens(text) {
        layout.token(token);
    }
    layout.finish()
}

#[derive(Default)]
struct Layout {
    out: String,
    depth: usize,
    /// Whether the current line has a token.
    started: bool,
    /// Whether whitespace precedes the next token.
    space: bool,
    /// Whether the next token follows the last one without a space.
    glue: bool,
    /// Newlines since the last token.
    newlines: usize,
    /// Whether the last line ended in `\`.
    continued: bool,
    /// Whether the last token was `{`.
    opened: bool,
}

impl Layout {
    fn token(&mut self, token: Token) {
        match token.kind {
            Kind::Space => self.space = true,
            Kind::Newline => {
                self.newlines += 1;
                self.started = false;
                self.space = false;
                self.glue = false;
            }
            kind => self.solid(kind, token.text),
        }
    }

    fn solid(&mut self, kind: Kind, text: &str) {
        if kind == Kind::Close {
            self.depth = self.depth.saturating_sub(1);
        }
        if self.started {
            let blank = match kind {
                Kind::Equals | Kind::Semicolon | Kind::ParenClose => false,
                Kind::Open => true,
                Kind::Close => !self.opened,
                _ => !self.glue && (self.space || self.opened),
            };
            if blank && !self.out.is_empty() {
                self.out.push(' ');
            }
        } else {
            self.line_start(kind);
        }
        self.space = false;
        self.newlines = 0;
        self.started = true;
        self.continued = kind == Kind::Continuation || (self.continued && kind == Kind::LineComment);
        self.opened = kind == Kind::Open;
        self.glue = matches!(kind, Kind::Equals | Kind::ParenOpen | Kind::ParenClose);
        match kind {
            Kind::MultiLine => self.out.push_str(&indent_string(text, self.depth + 1)),
            Kind::LineComment => self.out.push_str(text.trim_end()),
            _ => self.out.push_str(text),
        }
        match kind {
            Kind::Open => self.depth += 1,
            // The rest of the line is another node.
            Kind::Semicolon | Kind::Close => self.space = true,
            _ => {}
        }
    }

    fn line_start(&mut self, kind: Kind) {
        if !self.out.is_empty() {
            self.out.push('\n');
            // An empty line after `\` ends the node, so it has to stay.
            let blank = !self.opened && kind != Kind::Close || self.continued;
            if self.newlines > 1 && blank {
                self.out.push('\n');
                self.continued = false;
            }
        }
        let extra = usize::from(self.continued);
        for _ in 0..self.depth + extra {
            self.out.push_str(INDENT);
        }
    }

    fn finish(mut self) -> String {
        if !self.out.is_empty() {
            self.out.push('\n');
        }
        self.out
    }
}

/// Indents the lines of a multi-line string to `depth`. This does not change its value:
/// KDL removes the indentation of the closing quotes from each line.
fn indent_string(text: &str, depth: usize) -> String {
    let hashes = text.len() - text.trim_start_matches('#').len();
    let lines: Vec<&str> = text.split('\n').collect();
    let (Some(last), true) = (lines.last(), lines.len() > 1) else { return text.to_owned() };
    let prefix = &last[..last.len() - last.trim_start_matches([' ', '\t']).len()];
    let plain = last[prefix.len()..].starts_with("\"\"\"")
        && lines[0].ends_with("\"\"\"")
        && !text.contains(['\r', '\u{85}', '\u{0B}', '\u{0C}', '\u{2028}', '\u{2029}'])
        // An escaped newline removes the whitespace after it.
        && (hashes > 0 || !lines.iter().any(|l| l.trim_end().ends_with('\\')))
        && lines[1..].iter().all(|l| l.starts_with(prefix) || l.trim_matches([' ', '\t']).is_empty());
    if !plain {
        return text.to_owned();
    }
    let mut out = lines[0].to_owned();
    for line in &lines[1..] {
        out.push('\n');
        if let Some(rest) = line.strip_prefix(prefix).filter(|rest| !rest.is_empty()) {
            out.push_str(&INDENT.repeat(depth));
            out.push_str(rest);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(input: &str, expected: &str) {
        assert_eq!(layout(input), expected);
        assert_eq!(layout(expected), expected, "not idempotent");
    }

    #[test]
    fn blocks_are_indented_and_blanks_are_single() {
        check(
            "image   \"web\"{\n  from  \"x\"\n\n\n\n      layer \"y\"   port = 80 // why\n\n}\n\n\n",
            "image \"web\" {\n    from \"x\"\n\n    layer \"y\" port=80 // why\n}\n",
        );
        check("a { b;c 1 ;d }\n", "a { b; c 1; d }\n");
        check("a {}\n", "a {}\n");
        check("a 1 \\ // go on\n 2\nb\n", "a 1 \\ // go on\n    2\nb\n");
    }

    #[test]
    fn spellings_stay() {
        check(
            "/-a 0x1F 1_000 #\"r\"# \"q\" (raw)\"t\" /-2 {\n}\n",
            "/-a 0x1F 1_000 #\"r\"# \"q\" (raw)\"t\" /-2 {\n}\n",
        );
        check("/* a\n   b */ x\n", "/* a\n   b */ x\n");
    }

    #[test]
    fn multi_line_strings_move_as_a_block() {
        check(
            "a {\n run {\n  script \"\"\"\n  set -e\n    x\n\n  \"\"\"\n }\n}\n",
            "a {\n    run {\n        script \"\"\"\n            set -e\n              x\n\n            \"\"\"\n    }\n}\n",
        );
    }

    /// All tokens except whitespace, and multi-line strings without their layout.
    fn solids(text: &str) -> Vec<String> {
        tokens(text)
            .filter(|t| !matches!(t.kind, Kind::Space | Kind::Newline))
            .map(|t| match t.kind {
                Kind::MultiLine => indent_string(t.text, 0),
                _ => t.text.trim_end().to_owned(),
            })
            .collect()
    }

    fn meaning(text: &str) -> Option<String> {
        fn strip(nodes: &[syntax::Node], out: &mut String) {
            for n in nodes {
                let args: Vec<_> = n.args.iter().map(|a| (&a.value, a.raw)).collect();
                let props: Vec<_> = n.props.iter().map(|p| (&p.name, &p.arg.value, p.arg.raw)).collect();
                out.push_str(&format!("{} {args:?} {props:?} {{", n.name));
                strip(n.children.as_deref().unwrap_or_default(), out);
                out.push('}');
            }
        }
        let source = crate::Sources::default().add("t", text);
        let mut out = String::new();
        strip(&syntax::parse(source, text).ok()?.nodes, &mut out);
        Some(out)
    }

    /// Mostly valid KDL, with everything that a formatter could lose.
    fn recipe() -> impl Strategy<Value = String> {
        let entry = prop_oneof![
            Just("\"text\"".to_owned()),
            Just("0x1F".to_owned()),
            Just("1_000.50e3".to_owned()),
            Just("#true".to_owned()),
            Just("#\"raw \"x\" \"#".to_owned()),
            Just("(raw)\"{{ a }}\"".to_owned()),
            Just("key=\"v // no comment\"".to_owned()),
            Just("key  =  5".to_owned()),
            Just("/-\"gone\"".to_owned()),
            Just("/- key=1".to_owned()),
            Just("/* c */".to_owned()),
            Just("\\\n   ".to_owned()),
            Just("\\ // why\n".to_owned()),
            Just("\"\"\"\n   a\n     b {{ x }}\n\n   \"\"\"".to_owned()),
            Just("#\"\"\"\n\ta\\\n\t\"\"\"#".to_owned()),
        ];
        let end = prop_oneof![
            Just("\n".to_owned()),
            Just("\n\n\n".to_owned()),
            Just(" // c\n".to_owned()),
            Just(";".to_owned()),
            Just(" ; \n".to_owned()),
            Just("\r\n".to_owned()),
        ];
        let head = (
            prop_oneof![Just(""), Just("/-"), Just("/- "), Just("  "), Just("// c\n"), Just("/* a\n b */ ")],
            prop::collection::vec(entry, 0..4),
        );
        let leaf = (head.clone(), end.clone())
            .prop_map(|((lead, entries), end)| format!("{lead}node {}{end}", entries.join("  ")));
        leaf.prop_recursive(3, 24, 4, move |inner| {
            (head.clone(), prop::collection::vec(inner, 0..4), end.clone(), prop::bool::ANY).prop_map(
                |((lead, entries), children, end, tight)| {
                    let open = if tight { "{" } else { "  {\n\n" };
                    format!("{lead}node {}{open}{}}}{end}", entries.join(" "), children.concat())
                },
            )
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn nothing_is_lost(nodes in prop::collection::vec(recipe(), 0..5)) {
            let text = nodes.concat();
            let formatted = layout(&text);
            prop_assert_eq!(solids(&text), solids(&formatted));
            prop_assert_eq!(layout(&formatted), formatted.clone(), "not idempotent");
            if let Some(before) = meaning(&text) {
                prop_assert_eq!(Some(before), meaning(&formatted));
            }
        }
    }

    #[test]
    fn most_generated_recipes_parse() {
        use proptest::strategy::ValueTree;
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let parsed = (0..200)
            .filter(|_| meaning(&recipe().new_tree(&mut runner).unwrap().current()).is_some())
            .count();
        assert!(parsed > 100, "only {parsed} of 200 parse; the property above proves too little");
    }
}
