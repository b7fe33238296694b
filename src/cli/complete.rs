//! `vimg completions`, and the hidden command that its scripts call.
//!
//! The scripts ask this program for everything, so that they stay right when it
//! changes. It starts no programs, writes no store, and gives nothing if
//! something is wrong.

use clap::{Arg, Args as _, Command, FromArgMatches};
use clap_complete::Shell;
use vimg_lang::{FileRef, Names, names};

use super::global::Global;
use super::output::{Outcome, print};
use super::{project, settings};
use crate::base;
use crate::files::{Project, Stamps};
use crate::store::Area;

/// Print a completion script for a shell
///
/// In bash, `source <(vimg completions bash)` activates it. It completes commands
/// and options, and the names of the project's images, layers, servers, parameters
/// and caches.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell
    shell: Shell,
}

/// Arguments of the hidden command.
#[derive(Debug, clap::Args)]
pub(super) struct CompleteArgs {
    /// The words of the command line after the program. The last one is completed
    #[arg(last = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

pub(super) fn script(args: &Args, command: &mut Command) -> Outcome {
    match args.shell {
        Shell::Bash => print(include_str!("complete/vimg.bash")),
        Shell::Zsh => print(include_str!("complete/vimg.zsh")),
        Shell::Fish => print(include_str!("complete/vimg.fish")),
        other => {
            let mut bytes = Vec::new();
            clap_complete::generate(other, command, "vimg", &mut bytes);
            print(&String::from_utf8_lossy(&bytes))
        }
    }
}

pub(super) fn run(args: &CompleteArgs, mut command: Command) -> Outcome {
    // Gives the commands the options of all commands.
    command.build();
    let mut out = String::new();
    for (value, help) in candidates(&command, &args.words) {
        out.push_str(&format!("{value}\t{help}\n"));
    }
    print(&out)
}

/// A value, and what it means.
type Candidate = (String, String);

/// The command line up to the word that is completed.
struct Before<'a> {
    command: &'a Command,
    /// The option whose value comes next.
    pending: Option<&'a Arg>,
    /// The number of positional arguments.
    positional: usize,
    /// Whether a `--` ended the options.
    ended: bool,
    /// Options that name the project.
    project: Vec<String>,
}

fn candidates(root: &Command, words: &[String]) -> Vec<Candidate> {
    let Some((current, before)) = words.split_last() else { return Vec::new() };
    let before = read(root, before);
    let command = before.command;
    let all = if let Some(arg) = before.pending {
        values(arg, current, &before)
    } else if before.ended {
        Vec::new()
    } else if let Some((option, value)) = current.split_once('=').filter(|_| current.starts_with("--")) {
        let prefixed = |(value, help)| (format!("{option}={value}"), help);
        match by_long(command, &option[2..]) {
            Some(arg) => values(arg, value, &before).into_iter().map(prefixed).collect(),
            None => Vec::new(),
        }
    } else if current.starts_with('-') {
        let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
        shown.filter_map(|arg| Some((format!("--{}", arg.get_long()?), help(arg.get_help())))).collect()
    } else if command.has_subcommands() && before.positional == 0 {
        let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
        shown.map(|command| (command.get_name().to_owned(), help(command.get_about()))).collect()
    } else {
        let repeats = |arg: &&Arg| arg.get_num_args().is_some_and(|range| range.max_values() > 1);
        let nth = command.get_positionals().nth(before.positional);
        let arg = nth.or_else(|| command.get_positionals().last().filter(repeats));
        arg.map(|arg| values(arg, current, &before)).unwrap_or_default()
    };
    all.into_iter().filter(|(value, _)| value.starts_with(current)).collect()
}

fn help(text: Option<&clap::builder::StyledStr>) -> String {
    text.map(|text| text.to_string().lines().next().unwrap_or_default().to_owned()).unwrap_or_default()
}

fn by_long<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(name))
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

/// Reads the words before the one that is completed.
fn read<'a>(root: &'a Command, words: &[String]) -> Before<'a> {
    let mut before =
        Before { command: root, pending: None, positional: 0, ended: false, project: Vec::new() };
    for word in words {
        if let Some(arg) = before.pending.take() {
            before.note(arg, word);
        } else if before.ended {
            before.positional += 1;
        } else if word == "--" {
            before.ended = true;
        } else if let Some(name) = word.strip_prefix("--") {
            let (name, value) =
                name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value)));
            match (by_long(before.command, name).filter(|arg| takes_value(arg)), value) {
                (Some(arg), Some(value)) => before.note(arg, value),
                (arg, None) => before.pending = arg,
                (None, Some(_)) => {}
            }
        } else if let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) {
            before.letters(letters);
        } else if before.positional == 0
            && let Some(command) = before.command.find_subcommand(word)
        {
            before.command = command;
        } else {
            before.positional += 1;
        }
    }
    before
}

