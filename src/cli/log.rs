//! `vimg log`

use std::path::Path;

use super::global::Global;
use super::output::{Error, Outcome, note, print_foreign};
use super::project;
use crate::execute::read_log;
use crate::graph::Work;
use crate::report::Style;

/// Print the log of a layer: what its programs printed
///
/// If the layer has changed since it was built, vimg prints the log of its last
/// build, and says so.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A layer, or an image for its last layer
    #[arg(value_name = "IMAGE[@LAYER]")]
    node: String,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::structure([&args.node]))?;
    let graph = project::graph(&mut loaded)?;
    let id = project::node(&graph, &args.node)?;
    let node = graph.node(id);
    project::keep_stamps(&loaded.notes, loaded.project);
    let state = loaded.store.state_dir(&node.key);
    let made = state.join("log.zst");
    let failed = loaded.notes.failed_log(&node.name);
    let before = loaded.notes.nodes().get(&node.name).filter(|key| **key != node.key).copied();
    let before = before.map(|key| loaded.store.state_dir(&key).join("log.zst"));
    // A built layer has the log of its build; any other has that of its last
    // failure, or of its last build.
    for path in [Some(&made), Some(&failed), before.as_ref()].into_iter().flatten() {
        if path.exists() {
            if Some(path) == before.as_ref() {
                let name = &node.name;
                let text = match loaded.model.open.is_empty() {
                    true => format!("{name} has changed since its last build, whose log this is"),
                    // Without values it is unknown whether it has changed.
                    false => format!("this is the log of the last build of {name}"),
                };
                note(text, style);
            }
            let (text, broken) = read_log(path).map_err(|e| damaged(&node.name, path, &e))?;
            print_foreign(&text)?;
            return match broken {
                Some(why) => Err(damaged(&node.name, path, &why)),
                None => Ok(()),
            };
        }
    }
    if !matches!(node.work, Work::Layer(_) | Work::Seal { .. } | Work::Check(_)) {
        let help = "layers and checks have logs; `vimg build --verbose` prints what a bootstrap prints";
        let message = format!("{} has no log", node.name);
        return Err(Error::Message(message, Some(help.to_owned()), 1));
    }
    if state.exists() {
        let message = format!("the log of {} is missing from the store", node.name);
        let help = format!(
            "the image is not affected; to rebuild the layer with its log: rm -r {}",
            state.display()
        );
        return Err(Error::Message(message, Some(help), 1));
    }
    let failed = graph.chain(id).into_iter().map(|id| &graph.node(id).name);
    let help = match failed.into_iter().find(|name| loaded.notes.failed_log(name).exists()) {
        Some(name) => format!("a layer below it failed: vimg log {name}"),
        None => "a layer has a log once it was built or failed; `vimg build` builds it".to_owned(),
    };
    Err(Error::Message(format!("there is no log of {}", node.name), Some(help), 1))
}

/// Creates the error for a log that is shorter than its layer's output.
fn damaged(node: &str, path: &Path, why: &std::io::Error) -> Error {
    let message = format!("the log of {node} ends here: {} is damaged ({why})", path.display());
    let help = "the image is not affected; a killed build also leaves a log like this".to_owned();
    Error::Message(message, Some(help), 1)
}
