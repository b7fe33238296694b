//! What GRUB would boot: its default entry.
//!
//! Conditions are not evaluated: all their branches count, the last one most.
//! That is right for what `grub-mkconfig` writes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::commands;
use super::entry::{DefaultEntry, local};
use super::syntax::{Mistake, Node, Part, Trouble, Word, parse};

/// Maximum number of files that are read.
const MOST_FILES: u32 = 32;
/// Maximum length of the words of a command, with the values of their variables,
/// in bytes. The rest is left out.
const MOST_TEXT: usize = 64 << 10;

/// Reads the configuration at `path`. `read` returns the content of a file, or
/// `None` if it does not exist.
///
/// # Errors
///
/// Errors of `read`. The inner result says what is wrong with the
/// configuration.
pub fn default_entry(
    path: &str,
    read: &mut dyn FnMut(&str) -> io::Result<Option<String>>,
) -> io::Result<Result<DefaultEntry, Trouble>> {
    let mut script = Script {
        read,
        variables: BTreeMap::new(),
        functions: BTreeSet::new(),
        entries: Vec::new(),
        strange: Vec::new(),
        outside: DefaultEntry::default(),
        files: 0,
    };
    match script.file(path, None).and_then(|()| script.choose(path)) {
        Ok(entry) => Ok(Ok(entry)),
        Err(Stop::Trouble(trouble)) => Ok(Err(trouble)),
        Err(Stop::Io(error)) => Err(error),
    }
}

/// Why the reading of a configuration stops.
enum Stop {
    Io(io::Error),
    Trouble(Trouble),
}

fn trouble(file: &str, line: Option<usize>, what: impl Into<String>) -> Stop {
    Stop::Trouble(Trouble { file: file.to_owned(), line, what: what.into() })
}

/// An entry of a menu. Those of a submenu follow it.
struct Entry {
    file: String,
    title: String,
    id: Option<String>,
    body: Vec<Node>,
    /// The entries of a submenu.
    below: Option<Vec<Entry>>,
}

/// The place of a command.
#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a str,
    /// Whether it is inside a condition, so that it may not run.
    maybe: bool,
}

struct Script<'a> {
    read: &'a mut dyn FnMut(&str) -> io::Result<Option<String>>,
    variables: BTreeMap<String, String>,
    functions: BTreeSet<String>,
    entries: Vec<Entry>,
    /// Commands that GRUB does not have, with their places. A function of this
    /// name may be defined later.
    strange: Vec<(String, usize, String)>,
    /// What commands outside of entries load.
    outside: DefaultEntry,
    files: u32,
}

