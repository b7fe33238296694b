//! Results of checks as JUnit XML, for CI systems.

use quick_xml::escape::escape;

use crate::event::plain;
use crate::execute::Failure;
use crate::graph::Graph;
use crate::store::Store;

/// Formats the results of the checks of `images`, with one test suite per image.
/// The repository `testmoapp/junitxml` on GitHub describes the format.
pub(super) fn report(graph: &Graph, images: &[String], store: &Store, failures: &[Failure]) -> String {
    let mut out = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"vimg\">\n".to_owned();
    for image in images {
        let (mut cases, mut failed, mut skipped) = (String::new(), 0, 0);
        for id in graph.checks(image) {
            let node = graph.node(*id);
            let name = node.name.split_once(":check/").map_or(node.name.as_str(), |(_, name)| name);
            let record = store.record(&node.key);
            let seconds = record.as_ref().map_or(0.0, |r| r.seconds);
            cases.push_str(&format!(
                "    <testcase classname=\"{}\" name=\"{}\" time=\"{seconds:.3}\"",
                escape(image),
                escape(name)
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
            "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{failed}\" skipped=\"{skipped}\">\n{cases}  \
             </testsuite>\n",
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
