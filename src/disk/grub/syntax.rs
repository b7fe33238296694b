//! The syntax of GRUB's scripts.

/// Maximum depth of blocks in each other.
const DEEPEST: u32 = 50;

/// A word of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Word(pub(super) Vec<Part>);

/// A part of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    /// The value of a variable. Without quotes, it is split at spaces.
    Variable {
        name: String,
        quoted: bool,
    },
}

impl Word {
    /// Returns the text of a word without variables.
    pub(super) fn plain(&self) -> Option<String> {
        self.0
            .iter()
            .map(|part| if let Part::Text(text) = part { Some(text.as_str()) } else { None })
            .collect()
    }
}

/// A command, or what is made of commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    Command {
        line: usize,
        words: Vec<Word>,
    },
    /// `menuentry` or `submenu`: its words, and its block.
    Block {
        line: usize,
        words: Vec<Word>,
        body: Vec<Node>,
    },
    /// A function.
    Function {
        name: String,
        body: Vec<Node>,
    },
    /// The commands of an `if` or a loop, those of its conditions included.
    /// Some of them may not run.
    Branches(Vec<Node>),
}

/// A mistake, and its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mistake {
    pub(super) line: usize,
    pub(super) what: String,
}

/// A mistake in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The path of the file.
    pub file: String,
    /// The line, counted from 1, if there is one.
    pub line: Option<usize>,
    /// The mistake, in a sentence.
    pub what: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word {
        line: usize,
        word: Word,
        quoted: bool,
    },
    /// The end of a command.
    End,
    Open,
    Close {
        line: usize,
    },
}

/// Parses a script.
pub(super) fn parse(text: &str) -> Result<Vec<Node>, Mistake> {
    let mut tokens = tokens(text)?;
    tokens.reverse();
    let mut parser = Parser { tokens, line: 1, depth: 0 };
    parser.list(&[], None).map(|(nodes, _)| nodes)
}

/// Cuts a text into tokens.
fn tokens(text: &str) -> Result<Vec<Token>, Mistake> {
    let chars: Vec<char> = text.chars().collect();
    let (mut at, mut line, mut tokens) = (0, 1, Vec::new());
    while let Some(c) = chars.get(at) {
        match c {
            '\n' => {
                tokens.push(Token::End);
                line += 1;
                at += 1;
            }
            ';' | '|' | '&' => {
                tokens.push(Token::End);
                at += 1;
            }
            '{' => {
                tokens.push(Token::Open);
                at += 1;
            }
            '}' => {
                tokens.push(Token::Close { line });
                at += 1;
            }
            '#' => at += chars[at..].iter().take_while(|c| **c != '\n').count(),
            c if c.is_whitespace() => at += 1,
            _ => {
                let start = line;
                let (word, quoted) = word(&chars, &mut at, &mut line)?;
                // A continued line that has nothing else is no word.
                if quoted || !word.0.is_empty() {
                    tokens.push(Token::Word { line: start, word, quoted });
                }
            }
        }
    }
    Ok(tokens)
}

/// Reads a word. Also returns whether a part of it has quotes.
fn word(chars: &[char], at: &mut usize, line: &mut usize) -> Result<(Word, bool), Mistake> {
    let (mut word, mut text, mut any) = (Word::default(), String::new(), false);
    // The kind of quotes around the next character, and where they began.
    let mut quote: Option<(char, usize)> = None;
    while let Some(&c) = chars.get(*at) {
        let next = chars.get(*at + 1).copied();
        match (quote, c) {
            (Some((open, _)), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some((c, *line));
                any = true;
            }
            (None, c) if c.is_whitespace() || ";|&{}".contains(c) => break,
            (None, '\\') | (Some(('"', _)), '\\') => {
                let special = quote.is_none() || next.is_some_and(|next| "$\"\\\n".contains(next));
                match next.filter(|_| special) {
                    Some('\n') => *line += 1,
                    Some(next) => text.push(next),
                    None => text.push('\\'),
                }
                *at += usize::from(special && next.is_some());
            }
            (None | Some(('"', _)), '$') => match variable(&chars[*at + 1..]) {
                Some((name, length)) => {
                    if !text.is_empty() {
                        word.0.push(Part::Text(std::mem::take(&mut text)));
                    }
                    word.0.push(Part::Variable { name, quoted: quote.is_some() });
                    *at += length;
                }
                None => text.push('$'),
            },
            (_, c) => {
                *line += usize::from(c == '\n');
                text.push(c);
            }
        }
        *at += 1;
    }
    if let Some((open, line)) = quote {
        return Err(Mistake { line, what: format!("the quote {open} is not closed") });
    }
    if !text.is_empty() {
        word.0.push(Part::Text(text));
    }
    Ok((word, any))
}

/// Reads the name of a variable after `$`, and how many characters it takes.
fn variable(chars: &[char]) -> Option<(String, usize)> {
    let is_name = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
    if chars.first() == Some(&'{') {
        let end = chars.iter().position(|c| *c == '}')?;
        return Some((chars[1..end].iter().collect(), end + 1));
    }
    let name: String = chars.iter().copied().take_while(is_name).collect();
    match (name.is_empty(), chars.first()) {
        (false, _) => Some((name.clone(), name.len())),
        (true, Some(c)) if "?*@#".contains(*c) => Some((c.to_string(), 1)),
        _ => None,
    }
}

