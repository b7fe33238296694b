//! Users, and the owners of files.

use serde::{Deserialize, Serialize};

use crate::field::{Fields, optional};

/// The owner of a file, by names in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// A user.
    pub user: String,
    /// A group.
    pub group: String,
}

impl Owner {
    /// Passes the field of an owner of `label` on.
    pub(crate) fn describe(&self, label: &str, to: &mut impl Fields) {
        to.value(&format!("{label} owner"), &format_args!("{}:{}", self.user, self.group));
    }
}

/// A user. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub struct User {
    pub name: String,
    pub uid: Option<u32>,
    pub group: Option<String>,
    pub groups: Vec<String>,
    pub home: Option<String>,
    pub shell: Option<String>,
    pub comment: Option<String>,
    pub system: bool,
}

impl User {
    /// Passes the fields of the user on.
    pub(crate) fn describe(&self, label: &str, to: &mut impl Fields) {
        to.value(label, &"");
        optional(to, &format!("{label} uid"), self.uid.as_ref());
        optional(to, &format!("{label} group"), self.group.as_ref());
        to.value(&format!("{label} groups"), &self.groups.join(","));
        optional(to, &format!("{label} home"), self.home.as_ref());
        optional(to, &format!("{label} shell"), self.shell.as_ref());
        optional(to, &format!("{label} comment"), self.comment.as_ref());
        to.value(&format!("{label} system"), &self.system);
    }
}