impl Script<'_> {
    /// Runs a file. `from` is the line that names it; `None` for the first one.
    fn file(&mut self, path: &str, from: Option<(Place<'_>, usize)>) -> Result<(), Stop> {
        self.files += 1;
        if self.files > MOST_FILES {
            return Err(trouble(path, None, "too many files are read"));
        }
        let Some(text) = (self.read)(path).map_err(Stop::Io)? else {
            return match from {
                Some((place, _)) if place.maybe => Ok(()),
                Some((place, line)) => {
                    Err(trouble(place.file, Some(line), format!("there is no file {path}")))
                }
                None => Err(trouble(path, None, "the file does not exist")),
            };
        };
        let parsed = parse(&text).map_err(|Mistake { line, what }| trouble(path, Some(line), what))?;
        let maybe = from.is_some_and(|(place, _)| place.maybe);
        self.run(&parsed, Place { file: path, maybe })
    }

    fn run(&mut self, nodes: &[Node], place: Place<'_>) -> Result<(), Stop> {
        for node in nodes {
            match node {
                Node::Branches(all) => self.run(all, Place { maybe: true, ..place })?,
                Node::Function { name, body } => {
                    self.functions.insert(name.clone());
                    self.look_at(body, place.file);
                }
                Node::Block { words, body, line } => {
                    self.look_at(std::slice::from_ref(node), place.file);
                    let entry = self.entry(words, body, place.file);
                    match entry {
                        Some(entry) => self.entries.push(entry),
                        None => return Err(trouble(place.file, Some(*line), "unexpected `{`")),
                    }
                }
                Node::Command { line, words } => self.command(*line, words, place)?,
            }
        }
        Ok(())
    }

    fn command(&mut self, line: usize, words: &[Word], place: Place<'_>) -> Result<(), Stop> {
        let words = self.expand(words);
        let Some((name, rest)) = words.split_first() else { return Ok(()) };
        let assigned = match name.as_str() {
            "set" | "export" => rest.first(),
            _ => Some(name).filter(|name| is_assignment(name)),
        };
        if let Some((variable, value)) = assigned.and_then(|text| text.split_once('=')) {
            let value: String = value.chars().take(MOST_TEXT / 16).collect();
            self.variables.insert(variable.to_owned(), value);
            return Ok(());
        }
        self.known(name, line, place.file);
        match (name.as_str(), rest.first()) {
            ("unset", Some(variable)) => {
                self.variables.remove(variable);
                Ok(())
            }
            ("source" | "." | "configfile", Some(path)) => match local(path) {
                Some(path) => self.file(&path, Some((place, line))),
                None => Ok(()),
            },
            _ => {
                self.outside.load(name, rest, (place.file, line));
                Ok(())
            }
        }
    }

    /// Reads a `menuentry` or `submenu`; `None` if it is neither.
    fn entry(&self, words: &[Word], body: &[Node], file: &str) -> Option<Entry> {
        let is_submenu = match words.first()?.plain()?.as_str() {
            "submenu" => true,
            "menuentry" | "hiddenentry" => false,
            _ => return None,
        };
        let texts = self.expand(words);
        // `$menuentry_id_option` is `--id`, if GRUB is new enough.
        let names_id = |word: &Word| {
            word.plain().as_deref() == Some("--id")
                || matches!(&word.0[..], [Part::Variable { name, .. }] if name == "menuentry_id_option")
        };
        let id = words.iter().position(names_id).and_then(|at| words.get(at + 1));
        let below = is_submenu.then(|| {
            let inner = body.iter().filter_map(|node| match node {
                Node::Block { words, body, .. } => self.entry(words, body, file),
                _ => None,
            });
            inner.collect()
        });
        Some(Entry {
            file: file.to_owned(),
            title: texts.get(1).cloned().unwrap_or_default(),
            id: id.map(|id| self.text(id)),
            body: if is_submenu { Vec::new() } else { body.to_vec() },
            below,
        })
    }

    /// Notes the commands in a block that GRUB does not have.
    fn look_at(&mut self, nodes: &[Node], file: &str) {
        for node in nodes {
            match node {
                Node::Branches(inner) => self.look_at(inner, file),
                Node::Function { name, body } => {
                    self.functions.insert(name.clone());
                    self.look_at(body, file);
                }
                Node::Block { line, words, body } => {
                    self.known(&words.first().and_then(Word::plain).unwrap_or_default(), *line, file);
                    self.look_at(body, file);
                }
                Node::Command { line, words } => {
                    if let Some(name) = words.first().and_then(Word::plain) {
                        self.known(&name, *line, file);
                    }
                }
            }
        }
    }

    fn known(&mut self, name: &str, line: usize, file: &str) {
        let known = name.is_empty() || is_assignment(name) || commands::has(name);
        if !known {
            self.strange.push((file.to_owned(), line, name.to_owned()));
        }
    }

    /// Finds the entry that boots.
    fn choose(&self, path: &str) -> Result<DefaultEntry, Stop> {
        if let Some((file, line, name)) =
            self.strange.iter().find(|(.., name)| !self.functions.contains(name))
        {
            return Err(trouble(file, Some(*line), format!("GRUB has no command `{name}`")));
        }
        let wanted = self.variables.get("default").map_or("", String::as_str);
        let mut steps = wanted.split('>');
        let mut chosen = pick(&self.entries, steps.next().unwrap_or_default());
        while let Some(below) = chosen.and_then(|entry| entry.below.as_ref()) {
            chosen = pick(below, steps.next().unwrap_or_default());
        }
        let Some(entry) = chosen else {
            return match self.outside.kernel.is_some() || self.outside.other {
                true => Ok(self.outside.clone()),
                false => Err(trouble(path, None, "it has no `menuentry`, so nothing boots")),
            };
        };
        let mut found = DefaultEntry { title: entry.title.clone(), ..DefaultEntry::default() };
        self.boot(&entry.body, &entry.file, &mut found);
        Ok(found)
    }

    /// Notes what the body of an entry loads.
    fn boot(&self, nodes: &[Node], file: &str, found: &mut DefaultEntry) {
        for node in nodes {
            match node {
                Node::Branches(inner) => self.boot(inner, file, found),
                Node::Command { line, words } => {
                    let words = self.expand(words);
                    if let Some((name, rest)) = words.split_first() {
                        found.load(name, rest, (file, *line));
                    }
                }
                Node::Block { .. } | Node::Function { .. } => {}
            }
        }
    }

    fn value(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// Returns the text of a word, with the values of its variables.
    fn text(&self, word: &Word) -> String {
        let mut text = String::new();
        for part in &word.0 {
            match part {
                Part::Text(own) => text.push_str(own),
                Part::Variable { name, .. } => text.push_str(self.value(name)),
            }
            if text.len() > MOST_TEXT {
                break;
            }
        }
        text
    }

    /// Returns the texts of words. A variable without quotes is split.
    fn expand(&self, words: &[Word]) -> Vec<String> {
        let (mut texts, mut length) = (Vec::new(), 0);
        for word in words {
            match &word.0[..] {
                [Part::Variable { name, quoted: false }] => {
                    texts.extend(self.value(name).split_whitespace().map(str::to_owned));
                    length += self.value(name).len();
                }
                _ => {
                    let text = self.text(word);
                    length += text.len();
                    texts.push(text);
                }
            }
            if length > MOST_TEXT {
                break;
            }
        }
        texts
    }
}

/// Picks the entry that `default` names by its number, ID or title. GRUB takes
/// the first one if there is none.
fn pick<'a>(entries: &'a [Entry], name: &str) -> Option<&'a Entry> {
    let by_number = name.parse::<usize>().ok().and_then(|number| entries.get(number));
    let by_name = || entries.iter().find(|one| one.id.as_deref() == Some(name) || one.title == name);
    by_number.or_else(by_name).or(entries.first())
}

