//! A repository of an OCI registry as a cache.
//!
//! Packs are blobs. A record is a tagged manifest: its first layer is the
//! record, the others are the packs that it needs, so that the registry's own
//! garbage collection keeps them. Tags are the only index: the referrers API is
//! young, and many registries answer 404 for it.

use bytes::Bytes;
use futures_util::TryStreamExt;
use http::HeaderValue;
use oci_client::client::{BlobResponse, Client, ClientConfig, ClientProtocol, SizedStream};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, RegistryOperation};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

use super::entry::Pack;
use super::object::{Meta, Object, Trouble, sha256};
use super::spec::Spec;
use super::transport::{Faults, ready_for_tls};

mod tag;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const RECORD: &str = "application/vnd.vimg.record.v1+zstd";
const PACK: &str = "application/vnd.vimg.pack.v1";
/// Timeout for opening a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Retries of a request.
const RETRIES: u32 = 2;
/// Maximum size of a manifest or a page of tags, in bytes.
const MAX_ANSWER: usize = 4 << 20;
/// Maximum number of tags that are read.
const MAX_TAGS: usize = 1_000_000;

type Answer<T> = Result<T, Trouble>;
type Got<T> = Result<T, OciDistributionError>;

pub(super) struct Registry {
    client: Client,
    /// Reads manifests and tags, because the client library does not limit
    /// their size.
    reader: reqwest::Client,
    repository: Reference,
    auth: RegistryAuth,
    /// Whether it uses HTTP without TLS.
    insecure: bool,
    faults: Arc<Faults>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    media_type: String,
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
}

impl Descriptor {
    fn of(media_type: &str, bytes: &[u8]) -> Self {
        let digest = format!("sha256:{}", sha256(bytes));
        Self { media_type: media_type.to_owned(), digest, size: bytes.len() as u64 }
    }
}

