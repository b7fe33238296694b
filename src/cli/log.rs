//! `vimg log`

use super::{Error, Global, Outcome, print, project};
use crate::execute::read_log;

/// Print what a layer's programs printed
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An image, for its last layer, or one of its layers
    #[arg(value_name = "IMAGE[@LAYER]")]
    node: String,
}

pub(super) fn run(args: &Args, global: &Global) -> Outcome {
    let mut loaded = project::load(global)?;
    let graph = project::graph(&mut loaded)?;
    let id = project::node(&graph, &args.node)?;
    let node = graph.node(id);
    project::keep_stamps(&loaded.notes, loaded.project);
    let made = loaded.store.state_dir(&node.key).join("log.zst");
    let failed = loaded.notes.failed_log(&node.name);
    // A layer that is there has the log of its making; one that is not, that
    // of its last failure.
    for path in [made, failed] {
        if path.exists() {
            let text = read_log(&path).map_err(|e| Error::host(format!("{}: {e}", path.display())))?;
            return print(&text);
        }
    }
    let help = "layers have logs once they were built or failed; `vimg build` builds them".to_owned();
    Err(Error::Message(format!("there is no log of {}", node.name), Some(help), 1))
}
