//! Compares the disks of two states, without a boot if possible.

use std::collections::BTreeMap;

use serde::Serialize;
use vimg_agent::protocol::{Digest, Kind, Listed};

use super::context::BuildContext;
use super::explain::explain;
use super::failure::{Failure, placed};
use super::guest::Stopped;
use super::node::NodeContext;
use super::node_failure::{FailureKind, NodeFailure};
use super::order::NodeOrder;
use super::session::SessionError;
use super::up::{self, StartOptions, Started};
use super::worker::Worker;
use crate::graph::{Graph, Needs, NodeId, Work};
use crate::provider::Provider;
use crate::store::{DiskKind, Staging};

/// How many digests one request asks for.
const AT_ONCE: usize = 1000;

/// The agent's own files, which are not compared.
const OWN: &str = "/var/lib/vimg";

/// The directory of the links that say what starts at boot.
const UNITS: &str = "/etc/systemd/system/";

/// The differences between two states.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// By path.
    pub files: Vec<Change>,
    /// By name and architecture.
    pub packages: Vec<Change>,
    /// Units that start at boot, with the unit that starts them:
    /// `nginx.service` in `multi-user.target.wants`.
    pub units: Vec<Change>,
}

/// A difference in one file, package or unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The path or name.
    pub name: String,
    /// How it differs.
    pub how: How,
}

