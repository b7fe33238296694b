//! Early cutoff: rebuilt layers that are identical to the previous ones.

use super::machines::{Project, Tested};

const LAYERS: &str = r#"use "std/debian.vimg"
image "it" {
    from "debian-12"
    layer "below"
    layer "above"
    layer "ran"
    output "raw" path="it.raw"
}
configuration "below" { run "below.sh" }
configuration "above" { run { script "date >/srv/above" } }
configuration "ran" {
    needs "booted"
    run "ran.sh"
    check "ran" { file "/srv/ran" contains="as one" }
}
"#;

#[test]
fn what_is_made_from_a_layer_stays_while_that_holds_the_same() {
    let project = Project::new("same");
    project.write("main.vimg", LAYERS);
    project.write(
        "below.sh",
        "mkdir -p /srv/below\necho one >/srv/below/file\nln -sf file /srv/below/link\n# BELOW\n",
    );
    project.write("ran.sh", "echo as $(cat /srv/below/link) >/srv/ran\n# RAN\n");
    let build = || {
        let built = project.vimg(&["build"]);
        built.succeeds();
        built
    };
    let was_same = |built: &Tested, layer: &str| {
        assert_eq!(built.built(), [layer], "{}", built.stdout);
        assert_eq!(built.all("same")[0]["node"], layer);
        assert_eq!(built.boots(), 0, "{}", built.stdout);
        let again = build();
        assert_eq!((again.built().len(), again.boots()), (0, 0), "{}", again.stdout);
        let plan = project.vimg(&["plan"]);
        assert!(plan.stdout.contains("0 to build"), "{}", plan.stdout);
    };
    build();
    let disk = || std::fs::metadata(project.path("it.raw")).unwrap().modified().unwrap();
    let written = disk();

    // A new comment, and another command with the same result: in an offline
    // layer, and in a booted machine, which writes notes such as a journal.
    project.edit("below.sh", "# BELOW", "# below");
    was_same(&build(), "it@below");
    project.edit("below.sh", "echo one", "printf '%s\\n' one");
    was_same(&build(), "it@below");
    project.edit("ran.sh", "# RAN", "# ran");
    was_same(&build(), "it@ran");
    assert_eq!(disk(), written, "what was written stays");

    // Times that a script sets, modes and contents count as changes.
    let layers = || {
        let built = project.vimg(&["build", "--no-output"]);
        built.succeeds();
        assert!(built.all("same").is_empty(), "{}", built.stdout);
        built.built()
    };
    for (was, is) in [
        ("# ran", "touch -d 2020-01-01 /srv/ran"),
        ("-d 2020-01-01", "-d 2021-01-01"),
        ("touch -d 2021-01-01", "chmod 600"),
        ("chmod 600 /srv/ran", "echo two >>/srv/ran"),
    ] {
        project.edit("ran.sh", was, is);
        assert_eq!(layers(), ["it@ran"]);
    }
    project.edit("below.sh", "ln -sf file", "ln -sf ./file");
    assert_eq!(layers(), ["it@below", "it@above", "it@ran"]);
}