struct Parser {
    /// The next token is the last one.
    tokens: Vec<Token>,
    /// The line of the last token.
    line: usize,
    depth: u32,
}

impl Parser {
    /// Parses commands up to one of the words `ends`, or `}` if that is among
    /// them. `opened` names what must end, and its line. Returns the end.
    fn list(&mut self, ends: &[&str], opened: Option<(&str, usize)>) -> Result<(Vec<Node>, String), Mistake> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(self.mistake("blocks are too deep in each other"));
        }
        let mut nodes = Vec::new();
        let end = loop {
            match self.tokens.pop() {
                None => match opened {
                    Some((what, line)) => {
                        return Err(Mistake { line, what: format!("{what} is not closed") });
                    }
                    None => break String::new(),
                },
                Some(Token::End) => {}
                Some(Token::Open) => return Err(self.mistake("unexpected `{`")),
                Some(Token::Close { line }) => {
                    self.line = line;
                    match ends.contains(&"}") {
                        true => break "}".to_owned(),
                        false => return Err(self.mistake("unexpected `}`")),
                    }
                }
                Some(Token::Word { line, word, quoted }) => {
                    self.line = line;
                    let name = word.plain().filter(|_| !quoted).unwrap_or_default();
                    if ends.contains(&name.as_str()) {
                        break name;
                    }
                    nodes.push(self.node(&name, word, line)?);
                }
            }
        };
        self.depth -= 1;
        Ok((nodes, end))
    }

    fn node(&mut self, name: &str, word: Word, line: usize) -> Result<Node, Mistake> {
        match name {
            "if" => {
                let (mut all, mut next) = self.list(&["then"], Some(("`if`", line)))?;
                while next != "fi" {
                    let ends: &[&str] = match next.as_str() {
                        "then" => &["elif", "else", "fi"],
                        "elif" => &["then"],
                        _ => &["fi"],
                    };
                    let (more, end) = self.list(ends, Some(("`if`", line)))?;
                    all.extend(more);
                    next = end;
                }
                Ok(Node::Branches(all))
            }
            "while" | "until" | "for" => {
                let (mut all, _) = match name {
                    // The words of `for` are no command.
                    "for" => {
                        self.words();
                        self.list(&["do"], Some(("`for`", line)))?
                    }
                    _ => self.list(&["do"], Some(("a loop", line)))?,
                };
                all.extend(self.list(&["done"], Some(("a loop", line)))?.0);
                Ok(Node::Branches(all))
            }
            "then" | "elif" | "else" | "fi" | "do" | "done" => {
                Err(self.mistake(&format!("unexpected `{name}`")))
            }
            "function" => {
                let name = self.words().first().and_then(Word::plain).unwrap_or_default();
                let body = self.block(line)?.ok_or_else(|| self.mistake("a function has no `{`"))?;
                Ok(Node::Function { name, body })
            }
            _ => {
                let mut words = vec![word];
                words.extend(self.words());
                Ok(match self.block(line)? {
                    Some(body) => Node::Block { line, words, body },
                    None => Node::Command { line, words },
                })
            }
        }
    }

    /// Takes the words up to the end of the command.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some(Token::Word { .. }) = self.tokens.last() {
            if let Some(Token::Word { word, .. }) = self.tokens.pop() {
                words.push(word);
            }
        }
        words
    }

    /// Parses a block, if there is one.
    fn block(&mut self, line: usize) -> Result<Option<Vec<Node>>, Mistake> {
        if self.tokens.last() != Some(&Token::Open) {
            return Ok(None);
        }
        self.tokens.pop();
        self.list(&["}"], Some(("`{`", line))).map(|(body, _)| Some(body))
    }

    fn mistake(&self, what: &str) -> Mistake {
        Mistake { line: self.line, what: what.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistake(text: &str) -> String {
        let Mistake { line, what } = parse(text).unwrap_err();
        format!("{line}: {what}")
    }

    #[test]
    fn mistakes_have_a_line() {
        assert_eq!(mistake("set a=b\nmenuentry 'x' {\n  linux /x\n"), "2: `{` is not closed");
        assert_eq!(mistake("\necho \"x\n\n"), "2: the quote \" is not closed");
        assert_eq!(mistake("if [ -f /x ]; then\n  echo\n"), "1: `if` is not closed");
        assert_eq!(mistake("echo\n}\n"), "2: unexpected `}`");
        assert_eq!(mistake("fi"), "1: unexpected `fi`");
        assert_eq!(mistake(&"if ".repeat(100)), "1: blocks are too deep in each other");
        assert_eq!(mistake(&"menuentry x {\n".repeat(100)), "50: blocks are too deep in each other");
    }

    #[test]
    fn words_have_quotes_variables_and_escapes() {
        let nodes = parse("echo a\"b $c\"'$d'\\ e ${f}\\\n g # comment\n").unwrap();
        let [Node::Command { line: 1, words }] = &nodes[..] else { panic!("{nodes:?}") };
        let text = |text: &str| Part::Text(text.into());
        let variable = |name: &str, quoted| Part::Variable { name: name.into(), quoted };
        assert_eq!(words[1], Word(vec![text("ab "), variable("c", true), text("$d e")]));
        assert_eq!(words[2], Word(vec![variable("f", false)]));
        assert_eq!(words[3].plain().as_deref(), Some("g"));
        assert_eq!(words.len(), 4);
    }
}
