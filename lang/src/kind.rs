//! The form of the table of the language: what a node may be, and what it takes.

/// The type of an argument or property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ty {
    /// A name: letters, digits, `-`, `_` and `.`; never a template.
    Name,
    /// Text; a template.
    Str,
    /// A whole number, or a template that yields one.
    Int,
    /// `#true` or `#false`.
    Bool,
    /// Bytes: `512MiB`, `8GiB`, or a number.
    Size,
    /// A time: `90s`, `10m`, `1h`.
    Duration,
    /// File permission bits in octal, as text: `"0644"`.
    Mode,
    /// An absolute path in the machine.
    GuestPath,
    /// A file or directory of the project.
    HostPath,
    /// One of a few words.
    Word(&'static [&'static str]),
    /// The name of a distribution that vimg knows.
    Distribution,
    /// The name of a suite of such a distribution.
    Suite,
    /// A string, number or boolean.
    Scalar,
}

/// A distribution that recipes can name.
#[derive(Debug, Clone, Copy)]
pub struct KnownDistribution {
    /// Its name.
    pub name: &'static str,
    /// The names of its suites.
    pub suites: &'static [&'static str],
}

/// What a recipe may say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grammar<'a> {
    /// The nodes that a file may have.
    pub(crate) nodes: &'static [Kind],
    /// The distributions that it can name.
    pub(crate) distributions: &'a [KnownDistribution],
}

impl Ty {
    /// Returns the words that a value can be, if it is one of a few.
    pub(crate) fn words(self, known: &[KnownDistribution]) -> Option<Vec<&'static str>> {
        match self {
            Ty::Word(words) => Some(words.to_vec()),
            Ty::Distribution => Some(known.iter().map(|one| one.name).collect()),
            Ty::Suite => Some(known.iter().flat_map(|one| one.suites).copied().collect()),
            _ => None,
        }
    }

    /// Names the type for people.
    pub fn describe(self) -> String {
        match self {
            Ty::Name => "a name".into(),
            Ty::Str => "a string".into(),
            Ty::Int => "an integer".into(),
            Ty::Bool => "`#true` or `#false`".into(),
            Ty::Size => "a size such as \"512MiB\"".into(),
            Ty::Duration => "a duration such as \"90s\"".into(),
            Ty::Mode => "a mode such as \"0644\"".into(),
            Ty::GuestPath => "an absolute path in the machine".into(),
            Ty::HostPath => "a path in the project".into(),
            Ty::Scalar => "a string, number or boolean".into(),
            Ty::Distribution => "the name of a distribution".into(),
            Ty::Suite => "the name of a suite".into(),
            Ty::Word(words) => alternatives(words),
        }
    }
}

/// Joins words that a value can be.
pub(crate) fn alternatives(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    words.join(" or ")
}

/// An argument or property.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its name; for arguments only shown.
    pub name: &'static str,
    /// Its type.
    pub ty: Ty,
    /// Whether it must be there.
    pub required: bool,
    /// One line for the reference.
    pub doc: &'static str,
}

/// The arguments a node takes.
#[derive(Debug, Clone, Copy)]
pub enum Args {
    /// None.
    None,
    /// At most one; exactly one if the field is required.
    One(Field),
    /// One or more.
    Many(Field),
}

/// The children a node takes.
#[derive(Debug, Clone, Copy)]
pub enum Children {
    /// None.
    None,
    /// Nodes of these kinds.
    Of(&'static [Kind]),
    /// Nodes whose names are inputs, and whose arguments are values.
    Inputs,
}

/// A kind of node in one place.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// The node's name.
    pub name: &'static str,
    /// What it is for, in a sentence or two for the reference.
    pub doc: &'static str,
    /// Its arguments.
    pub args: Args,
    /// Its properties.
    pub props: &'static [Field],
    /// Whether properties beyond `props` are taken, as inputs or variables.
    pub open_props: bool,
    /// Its children.
    pub children: Children,
    /// Whether it may stand more than once beside itself.
    pub many: bool,
}

pub(crate) const fn req(name: &'static str, ty: Ty, doc: &'static str) -> Field {
    Field { name, ty, required: true, doc }
}

pub(crate) const fn opt(name: &'static str, ty: Ty, doc: &'static str) -> Field {
    Field { name, ty, required: false, doc }
}

pub(crate) const fn kind(name: &'static str, doc: &'static str, args: Args) -> Kind {
    Kind { name, doc, args, props: &[], open_props: false, children: Children::None, many: true }
}

impl Kind {
    pub(crate) const fn props(self, props: &'static [Field]) -> Self {
        Self { props, ..self }
    }

    pub(crate) const fn open(self) -> Self {
        Self { open_props: true, ..self }
    }

    pub(crate) const fn of(self, kinds: &'static [Kind]) -> Self {
        Self { children: Children::Of(kinds), ..self }
    }

    pub(crate) const fn inputs(self) -> Self {
        Self { children: Children::Inputs, ..self }
    }

    pub(crate) const fn once(self) -> Self {
        Self { many: false, ..self }
    }
}

/// The words for an input's or parameter's type.
pub const INPUT_TYPES: &[&str] = &["string", "int", "bool", "size", "duration", "path", "list"];
