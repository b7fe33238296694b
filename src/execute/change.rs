//! Changes a running server to match its recipe: reverts and applies parts,
//! then runs their checks in the server.

use std::collections::VecDeque;
use std::sync::Arc;

use vimg_agent::protocol::Apply;
use vimg_lang::Span;

use super::explain::explain;
use super::failure::{Failure, FailureKind};
use super::guest::{Guest, Stopped};
use super::layer::{Staged, stage_blobs};
use super::log::clean;
use super::node::NodeContext;
use super::session::{Progress, SessionError};
use crate::graph::{CheckWork, Difference, LayerWork, ServerPart, ServerPlan, ServerWork};
use crate::provider::{Instance, Provider};
use crate::store::Staging;

/// The most lines of output that are shown for a failed step.
pub(super) const TAIL: usize = 20;

/// A prepared change: all files that it needs are read.
pub(super) struct Change {
    work: Arc<LayerWork>,
    checks: CheckWork,
    after: Vec<ServerPart>,
    blobs: Staged,
    _staging: Staging,
}

/// Prepares the change that a difference asks for, and reads all its files.
pub(super) async fn prepare<P: Provider>(
    site: &NodeContext<'_, P>,
    plan: &ServerPlan,
    difference: &Difference,
) -> Result<Change, Box<Failure>> {
    let work = plan.work(difference, &site.shared.project).map_err(|errors| {
        let why = errors.first().map(|e| e.error.to_string());
        at(plan, FailureKind::Recipe, why.unwrap_or_default())
    })?;
    let ServerWork { layer: work, checks, after } = work;
    let (work, staging) = (Arc::new(work), site.staging()?);
    let blobs = stage_blobs(site, &work, &staging).await?;
    Ok(Change { work, checks, after, blobs, _staging: staging })
}

/// Applies a change, if it has any steps, and runs its checks. Returns the
/// parts that are in effect then.
pub(super) async fn make<P: Provider>(
    site: &NodeContext<'_, P>,
    plan: &ServerPlan,
    change: Change,
    guest: &mut Guest<P::Instance>,
) -> Result<Vec<ServerPart>, Box<Failure>> {
    let Change { work, checks, after, blobs, _staging } = change;
    if work.steps.is_empty() {
        return Ok(after);
    }
    let mut told = Told { site, places: &work.places, tail: VecDeque::new() };
    let (layer, steps) = (work.layer.clone(), work.steps.clone());
    let way_out = guest.instance.way_out();
    let host = way_out.host.clone();
    let what = Apply { layer, steps, from: 0, offline: false, durable: true, host };
    let mut hear = |progress: Progress<'_>| told.hear(progress);
    match guest.ask(async |session| session.apply(&what, &blobs, &way_out, &mut hear).await).await {
        Ok(applied) if applied.next.is_none() => {}
        Ok(_) => {
            return Err(at(
                plan,
                FailureKind::Recipe,
                "a layer with a `reboot` step can't be applied to a server".into(),
            ));
        }
        Err(stopped) => return Err(told.failure(plan, &mut guest.instance, stopped).await),
    }
    // The checks run in the server itself, not in a fork: the change must work
    // there.
    let mut told = Told { site, places: &checks.places, tail: VecDeque::new() };
    let mut hear = |progress: Progress<'_>| told.hear(progress);
    let variables = &way_out.variables;
    match guest.ask(async |session| session.check(&checks.probes, variables, &mut hear).await).await {
        Ok(()) => Ok(after),
        Err(stopped) => Err(told.failure(plan, &mut guest.instance, stopped).await),
    }
}

/// Sends the output of steps as events, and keeps its last lines.
struct Told<'a, P> {
    site: &'a NodeContext<'a, P>,
    places: &'a [(Span, String)],
    tail: VecDeque<String>,
}

impl<P: Provider> Told<'_, P> {
    fn hear(&mut self, progress: Progress) {
        match progress {
            Progress::Started(step) => {
                self.tail.clear();
                self.site.phase(&self.places[step].1);
            }
            Progress::Output(text) => {
                for line in text.lines().map(clean) {
                    self.site.line(&line);
                    self.tail.push_back(line);
                }
                self.tail.drain(..self.tail.len().saturating_sub(TAIL));
            }
            Progress::Finished { .. } => {}
        }
    }

    async fn failure(self, plan: &ServerPlan, instance: &mut P::Instance, trouble: Stopped) -> Box<Failure> {
        let tail = Vec::from(self.tail);
        match trouble {
            Stopped::Session(SessionError::Step { step, message, .. }) => {
                let (span, name) = &self.places[step];
                let message = format!("{name} failed: {}", clean(&message));
                let mut failure = Failure::new(&plan.name, *span, FailureKind::Recipe, message);
                failure.tail = tail;
                Box::new(failure)
            }
            trouble => explain(self.site, instance, trouble, Some(tail)).await,
        }
    }
}

/// Makes a failure of a server that no step has caused.
pub(super) fn at(plan: &ServerPlan, kind: FailureKind, why: String) -> Box<Failure> {
    Box::new(Failure::new(&plan.name, plan.span, kind, format!("server `{}`: {why}", plan.name)))
}
