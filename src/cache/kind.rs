//! The types of caches, and the fields of their specs. A type is a variant, an
//! entry in [`Kind::ALL`] and a list of fields; `service.rs` opens it.

/// The type of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Local,
    /// A bucket of S3 or of a compatible service.
    S3,
    /// A bucket of Google Cloud Storage.
    Gcs,
    /// A container of Azure Blob Storage.
    Azblob,
    /// A directory of a WebDAV server.
    Webdav,
    /// A repository of an OCI registry.
    Registry,
    /// The cache of GitHub Actions.
    Gha,
    /// In the memory of this process, for tests.
    Memory,
}

/// What a field of a spec says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Says {
    /// Where the cache is. It is in the label of the cache and in messages.
    Place,
    /// Where the cache is. It may contain a password, so no message shows it.
    Address,
    /// As [`Says::Address`], and the label shows it without the password.
    Url,
    /// Something harmless. Messages show it.
    Plain,
    /// How to log in, or something unknown. No message shows it.
    Private,
}

/// A field of a spec.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    /// Its name in a spec.
    pub(super) name: &'static str,
    /// The name of the service's option; empty if vimg handles the field
    /// itself.
    pub(super) option: &'static str,
    /// What it says.
    pub(super) says: Says,
}

const fn place(name: &'static str, option: &'static str) -> Field {
    Field { name, option, says: Says::Place }
}

const fn address(name: &'static str, option: &'static str) -> Field {
    Field { name, option, says: Says::Address }
}

const fn plain(name: &'static str, option: &'static str) -> Field {
    Field { name, option, says: Says::Plain }
}

const fn private(name: &'static str, option: &'static str) -> Field {
    Field { name, option, says: Says::Private }
}

/// Fields of all caches.
pub(super) const COMMON: &[Field] = &[
    plain("type", ""),
    plain("mode", ""),
    private("ignore-error", ""),
    plain("domain", ""),
    plain("name", ""),
    plain("timeout", ""),
    private("touch_refresh", ""),
    private("max-age", ""),
];

const LOCAL: &[Field] = &[place("src", "root"), place("dest", "root")];

const S3: &[Field] = &[
    place("bucket", "bucket"),
    plain("region", "region"),
    place("prefix", "root"),
    address("endpoint_url", "endpoint"),
    private("use_path_style", ""),
    private("access_key_id", "access_key_id"),
    private("secret_access_key", "secret_access_key"),
    private("session_token", "session_token"),
    private("anonymous", "skip_signature"),
];

const GCS: &[Field] = &[
    place("bucket", "bucket"),
    place("prefix", "root"),
    address("endpoint_url", "endpoint"),
    private("credential", "credential"),
    private("credential_path", "credential_path"),
    private("token", "token"),
    private("anonymous", "skip_signature"),
];

const AZBLOB: &[Field] = &[
    address("account_url", "endpoint"),
    private("account_name", "account_name"),
    place("container", "container"),
    place("prefix", "root"),
    private("secret_access_key", "account_key"),
    private("sas_token", "sas_token"),
    private("anonymous", "skip_signature"),
];

const WEBDAV: &[Field] = &[
    Field { name: "url", option: "endpoint", says: Says::Url },
    place("prefix", "root"),
    private("username", "username"),
    private("password", "password"),
    private("token", "token"),
];

const REGISTRY: &[Field] = &[
    place("ref", "ref"),
    private("username", "username"),
    private("password", "password"),
    private("insecure", "insecure"),
];

const GHA: &[Field] = &[
    address("url", "endpoint"),
    private("token", "runtime_token"),
    place("scope", "root"),
    address("version", "version"),
];

const MEMORY: &[Field] = &[place("id", "root")];

impl Kind {
    pub(super) const ALL: &[(&'static str, Self)] = &[
        ("local", Self::Local),
        ("s3", Self::S3),
        ("gcs", Self::Gcs),
        ("azblob", Self::Azblob),
        ("webdav", Self::Webdav),
        ("registry", Self::Registry),
        ("gha", Self::Gha),
        ("memory", Self::Memory),
    ];

    /// Its name in a spec.
    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(word, _)| word)
    }

    /// The fields of its specs besides [`COMMON`].
    pub(super) fn fields(self) -> &'static [Field] {
        match self {
            Self::Local => LOCAL,
            Self::S3 => S3,
            Self::Gcs => GCS,
            Self::Azblob => AZBLOB,
            Self::Webdav => WEBDAV,
            Self::Registry => REGISTRY,
            Self::Gha => GHA,
            Self::Memory => MEMORY,
        }
    }

    /// Its mandatory fields.
    pub(super) fn required(self, to: bool) -> &'static [&'static str] {
        match self {
            Self::Local if to => &["dest"],
            Self::Local => &["src"],
            Self::S3 | Self::Gcs => &["bucket"],
            Self::Azblob => &["container"],
            Self::Webdav => &["url"],
            Self::Registry => &["ref"],
            Self::Gha | Self::Memory => &[],
        }
    }
}

/// Whether messages can show a field of a spec, whatever the type of the cache.
pub fn is_plain(name: &str) -> bool {
    let all = Kind::ALL.iter().flat_map(|(_, kind)| kind.fields()).chain(COMMON);
    let mut named = all.filter(|field| field.name == name).peekable();
    named.peek().is_some() && named.all(|field| matches!(field.says, Says::Place | Says::Plain))
}
