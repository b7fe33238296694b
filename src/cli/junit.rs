//! What came of checks, as the XML that CI systems read.

use quick_xml::escape::escape;

use crate::event::plain;
use crate::execute::Failure;
use crate::graph::Graph;
use crate::store::Store;

/// A report on the checks of some images: a suite for each. The format is the
/// one that `testmoapp/junitxml` on GitHub describes.
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
                    "<skipped message=\"its image was not built\"/>".to_owned()
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

/// The text without what XML 1.0 has no place for.
fn legal(text: &str) -> String {
    plain(text).replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}")
}
