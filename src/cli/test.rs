//! `vimg test`

use std::path::PathBuf;

use super::build::{self, Asked, How};
use super::global::Global;
use super::output::Outcome;
use super::project::Extent;
use crate::report::Style;

/// Build images and run their checks; write no outputs
///
/// Checks run in forks of the image's machine, which are thrown away. A check
/// that has passed is not repeated until the image or the check changes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Images to test [default: all that the project declares]
    images: Vec<String>,
    /// Write the results of the checks to a file, as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    #[command(flatten)]
    how: How,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let asked = Asked {
        images: &args.images,
        extent: Extent::Checks,
        dir: None,
        how: &args.how,
        junit: args.junit.as_deref(),
    };
    build::build(&asked, global, style)
}
