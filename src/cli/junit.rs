//! Results of checks as JUnit XML, for CI systems.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use quick_xml::escape::escape;
use vimg_lang::Sources;

use crate::event::{Event, Sink, plain};
use crate::execute::Failure;
use crate::graph::Graph;
use crate::report::rfc3339;
use crate::store::Store;

/// How long the nodes of a build took, in seconds. A failed check has no record
/// that says it.
#[derive(Default)]
pub(super) struct Times {
    begun: Mutex<HashMap<String, Instant>>,
    took: Mutex<HashMap<String, f64>>,
}

impl Times {
    /// Returns a sink that measures nodes, and passes events on to `sink`.
    pub(super) fn measuring(self: &Arc<Self>, sink: Sink) -> Sink {
        let times = self.clone();
        Arc::new(move |event| {
            let lock = |map: &Mutex<HashMap<String, f64>>, node: &String, seconds| {
                map.lock().unwrap_or_else(PoisonError::into_inner).insert(node.clone(), seconds);
            };
            let mut begun = times.begun.lock().unwrap_or_else(PoisonError::into_inner);
            match &event {
                Event::Started { node, .. } => {
                    begun.insert(node.clone(), Instant::now());
                }
                Event::Failed { node, .. } => {
                    let since = begun.remove(node).map_or(0.0, |begun| begun.elapsed().as_secs_f64());
                    lock(&times.took, node, since);
                }
                Event::Built { node, seconds, .. } => lock(&times.took, node, *seconds),
                _ => {}
            }
            drop(begun);
            sink(event);
        })
    }

    fn of(&self, node: &str) -> Option<f64> {
        self.took.lock().unwrap_or_else(PoisonError::into_inner).get(node).copied()
    }
}

/// Formats the results of the checks of `images`, with one test suite per image.
/// The repository `testmoapp/junitxml` on GitHub describes the format.
pub(super) fn report(
    graph: &Graph,
    sources: &Sources,
    images: &[String],
    store: &Store,
    failures: &[Failure],
    times: &Times,
) -> String {
    let mut out = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"vimg\">\n".to_owned();
    let now = rfc3339(SystemTime::now());
    for image in images {
        let (mut cases, mut failed, mut skipped, mut all) = (String::new(), 0, 0, 0.0);
        for id in graph.checks(image) {
            let node = graph.node(*id);
            let name = node.name.split_once(":check/").map_or(node.name.as_str(), |(_, name)| name);
            let record = store.record(&node.key);
            let seconds = times.of(&node.name).or(record.as_ref().map(|r| r.seconds)).unwrap_or_default();
            all += seconds;
            cases.push_str(&format!(
                "    <testcase classname=\"{}\" name=\"{}\" time=\"{seconds:.3}\" file=\"{}\" line=\"{}\"",
                escape(image),
                escape(name),
                escape(sources.get(node.span.source).name.as_str()),
                sources.position(node.span).0
            ));
            let result = match (record, failures.iter().find(|f| f.node == node.name)) {
                (Some(_), _) => String::new(),
                (None, Some(failure)) => {
                    failed += 1;
                    format!(
                        "<failure message=\"{}\">{}</failure>",
                        escape(legal(&failure.message)),
                        escape(failure.tail.iter().map(|l| legal(l) + "\n").collect::<String>())
                    )
                }
                (None, None) => {
                    skipped += 1;
                    "<skipped message=\"the check did not run\"/>".to_owned()
                }
            };
            match result.as_str() {
                "" => cases.push_str("/>\n"),
                result => cases.push_str(&format!(">{result}</testcase>\n")),
            }
        }
        out.push_str(&format!(
            "  <testsuite name=\"{}\" timestamp=\"{now}\" time=\"{all:.3}\" tests=\"{}\" failures=\"{failed}\" \
             skipped=\"{skipped}\">\n{cases}  </testsuite>\n",
            escape(image.as_str()),
            graph.checks(image).len()
        ));
    }
    out + "</testsuites>\n"
}

/// Replaces characters that XML 1.0 does not allow.
fn legal(text: &str) -> String {
    plain(text).replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute::FailureKind;

    const RECIPE: &str = "image \"it\" {
    bootstrap \"debian\" suite=\"bookworm\"
    check \"fast\" { port 1 }
    check \"slow\" { port 2 }
}
";

    #[test]
    fn a_failed_check_has_its_time_and_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let graph = Graph::of(dir.path(), RECIPE);
        let store = Store::open(&dir.path().join("store")).unwrap();
        let mut sources = Sources::default();
        sources.add("main.vimg", RECIPE);
        let times = Arc::new(Times::default());
        let sink = times.measuring(Arc::new(|_| {}));
        let node = "it:check/slow".to_owned();
        sink(Event::Started { node: node.clone(), key: String::new(), reason: String::new() });
        std::thread::sleep(std::time::Duration::from_millis(20));
        sink(Event::Failed { node: node.clone(), message: String::new() });
        let span = graph.node(graph.find(&node).unwrap()).span;
        let failure = Failure {
            node,
            span,
            kind: FailureKind::Recipe,
            message: "port 2: <refused>".into(),
            related: None,
            help: None,
            tail: vec!["last".into()],
            log: None,
        };
        let text = report(&graph, &sources, &["it".to_owned()], &store, &[failure], &times);
        assert!(text.ends_with("</testsuites>\n"), "{text}");
        assert!(text.contains("tests=\"2\" failures=\"1\" skipped=\"1\""), "{text}");
        let case = text.lines().find(|line| line.contains("name=\"slow\"")).unwrap();
        assert!(
            case.contains("file=\"main.vimg\" line=\"4\"><failure message=\"port 2: &lt;refused&gt;\""),
            "{text}"
        );
        let time = case.split("time=\"").nth(1).unwrap().split('"').next().unwrap();
        assert!(time.parse::<f64>().unwrap() > 0.0, "{text}");
    }
}
