//! Changes a running server to match its recipe: reverts and applies parts,
//! then runs their checks in the server.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use vimg_agent::protocol::Apply;
use vimg_lang::Span;

use super::context::BuildContext;
use super::explain::explain;
use super::failure::{Failure, placed};
use super::guest::{Guest, Stopped};
use super::inputs::Inputs;
use super::layer::{Staged, stage_blobs};
use super::log::clean;
use super::node::NodeContext;
use super::node_failure::{FailureKind, NodeFailure};
use super::project_inputs::ProjectInputs;
use super::session::{Progress, SessionError};
use crate::graph::{CheckWork, Difference, LayerOrder, LayerWork, ServerPart, ServerPlan, ServerWork};
use crate::provider::{Instance, Provider};
use crate::store::Staging;

/// The most lines of output that are shown for a failed step.
pub(super) const TAIL: usize = 20;

/// A server, and the context of its image.
pub(super) struct ServerContext<'a, P> {
    pub(super) site: NodeContext<'a, P>,
    pub(super) context: &'a BuildContext<P>,
    pub(super) plan: &'a ServerPlan,
}

impl<P> ServerContext<'_, P> {
    /// Makes a failure of the server that no step has caused.
    pub(super) fn failure(&self, kind: FailureKind, why: &str) -> Box<Failure> {
        let name = &self.plan.name;
        Box::new(Failure::at(self.plan.span, NodeFailure::new(name, kind, format!("server `{name}`: {why}"))))
    }

    /// Makes a failure of the host.
    pub(super) fn host(&self, why: String) -> Box<Failure> {
        self.failure(FailureKind::Host, &why)
    }

    /// Finds the place of a failure of the image's node: that of the server, if
    /// no step has failed.
    pub(super) fn placed(&self, failure: NodeFailure) -> Box<Failure> {
        let step = failure.step;
        let mut failure = placed(&self.context.graph, self.plan.image, failure);
        if step.is_none() {
            failure.span = self.plan.span;
        }
        failure
    }

    /// Makes the failure for a file of the server.
    pub(super) fn io_failure(&self, path: &Path, error: std::io::Error) -> Box<Failure> {
        self.placed(*self.site.io_failure(path, error))
    }
}

/// A prepared change: all files that it needs are read.
pub(super) struct Change {
    work: LayerWork,
    checks: CheckWork,
    after: Vec<ServerPart>,
    blobs: Staged,
    _staging: Staging,
}

/// Prepares the change that a difference asks for, and reads all its files.
pub(super) async fn prepare<P: Provider>(
    server: &ServerContext<'_, P>,
    difference: &Difference,
) -> Result<Change, Box<Failure>> {
    let context = server.context;
    let work = server.plan.work(difference, &context.project).map_err(|errors| {
        let why = errors.first().map(|e| e.error.to_string());
        server.failure(FailureKind::Recipe, &why.unwrap_or_default())
    })?;
    let ServerWork { layer: work, checks, after } = work;
    let staging = server.site.staging().map_err(|e| server.placed(*e))?;
    let inputs = ProjectInputs::new(context.project.clone(), context.secrets.clone(), std::iter::once(&work));
    let (inputs, digests): (Arc<dyn Inputs>, _) = (Arc::new(inputs), work.blobs.keys().copied().collect());
    let blobs = stage_blobs(&server.site, &inputs, &work.order, digests, &staging).await;
    let blobs = blobs.map_err(|failure| match failure.step.and_then(|step| work.spans.get(step)) {
        Some(span) => Box::new(Failure::at(*span, *failure)),
        None => server.placed(*failure),
    })?;
    Ok(Change { work, checks, after, blobs, _staging: staging })
}

/// Applies a change, if it has any steps, and runs its checks. Returns the
/// parts that are in effect then.
pub(super) async fn make<P: Provider>(
    server: &ServerContext<'_, P>,
    change: Change,
    guest: &mut Guest<P::Instance>,
) -> Result<Vec<ServerPart>, Box<Failure>> {
    let Change { work, checks, after, blobs, _staging } = change;
    let LayerOrder { layer, steps, labels, .. } = work.order;
    if steps.is_empty() {
        return Ok(after);
    }
    let mut told = Told { server, spans: &work.spans, labels: &labels, tail: VecDeque::new() };
    let way_out = guest.instance.way_out();
    let host = way_out.host.clone();
    let what = Apply { layer, steps, from: 0, offline: false, durable: true, host };
    let mut hear = |progress: Progress<'_>| told.hear(progress);
    match guest.ask(async |session| session.apply(&what, &blobs, &way_out, &mut hear).await).await {
        Ok(applied) if applied.next.is_none() => {}
        Ok(_) => {
            let why = "a layer with a `reboot` step can't be applied to a server";
            return Err(server.failure(FailureKind::Recipe, why));
        }
        Err(stopped) => return Err(told.failure(&mut guest.instance, stopped).await),
    }
    // The checks run in the server itself, not in a fork: the change must work
    // there.
    let mut told = Told { server, spans: &checks.spans, labels: &checks.order.labels, tail: VecDeque::new() };
    let mut hear = |progress: Progress<'_>| told.hear(progress);
    let variables = &way_out.variables;
    match guest.ask(async |session| session.check(&checks.order.probes, variables, &mut hear).await).await {
        Ok(()) => Ok(after),
        Err(stopped) => Err(told.failure(&mut guest.instance, stopped).await),
    }
}

/// Sends the output of steps as events, and keeps its last lines.
struct Told<'a, P> {
    server: &'a ServerContext<'a, P>,
    spans: &'a [Span],
    labels: &'a [String],
    tail: VecDeque<String>,
}

impl<P: Provider> Told<'_, P> {
    fn hear(&mut self, progress: Progress) {
        match progress {
            Progress::Started(step) => {
                self.tail.clear();
                self.server.site.phase(&self.labels[step]);
            }
            Progress::Output(text) => {
                for line in text.lines().map(clean) {
                    self.server.site.line(&line);
                    self.tail.push_back(line);
                }
                self.tail.drain(..self.tail.len().saturating_sub(TAIL));
            }
            Progress::Finished { .. } => {}
        }
    }

    async fn failure(self, instance: &mut P::Instance, trouble: Stopped) -> Box<Failure> {
        let tail = Vec::from(self.tail);
        match trouble {
            Stopped::Session(SessionError::Step { step, message, .. }) => {
                let (span, name) = (&self.spans[step], &self.labels[step]);
                let message = format!("{name} failed: {}", clean(&message));
                let failure = NodeFailure::new(&self.server.plan.name, FailureKind::Recipe, message);
                Box::new(Failure::at(*span, NodeFailure { tail, ..failure }))
            }
            trouble => {
                let failure = explain(&self.server.site, instance, trouble, Some(tail)).await;
                self.server.placed(*failure)
            }
        }
    }
}
