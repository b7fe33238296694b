//! `vimg diff`

use serde_json::json;

use super::build::{self, How, Made};
use super::global::Global;
use super::interrupt::{interruptible, stopped};
use super::output::{Error, Outcome, print, print_json};
use super::project;
use crate::execute::{self, Change, Comparison};
use crate::report::Style;

/// Show what differs between two machines: files, packages, units
///
/// vimg first builds what is missing of the images. It reads their disks without
/// booting them, if possible. Times and vimg's own files are not compared.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An image, or one of its layers
    #[arg(value_name = "IMAGE[@LAYER]")]
    from: String,
    /// The image or layer to compare it with
    #[arg(value_name = "IMAGE[@LAYER]", required_unless_present = "residue")]
    to: Option<String>,
    /// Show what reverted layers left behind, by comparing with a clean rebuild
    #[arg(long, conflicts_with = "to")]
    residue: bool,
    #[command(flatten)]
    how: How,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let image = args.from.as_str();
    let partial = project::only([&args.from].into_iter().chain(&args.to));
    let mut loaded = project::open(global)?.compile(global, &partial, args.residue.then_some(image))?;
    let graph = project::graph(&mut loaded)?;
    let to = project::machine(&graph, image)?;
    let states = match &args.to {
        Some(other) => [to, project::machine(&graph, other)?],
        None if graph.image(image).is_none() => {
            return Err(Error::Message(format!("`{image}` is not an image"), None, 2));
        }
        None => [project::machine(&graph, &vimg_lang::rebuilt_name(image))?, to],
    };
    let Made { context, sources } = build::states(loaded, graph, &states, &args.how, style, None)?;
    let compared = interruptible(execute::compare(&context, states))?.ok_or_else(stopped)?;
    let comparison = compared.map_err(|failure| Error::Build(Box::new(sources), vec![*failure]))?;
    if style.json { print_json(&json!(comparison)) } else { print(&text(&comparison)) }
}

fn text(comparison: &Comparison) -> String {
    let Comparison { files, packages, units } = comparison;
    let mut out = String::new();
    for (name, changes) in [("files", files), ("packages", packages), ("units", units)] {
        for change in changes {
            out.push_str(&line(name, change));
        }
    }
    if out.is_empty() { "no difference\n".into() } else { out }
}

/// Formats a line: a sign, the kind of thing, its name and how it differs.
fn line(of: &str, change: &Change) -> String {
    let of = of.trim_end_matches('s');
    let (sign, how) = match &change.how {
        execute::How::Added(what) => ('+', what.clone()),
        execute::How::Removed(what) => ('-', what.clone()),
        execute::How::Changed(properties) => {
            let text = |(name, from, to): &(&str, String, String)| match (from.as_str(), to.as_str()) {
                ("", "") => (*name).to_owned(),
                ("", to) => format!("{name} {to}"),
                (from, "") => format!("no {name} {from}"),
                (from, to) => format!("{name} {from} -> {to}"),
            };
            ('~', properties.iter().map(text).collect::<Vec<_>>().join(", "))
        }
    };
    // Most files are regular ones, so the word `file` is not repeated.
    let how = if of == how { String::new() } else { format!("  {how}") };
    format!("{sign} {of:7}  {}{how}\n", change.name)
}
