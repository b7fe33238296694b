//! Gets a fork up for checks while the layer below them is still made: of the
//! machine that will most likely do, carried over once it is known what the
//! layer has changed. What fails of that is made up for by the usual way.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::Shared;
use super::session::{Session, SessionError};
use super::site::Site;
use super::up::{self, Channel, Stand, Up};
use crate::graph::{Node, NodeId};
use crate::provider::{Instance, Provider};
use crate::store::{Disk, DiskKind, Staging};

/// How long a fork may have waited. A new one is made in much less, and what
/// goes on in a machine that waits is nobody's boot.
const AGE: Duration = Duration::from_secs(30);

/// How long it is waited for by who needs it now.
const PATIENCE: Duration = Duration::from_secs(10);

/// A fork that comes up. Dropped, it is gone.
pub(super) struct Coming<P: Provider>(JoinSet<Option<Ahead<P>>>);

impl<P: Provider> Coming<P> {
    /// Begins to fork a machine for a check whose image is not there yet.
    pub(super) fn begin(shared: Arc<Shared<P>>, check: NodeId) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { fork(&shared, check).await });
        Self(tasks)
    }

    /// Waits until it is up.
    pub(super) async fn up(mut self) -> Option<Ahead<P>> {
        let up = tokio::time::timeout(PATIENCE, self.0.join_next()).await.ok()??;
        up.ok().flatten().filter(|ahead| ahead.since.elapsed() < AGE)
    }
}

/// A fork that is a machine of its own, on the disk of another.
pub(super) struct Ahead<P: Provider> {
    instance: P::Instance,
    session: Session<Channel<P>>,
    /// Where its files are.
    scratch: Staging,
    since: Instant,
}

async fn fork<P: Provider>(shared: &Shared<P>, check: NodeId) -> Option<Ahead<P>> {
    let node = shared.graph.node(check);
    // What waits holds nothing that a layer may want: a processor only until
    // it is up, and what it takes of memory is little.
    let _job = shared.jobs.acquire().await.ok()?;
    if shared.memory.available_permits() < shared.memory_of(node) as usize {
        return None;
    }
    let below = |node: &Node| node.parent.map(|id| shared.graph.node(id));
    let image = below(node)?;
    let state =
        std::iter::successors(Some(image), |node| below(node)).find(|node| shared.store.has(&node.key))?;
    // What the image was before is what it will be like.
    let before = shared.notes.nodes().get(&image.name).and_then(|key| shared.store.chain(key));
    let stand = Stand { chain: before, ..Stand::of_check(node, state) };
    let site = Site { shared, node };
    let scratch = site.staging().ok()?;
    let (launch, _) = up::prepare(&site, &stand, scratch.path(), &overlay(&scratch)).ok()?;
    let mut instance = shared.provider.ahead(&launch).await?;
    let mut session = Session::new(instance.channel()?);
    session.ready(false).await.ok()?;
    session.wake(true).await.ok()?;
    Some(Ahead { instance, session, scratch, since: Instant::now() })
}

/// Where a fork's writes go.
pub(super) fn overlay(scratch: &Staging) -> std::path::PathBuf {
    scratch.path().join(DiskKind::Qcow2.file_name())
}

/// Why a fork will not do.
pub(super) enum Unfit {
    /// Its boot has read what is otherwise now, as its agent says: neither
    /// will any other.
    Read(String),
    /// Another may do.
    Other,
}

impl<P: Provider> Ahead<P> {
    /// Carries it over to a state that is there now.
    pub(super) async fn adopt(
        self,
        site: &Site<'_, P>,
        stand: &Stand<'_>,
    ) -> Result<(Up<P::Instance>, Staging), Unfit> {
        let Self { instance, mut session, scratch, .. } = self;
        let prepared = up::prepare(site, stand, scratch.path(), Path::new(&overlay(&scratch)));
        let (mut launch, record) = prepared.map_err(|_| Unfit::Other)?;
        let carried = site.shared.provider.carried(&launch, &instance).await.ok_or(Unfit::Other)?;
        match session.carry(&carried.altered, true).await {
            Ok(()) => {}
            Err(SessionError::Refused(why)) => return Err(Unfit::Read(why)),
            Err(_) => return Err(Unfit::Other),
        }
        launch.chain = carried.chain;
        let disk = Disk {
            kind: DiskKind::Qcow2,
            backing: Some((stand.state.key, record.id)),
            depth: record.disk.depth + 1,
        };
        Ok((Up { instance, session, launch, record, disk }, scratch))
    }
}