impl Registry {
    pub(super) fn open(spec: &Spec, faults: Arc<Faults>) -> Result<Self, String> {
        ready_for_tls();
        let text = spec.option("ref").unwrap_or_default();
        let repository: Reference = text.parse().map_err(|e| format!("invalid repository `{text}`: {e}"))?;
        let host = repository.registry().split(':').next().unwrap_or_default().to_owned();
        let insecure = matches!(spec.option("insecure"), Some("true" | "1"))
            || host == "localhost"
            || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback());
        let config = ClientConfig {
            protocol: if insecure { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(CONNECT),
            // Uploads a pack with one request, if the registry allows that.
            use_monolithic_push: true,
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|e| e.to_string())?;
        let reader = reqwest::Client::builder()
            .user_agent(concat!("vimg/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .build()
            .map_err(|e| e.to_string())?;
        let auth = match (spec.option("username"), spec.option("password")) {
            (Some(user), Some(password)) => RegistryAuth::Basic(user.to_owned(), password.to_owned()),
            (None, Some(token)) => RegistryAuth::Bearer(token.to_owned()),
            _ => RegistryAuth::Anonymous,
        };
        Ok(Self { client, reader, repository, auth, insecure, faults })
    }

    /// Runs `work`, with up to two retries.
    async fn again<T, F: Future<Output = Got<T>>>(&self, work: impl Fn() -> F) -> Answer<T> {
        let mut tries = 0;
        loop {
            let error = match work().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            tries += 1;
            let denied = matches!(
                error,
                OciDistributionError::UnauthorizedError { .. }
                    | OciDistributionError::AuthenticationFailure(_)
            );
            if denied {
                return Err(Trouble::new("access denied"));
            }
            let trouble = describe(&error);
            if tries > RETRIES {
                return Err(trouble);
            }
            self.faults.add(trouble.why);
            tokio::time::sleep(Duration::from_millis(200 << tries)).await;
        }
    }

    fn tagged(&self, tag: String) -> Reference {
        Reference::with_tag(
            self.repository.registry().to_owned(),
            self.repository.repository().to_owned(),
            tag,
        )
    }

    /// Requests access for the next operation. The registry may return a token
    /// for it.
    async fn enter(&self, operation: RegistryOperation) -> Answer<Option<String>> {
        self.again(|| self.client.auth(&self.repository, &self.auth, operation)).await
    }

    /// Reads `path` of the repository; `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// It can't be read, or is longer than [`MAX_ANSWER`].
    async fn read(&self, path: &str, query: &[(&str, &str)], token: Option<&str>) -> Answer<Option<Vec<u8>>> {
        let scheme = if self.insecure { "http" } else { "https" };
        let (host, name) = (self.repository.resolve_registry(), self.repository.repository());
        let url = format!("{scheme}://{host}/v2/{name}/{path}");
        let read = self.again(|| async {
            let request = self.reader.get(&url).query(query).header(http::header::ACCEPT, MANIFEST);
            let request = match (token, &self.auth) {
                (Some(token), _) => request.bearer_auth(token),
                (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
                (None, _) => request,
            };
            let mut response = request.send().await?;
            match response.status().as_u16() {
                200 => {}
                404 => return Ok(Ok(None)),
                401 | 403 => return Err(OciDistributionError::UnauthorizedError { url: url.clone() }),
                code => {
                    let (url, message) = (url.clone(), String::new());
                    return Err(OciDistributionError::ServerError { code, url, message });
                }
            }
            let mut bytes = Vec::new();
            while let Some(chunk) = response.chunk().await? {
                if bytes.len() + chunk.len() > MAX_ANSWER {
                    return Ok(Err(Trouble::content("a response is too long")));
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(Ok(Some(bytes)))
        });
        read.await?
    }

    async fn manifest(&self, tag: &str, token: Option<&str>) -> Answer<Option<(Manifest, u64)>> {
        let Some(bytes) = self.read(&format!("manifests/{tag}"), &[], token).await? else {
            return Ok(None);
        };
        let manifest =
            serde_json::from_slice(&bytes).map_err(|_| Trouble::content("a manifest is damaged"))?;
        Ok(Some((manifest, bytes.len() as u64)))
    }

    /// Reads a page of tags, those after `last`.
    async fn tags(&self, last: Option<&str>, token: Option<&str>) -> Answer<Vec<String>> {
        /// The response of a registry; `null` if there are no tags.
        #[derive(Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let query: Vec<(&str, &str)> = [("n", "1000")].into_iter().chain(last.map(|l| ("last", l))).collect();
        let Some(bytes) = self.read("tags/list", &query, token).await? else { return Ok(Vec::new()) };
        let page: Page =
            serde_json::from_slice(&bytes).map_err(|_| Trouble::content("the list of tags is damaged"))?;
        Ok(page.tags.unwrap_or_default())
    }

    async fn blob(&self, digest: &str, part: Option<(u64, u64)>, most: u64) -> Answer<Option<Vec<u8>>> {
        let wanted =
            OciDescriptor { digest: digest.to_owned(), size: most as i64, ..OciDescriptor::default() };
        let read = self.again(|| async {
            let (from, length) = part.map_or((0, None), |(from, length)| (from, Some(length)));
            let pulled = match part {
                None => self.client.pull_blob_stream(&self.repository, &wanted).await.map(BlobResponse::Full),
                Some(_) => {
                    self.client.pull_blob_stream_partial(&self.repository, &wanted, from, length).await
                }
            };
            match pulled {
                Err(e) if is_missing(&e) => Ok(None),
                Err(e) => Err(e),
                Ok(BlobResponse::Partial(stream)) => take(stream, 0, most).await.map(Some),
                // A registry without support for ranges sends the whole blob.
                Ok(BlobResponse::Full(stream)) => take(stream, from, most).await.map(Some),
            }
        });
        read.await
    }

    pub(super) async fn get(&self, object: &Object, most: u64) -> Answer<Option<Vec<u8>>> {
        let token = self.enter(RegistryOperation::Pull).await?;
        let Some(tag) = tag::of(object) else {
            return match object {
                Object::Pack(pack) => self.blob(&format!("sha256:{}", pack.sha256), None, most).await,
                _ => Ok(None),
            };
        };
        let Some((manifest, _)) = self.manifest(&tag, token.as_deref()).await? else { return Ok(None) };
        let first = manifest.layers.first().filter(|layer| layer.media_type == RECORD);
        let first = first.ok_or_else(|| Trouble::content("a manifest is not a record"))?;
        if first.size > most {
            return Err(Trouble::content("the record is too large"));
        }
        // The manifest exists, so a missing blob is an error.
        let missing = || Trouble::content("the record is missing");
        self.blob(&first.digest, None, most).await?.ok_or_else(missing).map(Some)
    }

    pub(super) async fn range(&self, pack: &Pack, from: u64, length: u64) -> Answer<Option<Vec<u8>>> {
        self.enter(RegistryOperation::Pull).await?;
        self.blob(&format!("sha256:{}", pack.sha256), Some((from, length)), length).await
    }

    async fn put_blob(&self, bytes: &Bytes, digest: &str) -> Answer<()> {
        self.again(|| self.client.push_blob(&self.repository, bytes.clone(), digest)).await.map(|_| ())
    }

    pub(super) async fn put(&self, object: &Object, bytes: Bytes, needs: &[Pack]) -> Answer<()> {
        self.enter(RegistryOperation::Push).await?;
        let Some(tag) = tag::of(object) else {
            return match object {
                Object::Pack(pack) => self.put_blob(&bytes, &format!("sha256:{}", pack.sha256)).await,
                _ => Err(Trouble::new("a registry can't store such an object")),
            };
        };
        let empty = Bytes::from_static(b"{}");
        let config = Descriptor::of(EMPTY, &empty);
        let record = Descriptor::of(RECORD, &bytes);
        self.put_blob(&empty, &config.digest).await?;
        self.put_blob(&bytes, &record.digest).await?;
        let mut layers = vec![record];
        layers.extend(needs.iter().map(|pack| Descriptor {
            media_type: PACK.to_owned(),
            digest: format!("sha256:{}", pack.sha256),
            size: pack.size,
        }));
        let manifest = Manifest {
            schema_version: 2,
            media_type: MANIFEST.to_owned(),
            artifact_type: RECORD.to_owned(),
            config,
            layers,
        };
        let body = Bytes::from(serde_json::to_vec(&manifest).map_err(|e| Trouble::new(e.to_string()))?);
        let image = self.tagged(tag);
        let kind = HeaderValue::from_static(MANIFEST);
        self.again(|| self.client.push_manifest_raw(&image, body.clone(), kind.clone())).await.map(|_| ())
    }

    pub(super) async fn stat(&self, object: &Object) -> Answer<Option<Meta>> {
        let token = self.enter(RegistryOperation::Pull).await?;
        if let Object::Pack(pack) = object {
            let digest = format!("sha256:{}", pack.sha256);
            let there = self.again(|| self.client.blob_exists(&self.repository, &digest)).await?;
            return Ok(there.then_some(Meta { size: pack.size, modified: None }));
        }
        let Some(tag) = tag::of(object) else { return Ok(None) };
        Ok(self.manifest(&tag, token.as_deref()).await?.map(|(_, size)| Meta { size, modified: None }))
    }

    /// Lists everything that has a tag, and the packs that it needs.
    pub(super) async fn list(&self) -> Answer<Vec<(Object, Meta)>> {
        let token = self.enter(RegistryOperation::Pull).await?;
        let token = token.as_deref();
        let mut all = std::collections::HashMap::new();
        let (mut last, mut seen): (Option<String>, _) = (None, 0);
        loop {
            let tags = self.tags(last.as_deref(), token).await?;
            seen += tags.len();
            if seen > MAX_TAGS {
                return Err(Trouble::content("it has too many tags"));
            }
            for tag in &tags {
                let Some(object) = tag::parse(tag) else { continue };
                let Some((manifest, size)) = self.manifest(tag, token).await? else { continue };
                for layer in manifest.layers.iter().filter(|l| l.media_type == PACK) {
                    let Some(sha256) = layer.digest.strip_prefix("sha256:") else { continue };
                    let pack = Object::Pack(Pack { sha256: sha256.to_owned(), size: layer.size });
                    all.insert(pack, Meta { size: layer.size, modified: None });
                }
                all.insert(object, Meta { size, modified: None });
            }
            match tags.last() {
                // Some registries return fewer tags than requested, and some
                // the same ones again.
                Some(tag) if last.as_ref() < Some(tag) => last = Some(tag.clone()),
                _ => return Ok(all.into_iter().collect()),
            }
        }
    }

    pub(super) async fn delete(&self, _object: &Object) -> Answer<()> {
        Err(Trouble::new("vimg can't delete from a registry, which cleans up by its own rules"))
    }
}

/// Reads a stream from offset `skip` on, at most `most` bytes.
async fn take(mut stream: SizedStream, skip: u64, most: u64) -> Got<Vec<u8>> {
    let (mut bytes, mut skip) = (Vec::new(), skip as usize);
    while let Some(chunk) = stream.stream.try_next().await? {
        let ahead = skip.min(chunk.len());
        skip -= ahead;
        let room = (most as usize).saturating_sub(bytes.len());
        let chunk = &chunk[ahead..];
        bytes.extend_from_slice(&chunk[..room.min(chunk.len())]);
        if bytes.len() as u64 == most && chunk.len() > room {
            break;
        }
    }
    Ok(bytes)
}

fn is_missing(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::ImageManifestNotFoundError(_) => true,
        OciDistributionError::ServerError { code, .. } => *code == 404,
        OciDistributionError::RegistryError { envelope, .. } => envelope.errors.iter().any(|e| {
            use oci_client::errors::OciErrorCode as Code;
            matches!(e.code, Code::ManifestUnknown | Code::BlobUnknown | Code::NameUnknown | Code::NotFound)
        }),
        OciDistributionError::RequestError(e) => e.status().is_some_and(|s| s.as_u16() == 404),
        _ => false,
    }
}

/// Describes an error in a few words, without the address.
fn describe(error: &OciDistributionError) -> Trouble {
    match error {
        OciDistributionError::ServerError { code, .. } => Trouble::new(format!("HTTP status {code}")),
        OciDistributionError::RegistryError { envelope, .. } => {
            let first = envelope.errors.first().map_or("", |e| e.message.as_str());
            Trouble::new(format!("request refused: {first}"))
        }
        OciDistributionError::RequestError(e) => match e.status() {
            Some(status) => Trouble::new(format!("HTTP status {}", status.as_u16())),
            None if e.is_timeout() => Trouble::new("no response in time"),
            None if e.is_connect() => Trouble::new("the server can't be reached"),
            None => Trouble::new("the connection broke"),
        },
        other => Trouble::new(format!("request failed: {other}")),
    }
}
