//! `kernel-parameter`: words of the kernel's command line, from the next boot on.
//!
//! They are in a file that both `update-grub` of GRUB and that of vimg's bases read, so
//! they survive new kernels. All layers share the file, and each adds a line.

use std::fs;
use std::io;
use std::path::Path;

use super::context::Context;
use super::file;
use crate::boot_loader;
use crate::command;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::place::Place;

const DROP_IN: &str = "/etc/default/grub.d/50-vimg.cfg";
const TITLE: &str = "# Kernel parameters of the recipe, a line for each `kernel-parameter`.\n";

pub(super) fn apply(words: &[String], context: &mut Context) -> Result<bool, Failure> {
    context.ledger.note(&Entry::KernelParameters { words: words.to_vec() })?;
    change(&with(&read()?, words), context)?;
    Ok(true)
}

/// Removes the words again.
pub(super) fn revert(words: &[String], context: &Context) -> Result<(), Failure> {
    change(&without(&read()?, words), context)
}

/// Gives the file this text, and has the configuration of the boot loader written again.
fn change(text: &str, context: &Context) -> Result<(), Failure> {
    let path = Path::new(DROP_IN);
    if text == TITLE {
        match Place::find(path).and_then(|place| place.remove()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Failure::at(path, e)),
            _ => {}
        }
    } else {
        file::put(path, text)?;
    }
    let mut update = boot_loader::update().ok_or_else(|| {
        Failure::new("the machine has no `update-grub`: no boot loader reads /etc/default/grub.d")
    })?;
    command::run(&mut update, boot_loader::TIMEOUT, &context.output())
}

fn read() -> Result<String, Failure> {
    match fs::read_to_string(DROP_IN) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(TITLE.to_owned()),
        Err(e) => Err(Failure::at(Path::new(DROP_IN), e)),
    }
}

/// The line for these words. A word has no character that means something in double
/// quotes.
fn line(words: &[String]) -> String {
    format!("GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {}\"\n", words.join(" "))
}

fn with(text: &str, words: &[String]) -> String {
    format!("{text}{}", line(words))
}

/// The text without the last line that has these words.
fn without(text: &str, words: &[String]) -> String {
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    let own = line(words);
    if let Some(at) = lines.iter().rposition(|one| *one == own) {
        lines.remove(at);
    }
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_takes_back_its_own_words() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (first, second) = (words("quiet mitigations=off"), words("quiet"));
        let one = with(TITLE, &first);
        assert_eq!(one, format!("{TITLE}GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX quiet mitigations=off\"\n"));
        let both = with(&one, &second);
        assert_eq!(without(&both, &second), one);
        assert_eq!(without(&without(&both, &first), &second), TITLE);
        // What another program wrote stays.
        assert_eq!(without("X=1\n", &first), "X=1\n");
    }
}