impl Before<'_> {
    /// Reads short options, such as `-vf FILE`.
    fn letters(&mut self, letters: &str) {
        for (n, letter) in letters.char_indices() {
            let arg = self.command.get_arguments().find(|arg| arg.get_short() == Some(letter));
            if let Some(arg) = arg.filter(|arg| takes_value(arg)) {
                match &letters[n + letter.len_utf8()..] {
                    "" => self.pending = Some(arg),
                    value => self.note(arg, value),
                }
                return;
            }
        }
    }

    /// Remembers options that name the project.
    fn note(&mut self, arg: &Arg, value: &str) {
        if let id @ ("file" | "store") = arg.get_id().as_str() {
            self.project.extend([format!("--{id}"), value.to_owned()]);
        }
    }

    /// Returns the options of all commands.
    fn global(&self) -> Option<Global> {
        let words = ["vimg".to_owned()].into_iter().chain(self.project.iter().cloned());
        let matches = Global::augment_args(Command::new("vimg")).try_get_matches_from(words).ok()?;
        Global::from_arg_matches(&matches).ok()
    }

    /// Reads the names in the project's recipe.
    fn names(&self) -> Option<Names> {
        let global = self.global()?;
        let (root, name) = project::find(&global).ok()?;
        let project = Project::open(&root).ok()?;
        // Parsed files are taken from the store, if there is one.
        let parsed = project::store_path(&global).ok().map(|store| store.join(Area::Parsed.name()));
        let project = match parsed.filter(|parsed| parsed.is_dir()) {
            Some(parsed) => project.knowing(Stamps::default(), parsed),
            None => project,
        };
        Some(names(&project, &FileRef::project(name), &base::known(base::BUILT_IN)))
    }

    /// Lists the caches in the settings of the user and the project.
    fn caches(&self) -> Vec<String> {
        let project =
            || project::find(&self.global()?).ok().and_then(|(root, _)| settings::project(&root).ok());
        let all = [settings::user().ok(), project()];
        let names = ["cache-from", "cache-to"];
        let mut caches: Vec<String> = all
            .into_iter()
            .flatten()
            .flat_map(|mut settings| names.map(|name| settings.remove(name).unwrap_or_default()))
            .flatten()
            .flatten()
            .collect();
        caches.sort();
        caches.dedup();
        caches
    }
}

/// Lists the values of an argument, as the name of its value says.
fn values(arg: &Arg, current: &str, before: &Before) -> Vec<Candidate> {
    let fixed = arg.get_possible_values();
    if !fixed.is_empty() && takes_value(arg) {
        return fixed.iter().map(|value| (value.get_name().to_owned(), help(value.get_help()))).collect();
    }
    let name = arg.get_value_names().and_then(|names| names.first()).map_or("", |name| name.as_str());
    let names = || before.names().unwrap_or_default();
    let all =
        |names: Vec<String>, help: &str| names.into_iter().map(|name| (name, help.to_owned())).collect();
    let with = |names: Vec<String>, ends: &[&str]| {
        names.iter().flat_map(|name| ends.iter().map(move |end| format!("{name}{end}"))).collect::<Vec<_>>()
    };
    match name {
        "IMAGE" | "IMAGES" => images(&names()),
        "IMAGE[@LAYER]" if before.command.get_name() == "shell" => {
            let names = names();
            let mut both = layers(&names, current);
            both.extend(names.servers.into_iter().map(|name| (name, "server".to_owned())));
            both
        }
        "IMAGE[@LAYER]" => layers(&names(), current),
        "IMAGE[@LAYER]:/PATH" => {
            layers(&names(), current).into_iter().map(|(name, help)| (format!("{name}:/"), help)).collect()
        }
        "SERVER" => all(names().servers, "server"),
        "NAME=VALUE" => all(with(names().params, &["="]), "parameter"),
        "NAME=SOURCE" => all(with(names().secrets, &["=env:", "=file:"]), "secret"),
        "SPEC" | "FROM" | "TO" => all(before.caches(), "cache"),
        _ => Vec::new(),
    }
}

/// Lists images, those of the project first.
fn images(names: &Names) -> Vec<Candidate> {
    let (library, own): (Vec<_>, Vec<_>) = names.images.iter().partition(|image| image.library);
    let own = own.into_iter().map(|image| (image.name.clone(), "image".to_owned()));
    own.chain(library.into_iter().map(|image| (image.name.clone(), "image of the library".to_owned())))
        .collect()
}

/// Lists images, and the layers of an image as soon as `current` means only it.
fn layers(names: &Names, current: &str) -> Vec<Candidate> {
    let named = current.split(['@', ':']).next().unwrap_or(current);
    let mut candidates = images(names);
    let mut meant = names.images.iter().filter(|image| match current == named {
        true => image.name.starts_with(named),
        false => image.name == named,
    });
    if let (Some(image), None) = (meant.next(), meant.next()) {
        let layers = image.layers.iter().map(|layer| (format!("{}@{layer}", image.name), "layer".to_owned()));
        candidates.extend(layers);
    }
    candidates
}
