//! Faults of machines, shown with machines that are maps.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use vimg::cache::Caches;

use crate::common::Fake;
use crate::{attempt, checkout, scratch};

/// A boot that hangs is repeated once: no layer has begun.
#[test]
fn a_machine_that_hangs_while_it_boots_is_booted_again() {
    let (dir, files) = (scratch(), checkout());
    let (project, store) = (files.path().join("project"), dir.path().join("store"));
    std::fs::create_dir(&project).unwrap();
    let recipe = |content: &str| {
        let recipe = format!(
            "image \"it\" {{\n    bootstrap \"debian\" suite=\"bookworm\"\n    layer \"one\"\n}}\n\
             configuration \"one\" {{\n    needs \"booted\"\n    file \"/one\" content=\"{content}\"\n}}\n"
        );
        std::fs::write(project.join("main.vimg"), recipe).unwrap();
    };
    let hanging = |boots: usize| {
        let fake = Arc::new(Fake { hanging: AtomicUsize::new(boots), ..Fake::default() });
        attempt(&project, &store, &fake, &Caches::default())
    };
    recipe("once");
    let once = hanging(1);
    assert!(once.outcome.failures.is_empty(), "{:?}", once.outcome.failures);
    assert_eq!(
        once.notices.iter().filter(|n| n.contains("vimg boots it again")).count(),
        1,
        "{:?}",
        once.notices
    );
    recipe("twice");
    let twice = hanging(2);
    let [failure] = &twice.outcome.failures[..] else { panic!("{:?}", twice.outcome.failures) };
    assert!(failure.message.contains("the machine hangs"), "{failure:?}");
}
