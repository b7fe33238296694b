//! The tutorial: its commands run in the order of the page, and print what the
//! page shows.
//!
//! A block `sh` is one command, and a block `console` has commands after `$`
//! with their output. `...` stands for any lines. A comment before a block says
//! that the test leaves it out (`<!-- not run: REASON -->`), or that its last
//! command fails (`<!-- fails -->`).

use super::machines::{Project, root_base, with_layer};

const PAGE: &str = include_str!("../../docs/tutorial.md");
/// The home directory of the page.
const HOME: &str = "/home/me";
/// Ends the output of a command.
const END: char = '\x1e';

#[derive(Debug, Default)]
struct Command {
    text: String,
    /// `None` if the page does not show the output.
    shown: Option<Vec<String>>,
    fails: bool,
}

/// Returns the commands of a page.
fn commands(page: &str) -> Vec<Command> {
    let mut found = Vec::new();
    let (mut skipped, mut fails) = (false, false);
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        skipped |= line.starts_with("<!-- not run: ");
        fails |= line == "<!-- fails -->";
        let Some(language) = line.strip_prefix("```") else { continue };
        let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        let mut here = match language {
            _ if skipped => Vec::new(),
            "sh" => vec![Command { text: block.join("\n"), ..Command::default() }],
            "console" => dialogue(&block),
            _ => continue,
        };
        if let Some(last) = here.last_mut() {
            last.fails = fails;
        }
        found.append(&mut here);
        (skipped, fails) = (false, false);
    }
    found
}

/// Returns the commands of a block `console`.
fn dialogue(block: &[&str]) -> Vec<Command> {
    let mut found: Vec<Command> = Vec::new();
    for line in block {
        match (line.strip_prefix("$ "), found.last_mut()) {
            (Some(text), _) => {
                found.push(Command { text: text.to_owned(), shown: Some(Vec::new()), fails: false });
            }
            (None, Some(last)) if last.text.ends_with('\\') => last.text.push_str(&format!("\n{line}")),
            (None, Some(_)) if line.is_empty() => {}
            (None, Some(last)) => last.shown.get_or_insert_default().push(plain(line)),
            (None, None) => panic!("a block begins with output: {line}"),
        }
    }
    found
}

/// Returns a line without what differs between two runs: times, sizes, the
/// widths of columns, and boots that hung in the emulator and were repeated.
fn plain(line: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for word in line.split_whitespace() {
        let bare = word.trim_end_matches([',', ')', ':']);
        let after = &word[bare.len()..];
        let number = words.last().is_some_and(|last| last.trim_start_matches('(').parse::<f64>().is_ok());
        let kind = match bare {
            "ms" | "s" | "min" | "h" => "TIME",
            "B" | "KiB" | "MiB" | "GiB" => "SIZE",
            "boot" | "boots" => "BOOTS",
            _ => "",
        };
        if kind.is_empty() || !number {
            words.push(word.to_owned());
            continue;
        }
        words.pop();
        // `2 min 7 s` is one time.
        if !(kind == "TIME" && words.last().is_some_and(|last| last == "TIME")) {
            words.push(kind.to_owned());
        }
        if let Some(last) = words.last_mut() {
            last.push_str(after);
        }
    }
    words.join(" ")
}

/// Returns the output of a command as the page would have it. The lines for each
/// step come only into a file or a pipe.
fn output(text: &str, home: &str) -> Vec<String> {
    let steps = |line: &&str| line.starts_with("      ") && !line.starts_with("       ");
    text.replace(home, HOME)
        .lines()
        .filter(|line| !line.trim().is_empty() && !steps(line))
        .map(plain)
        .collect()
}

fn fits(shown: &[String], got: &[String]) -> bool {
    match shown {
        [] => got.is_empty(),
        [any, rest @ ..] if any == "..." => (0..=got.len()).any(|n| fits(rest, &got[n..])),
        [line, rest @ ..] => got.first() == Some(line) && fits(rest, &got[1..]),
    }
}

#[test]
fn the_tutorial_is_as_it_says() {
    let base = with_layer("base-of-the-tutorial", "");
    base.vimg(&["build", "debian-12"]).succeeds();
    let project = Project::new("tutorial");
    // As root, layers run in containers. They need a store that only root
    // can reach.
    let apart = root_base().join("tutorial");
    let as_root = project.as_root_apart(&apart).is_some();
    let store = if as_root { apart } else { project.own_store() };
    project.write(".ssh/id_ed25519.pub", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA me@host\n");
    project.give_away();
    let home = project.root().display().to_string();
    let commands = commands(PAGE);
    assert!(commands.len() > 20, "the page has only {} commands", commands.len());
    let mut script = format!(
        "exec 2>&1\nexport HOME='{home}' VIMG_STORE='{}' PATH=\"$(dirname \"$VIMG\"):$PATH\"\ncd\n",
        store.display()
    );
    for command in &commands {
        script.push_str(&format!("{}\nprintf '{END}%s\\n' $?\n", command.text));
    }
    let ran = if as_root { project.sh_as_root(&script) } else { project.sh(&script) };
    let mut rest = ran.stdout.as_str();
    let mut wrong = Vec::new();
    for Command { text, shown, fails } in commands {
        let (said, after) = rest.split_once(END).unwrap_or_else(|| panic!("{text} did not end:\n{rest}"));
        let (code, after) = after.split_once('\n').unwrap();
        rest = after;
        if (code != "0") != fails {
            wrong.push(format!("$ {text}\nexit code {code}:\n{said}"));
        }
        let got = output(said, &home);
        if let Some(shown) = shown.filter(|shown| !fits(shown, &got)) {
            let (shown, got) = (shown.join("\n"), got.join("\n"));
            wrong.push(format!("$ {text}\nthe page has\n{shown}\nand vimg printed\n{got}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn the_comparison_with_the_page_is_strict() {
    let lines = |text: &str| text.lines().map(plain).collect::<Vec<_>>();
    assert_eq!(plain("5 built in 2 min 7 s (2 boots)"), plain("5 built in 4.2 s (1 boot)"));
    assert_eq!(plain(" done web@site in 0.4 s, 1.1 MiB"), "done web@site in TIME, SIZE");
    assert_ne!(plain("5 built, 2 reused"), plain("4 built, 2 reused"));
    assert!(fits(&lines("a\n...\nd"), &lines("a\nb\nc\nd")));
    assert!(!fits(&lines("a\n...\nd"), &lines("a\nb")));
    assert!(!fits(&lines("a"), &lines("a\nb")));
    assert!(!fits(&lines("...\nb\n..."), &lines("a\nc")));
    let page =
        "<!-- not run: x -->\n```sh\nfirst\n```\n<!-- fails -->\n```console\n$ a \\\n b\n1\n$ c\n```\n";
    let found = commands(page);
    assert_eq!(found.len(), 2);
    assert_eq!((found[0].text.as_str(), found[0].fails, found[1].fails), ("a \\\n b", false, true));
    assert_eq!(found[0].shown, Some(vec!["1".to_owned()]));
}