fn is_assignment(word: &str) -> bool {
    let name = word.split_once('=').map_or("", |(name, _)| name);
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> Result<DefaultEntry, String> {
        let mut read = |path: &str| {
            let found = files.iter().find(|(name, _)| *name == path);
            Ok(found.map(|(_, text)| (*text).to_owned()))
        };
        let place = |t: Trouble| format!("{}:{}: {}", t.file, t.line.unwrap_or_default(), t.what);
        default_entry("/g", &mut read).unwrap().map_err(place)
    }

    const OWN: &str = "set timeout=0\nset default=0\nsource /p\nmenuentry \"Debian\" {\n  search.fs_uuid abc root\n  \
                       linux /vmlinuz root=UUID=abc ro $parameters\n  initrd /initrd.img\n}\n";

    #[test]
    fn the_default_entry_has_its_files_and_words() {
        let entry = read(&[("/g", OWN), ("/p", "set parameters=\"quiet x=\\\"1\\$\\\"\"\n")]).unwrap();
        let kernel = entry.kernel.unwrap();
        assert_eq!((kernel.path.as_str(), kernel.from), ("/vmlinuz", ("/g".into(), 6)));
        assert_eq!(entry.words, ["root=UUID=abc", "ro", "quiet", "x=\"1$\""]);
        assert_eq!(entry.initrds[0].path, "/initrd.img");
        assert_eq!(entry.searched, [(("/g".to_owned(), 5), "abc".to_owned())]);
    }

    #[test]
    fn what_is_wrong_has_its_place() {
        let wrong = |text: &str| read(&[("/g", text)]).unwrap_err();
        assert_eq!(wrong("nonsense\n"), "/g:1: GRUB has no command `nonsense`");
        assert_eq!(wrong(OWN), "/g:3: there is no file /p");
        assert_eq!(wrong(""), "/g:0: it has no `menuentry`, so nothing boots");
        assert_eq!(wrong("menuentry x {\n linux /x\n"), "/g:1: `{` is not closed");
        assert_eq!(wrong("menuentry x {\n lynux /x\n}\n"), "/g:2: GRUB has no command `lynux`");
        assert_eq!(wrong("source /g\n"), "/g:0: too many files are read");
        assert_eq!(read(&[]).unwrap_err(), "/g:0: the file does not exist");
        // Values that double with each line come to an end.
        let grows = format!("set a=xxxx\n{}{OWN}", "set a=$a$a$a$a\n".repeat(100));
        assert_eq!(wrong(&grows), "/g:104: there is no file /p");
    }

    /// As `grub-mkconfig` writes it, shortened.
    const GENERATED: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then menuentry_id_option="--id"; else menuentry_id_option=""; fi
export menuentry_id_option
function load_video {
  if [ x$feature_all_video_module = xy ]; then insmod all_video; else insmod efi_gop; fi
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-abc' {
	load_video
	search --no-floppy --fs-uuid --set=root abc
	linux	/boot/vmlinuz-6.1 root=UUID=abc ro  quiet
	initrd	/boot/initrd.img-6.1
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-abc' {
	menuentry 'Older' $menuentry_id_option 'old' {
		linux	/boot/vmlinuz-6.0 root=UUID=abc ro single
	}
	menuentry 'Oldest' --id 'oldest' { chainloader +1
	}
}
if [ -f  $prefix/custom.cfg ]; then source $prefix/custom.cfg; fi
"#;

    #[test]
    fn what_grub_generates_is_understood() {
        let with = |default: &str| read(&[("/g", &format!("{GENERATED}{default}"))]).unwrap();
        let first = with("");
        assert_eq!(first.kernel.unwrap().path, "/boot/vmlinuz-6.1");
        assert_eq!((first.title.as_str(), first.searched.len()), ("Debian GNU/Linux", 1));
        assert_eq!(with("set default='gnulinux-advanced-abc>old'").kernel.unwrap().path, "/boot/vmlinuz-6.0");
        let last = with("set default='1>1'");
        assert!(last.other && last.kernel.is_none());
        assert_eq!(with("set default=nothing").title, "Debian GNU/Linux");
    }
}