/// How a file, package or unit differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// It is only in the second.
    Added(String),
    /// It is only in the first.
    Removed(String),
    /// These of its properties have other values: name, before, after.
    Changed(Vec<(&'static str, String, String)>),
}

/// Compares two existing states.
pub async fn compare<P: Provider>(
    context: &BuildContext<P>,
    states: [NodeId; 2],
) -> Result<Comparison, Box<Failure>> {
    let [a, b] = states.map(|id| context.graph.node(id));
    if a.key == b.key {
        return Ok(Comparison::default());
    }
    let worker = context.worker();
    let orders = states.map(|id| NodeOrder::new(&context.graph, id, &BTreeMap::new()));
    let (mut first, mut second) = tokio::try_join!(
        Reader::open(context, &worker, &orders[0], states[0]),
        Reader::open(context, &worker, &orders[1], states[1])
    )?;
    let ((packages_a, files_a), (packages_b, files_b)) = tokio::try_join!(first.list(), second.list())?;
    // Read only files that may differ. On two disks with the same base, files
    // with equal inode numbers and times are identical.
    let root = |id: NodeId| context.graph.node(context.graph.chain(id)[0]).key;
    let kin = root(states[0]) == root(states[1]);
    let open: Vec<String> = files_a
        .iter()
        .filter(|(path, a)| {
            files_b.get(*path).is_some_and(|b| {
                a.kind == Kind::File
                    && b.kind == Kind::File
                    && a.size == b.size
                    && !(kin && a.stamp == b.stamp)
            })
        })
        .map(|(path, _)| path.clone())
        .collect();
    let (digests_a, digests_b) = tokio::try_join!(first.digests(&open), second.digests(&open))?;
    let contents: BTreeMap<&String, bool> =
        open.iter().zip(digests_a.iter().zip(&digests_b)).map(|(path, (a, b))| (path, a != b)).collect();
    first.close().await;
    second.close().await;
    let mut units = Vec::new();
    let mut files = Vec::new();
    differences(&files_a, &files_b, file_name, |path, a, b| properties(path, a, b, &contents), &mut files);
    let (units_a, units_b) = (enabled(&files_a), enabled(&files_b));
    differences(&units_a, &units_b, String::clone, |_, _, _| Vec::new(), &mut units);
    let mut packages = Vec::new();
    let changed = |_: &String, a: &String, b: &String| {
        let words = |text: &String| {
            let (version, how) = text.split_once(' ').unwrap_or((text, ""));
            (version.to_owned(), how.to_owned())
        };
        let ((version_a, how_a), (version_b, how_b)) = (words(a), words(b));
        let all = [("version", version_a, version_b), ("installed", how_a, how_b)];
        all.into_iter().filter(|(_, a, b)| a != b).collect()
    };
    differences(&packages_a, &packages_b, |p| version(p), changed, &mut packages);
    Ok(Comparison { files, packages, units })
}

/// Adds the differences between two maps to `out`.
fn differences<T>(
    a: &BTreeMap<String, T>,
    b: &BTreeMap<String, T>,
    describe: impl Fn(&T) -> String,
    properties: impl Fn(&String, &T, &T) -> Vec<(&'static str, String, String)>,
    out: &mut Vec<Change>,
) {
    let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for name in names {
        let how = match (a.get(name), b.get(name)) {
            (Some(a), None) => How::Removed(describe(a)),
            (None, Some(b)) => How::Added(describe(b)),
            (Some(a), Some(b)) => match properties(name, a, b) {
                changed if changed.is_empty() => continue,
                changed => How::Changed(changed),
            },
            (None, None) => continue,
        };
        out.push(Change { name: name.clone(), how });
    }
}

fn file_name(listed: &Listed) -> String {
    match &listed.kind {
        Kind::Dir => "directory".into(),
        Kind::File => "file".into(),
        Kind::Link(target) => format!("link to {target}"),
        Kind::Other(what) => what.clone(),
    }
}

fn version(package: &str) -> String {
    package.split(' ').next().unwrap_or_default().to_owned()
}

/// Returns how two files of one path differ. Does not compare times, because a
/// file that was reverted and created again has others.
fn properties(
    path: &String,
    a: &Listed,
    b: &Listed,
    contents: &BTreeMap<&String, bool>,
) -> Vec<(&'static str, String, String)> {
    let mut all = Vec::new();
    if a.kind != b.kind {
        all.push(("kind", file_name(a), file_name(b)));
    }
    if a.size != b.size {
        all.push(("size", a.size.to_string(), b.size.to_string()));
    } else if contents.get(path) == Some(&true) {
        all.push(("content", String::new(), String::new()));
    }
    if a.mode != b.mode {
        all.push(("mode", format!("{:04o}", a.mode), format!("{:04o}", b.mode)));
    }
    if a.owner != b.owner {
        let owner = |l: &Listed| format!("{}:{}", l.owner.0, l.owner.1);
        all.push(("owner", owner(a), owner(b)));
    }
    if a.attributes != b.attributes {
        let names = |l: &Listed| l.attributes.keys().cloned().collect::<Vec<_>>().join(" ");
        all.push(("attributes", names(a), names(b)));
    }
    all
}

/// Returns the units that links start at boot, with the unit that starts each.
fn enabled(files: &BTreeMap<String, Listed>) -> BTreeMap<String, String> {
    let units = files.iter().filter_map(|(path, listed)| {
        let (by, unit) = path.strip_prefix(UNITS)?.split_once('/')?;
        let by = by.strip_suffix(".wants").or_else(|| by.strip_suffix(".requires"))?;
        matches!(listed.kind, Kind::Link(_)).then(|| (unit.to_owned(), format!("by {by}")))
    });
    units.collect()
}

/// An instance that reads the disk of a state.
struct Reader<'a, P: Provider> {
    graph: &'a Graph,
    id: NodeId,
    site: NodeContext<'a, P>,
    up: Started<P::Instance>,
    _scratch: Staging,
}

/// Packages and files.
type Lists = (BTreeMap<String, String>, BTreeMap<String, Listed>);

impl<'a, P: Provider> Reader<'a, P> {
    async fn open(
        context: &'a BuildContext<P>,
        worker: &'a Worker<P>,
        node: &'a NodeOrder,
        id: NodeId,
    ) -> Result<Self, Box<Failure>> {
        let (graph, site) = (&*context.graph, NodeContext { worker, node });
        let at = |failure: Box<NodeFailure>| placed(graph, id, *failure);
        let scratch = site.staging().map_err(at)?;
        let overlay = scratch.path().join(DiskKind::Qcow2.file_name());
        // An imported disk has no kernel for an appliance.
        let chain = graph.chain(id);
        let imported = matches!(graph.node(chain[0]).work, Work::Import { .. });
        let needs = if imported { Needs::Machine } else { Needs::Disk };
        let options = StartOptions { needs, ..StartOptions::of_disk(node) };
        let up = up::up(&site, &options, scratch.path(), &overlay).await.map_err(at)?;
        Ok(Self { graph, id, site, up, _scratch: scratch })
    }

    async fn list(&mut self) -> Result<Lists, Box<Failure>> {
        let listed = self.up.guest.ask(async |session| session.list().await).await;
        let (packages, files) = self.explained(listed).await?;
        let packages = packages
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, rest)| (name.to_owned(), rest.to_owned()))
            .collect();
        let own = |path: &str| path == OWN || path.starts_with(&format!("{OWN}/"));
        let files = files.into_iter().filter(|l| !own(&l.path)).map(|l| (l.path.clone(), l)).collect();
        Ok((packages, files))
    }

    async fn digests(&mut self, paths: &[String]) -> Result<Vec<Option<Digest>>, Box<Failure>> {
        let mut all = Vec::with_capacity(paths.len());
        for paths in paths.chunks(AT_ONCE) {
            let digests = self.up.guest.ask(async |session| session.digests(paths).await).await;
            all.extend(self.explained(digests).await?);
        }
        Ok(all)
    }

    async fn explained<T>(&mut self, result: Result<T, Stopped>) -> Result<T, Box<Failure>> {
        let failure = match result {
            Ok(result) => return Ok(result),
            Err(Stopped::Session(SessionError::Refused(why))) => self.site.failure(FailureKind::Host, why),
            Err(trouble) => explain(&self.site, &mut self.up.guest.instance, trouble, None).await,
        };
        Err(placed(self.graph, self.id, *failure))
    }

    async fn close(self) {
        self.up.guest.stop().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(path: &str, kind: Kind, mode: u32) -> (String, Listed) {
        let listed = Listed {
            path: path.into(),
            kind,
            mode,
            owner: (0, 0),
            size: 0,
            attributes: BTreeMap::new(),
            stamp: (0, 0, 0),
        };
        (path.to_owned(), listed)
    }

    #[test]
    fn each_difference_is_named() {
        let wants = "/etc/systemd/system/multi-user.target.wants/a.service";
        let a = BTreeMap::from([
            listed("/both", Kind::File, 0o644),
            listed("/content", Kind::File, 0o644),
            listed("/gone", Kind::Dir, 0o755),
            listed("/same", Kind::File, 0o644),
        ]);
        let b = BTreeMap::from([
            listed("/both", Kind::Link("x".into()), 0o777),
            listed("/content", Kind::File, 0o644),
            listed("/same", Kind::File, 0o644),
            listed(wants, Kind::Link("x".into()), 0o777),
        ]);
        let path = "/content".to_owned();
        let contents = BTreeMap::from([(&path, true)]);
        let mut out = Vec::new();
        differences(&a, &b, file_name, |path, a, b| properties(path, a, b, &contents), &mut out);
        let text = |s: &str| s.to_owned();
        let kind = ("kind", text("file"), text("link to x"));
        let mode = ("mode", text("0644"), text("0777"));
        let expected = [
            ("/both", How::Changed(vec![kind, mode])),
            ("/content", How::Changed(vec![("content", String::new(), String::new())])),
            (wants, How::Added("link to x".into())),
            ("/gone", How::Removed("directory".into())),
        ];
        let expected = expected.map(|(name, how)| Change { name: name.into(), how });
        assert_eq!(out, expected);
        assert_eq!(enabled(&b), BTreeMap::from([("a.service".into(), "by multi-user.target".into())]));
    }
}
