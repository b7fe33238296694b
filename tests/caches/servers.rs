//! Local servers with the protocols of the real services. `run-tests` installs
//! them.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::port;

/// A server, and its spec as a cache.
pub(crate) struct Server {
    child: Option<Child>,
    _dir: tempfile::TempDir,
    address: SocketAddr,
    spec: fn(&SocketAddr) -> String,
}

impl Server {
    /// Makes a server that runs in this process, with its files in a directory.
    pub(crate) fn here(dir: tempfile::TempDir, address: SocketAddr) -> Self {
        Self { child: None, _dir: dir, address, spec: s3 }
    }

    pub(crate) fn spec(&self) -> String {
        (self.spec)(&self.address)
    }

    /// Returns the spec of the same server behind another address.
    pub(crate) fn spec_at(&self, address: SocketAddr) -> String {
        (self.spec)(&address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(
    command: &mut Command,
    address: SocketAddr,
    dir: tempfile::TempDir,
    spec: fn(&SocketAddr) -> String,
) -> Server {
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
    let mut child = child.unwrap_or_else(|e| panic!("{name} does not start ({e}): run-tests installs it"));
    let until = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(address).is_err() {
        let log = || std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        assert!(child.try_wait().unwrap().is_none(), "{name} ended: {}", log());
        assert!(Instant::now() < until, "{name} does not listen: {}", log());
        std::thread::sleep(Duration::from_millis(50));
    }
    Server { child: Some(child), _dir: dir, address, spec }
}

/// Returns a program of the tests' own Python environment, or of the system.
fn python(name: &str) -> Command {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin").join(name);
    Command::new(if own.exists() { own } else { name.into() })
}

fn s3(address: &SocketAddr) -> String {
    format!(
        "type=s3,bucket=cache,prefix=p,region=us-east-1,endpoint_url=http://{address},use_path_style=true,\
         access_key_id=key,secret_access_key=secret"
    )
}

/// Starts moto, an S3 server. A plain request creates its bucket, because moto
/// does not check credentials.
pub(crate) fn moto() -> Server {
    let address = port::free();
    let dir = tempfile::tempdir().unwrap();
    let mut command = python("moto_server");
    command.args(["-H", "127.0.0.1", "-p", &address.port().to_string()]);
    let server = start(&mut command, address, dir, s3);
    let made = Command::new("curl")
        .args(["--silent", "--fail", "--request", "PUT", &format!("http://{address}/cache")])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    server
}

pub(crate) fn webdav() -> Server {
    let address = port::free();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let mut command = python("wsgidav");
    command.args(["--host", "127.0.0.1", "--port", &address.port().to_string(), "--auth", "anonymous"]);
    command.arg("--root").arg(&root).arg("--no-config");
    start(&mut command, address, dir, |address| format!("type=webdav,url=http://{address},prefix=p"))
}

pub(crate) fn registry() -> Server {
    docker_registry(None, |address| format!("type=registry,ref={address}/cache/web"))
}

/// Starts a registry that needs a password.
pub(crate) fn registry_with_password() -> Server {
    /// The password `secret`, as `htpasswd -B` writes it.
    const USERS: &str = "vimg:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";
    docker_registry(Some(USERS), |address| {
        format!("type=registry,ref={address}/cache/web,username=vimg,password=secret")
    })
}

/// Starts Docker's registry, with the users of an htpasswd file or open to all.
fn docker_registry(users: Option<&str>, spec: fn(&SocketAddr) -> String) -> Server {
    let address = port::free();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yml");
    let root = dir.path().join("root");
    let mut text = format!(
        "version: 0.1\nlog: {{ level: error }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\n\
         http: {{ addr: {address} }}\n",
        root.display()
    );
    if let Some(users) = users {
        let path = dir.path().join("users");
        std::fs::write(&path, users).unwrap();
        text.push_str(&format!("auth: {{ htpasswd: {{ realm: cache, path: {} }} }}\n", path.display()));
    }
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&config);
    start(&mut command, address, dir, spec)
}

/// Starts Azurite, the emulator of Azure's blob storage, with its public
/// account and key.
pub(crate) fn azurite() -> Server {
    let address = port::free();
    let dir = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/node/node_modules/.bin/azurite-blob");
    let mut command = Command::new(program);
    command.args(["--blobHost", "127.0.0.1", "--blobPort", &address.port().to_string()]);
    command.args(["--skipApiVersionCheck", "--disableTelemetry", "--location"]).arg(dir.path().join("data"));
    let spec = |address: &SocketAddr| {
        format!(
            "type=azblob,account_url=http://{address}/devstoreaccount1,account_name=devstoreaccount1,\
             container=cache,prefix=p,secret_access_key={AZURITE_KEY}"
        )
    };
    let server = start(&mut command, address, dir, spec);
    let made = python("python3").args(["-c", MAKE_CONTAINER, &address.to_string(), AZURITE_KEY]).status();
    assert!(made.unwrap().success());
    server
}

/// Creates the container, which needs a signed request ("Authorize with Shared
/// Key" in the documentation of Azure's blob storage).
const MAKE_CONTAINER: &str = r#"
import base64, email.utils, hashlib, hmac, sys, urllib.request
address, key = sys.argv[1:]
account, date = 'devstoreaccount1', email.utils.formatdate(usegmt=True)
text = 'PUT' + 12 * '\n' + f'x-ms-date:{date}\nx-ms-version:2021-08-06\n/{account}/{account}/cache\nrestype:container'
sign = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
headers = {'x-ms-date': date, 'x-ms-version': '2021-08-06', 'Authorization': f'SharedKey {account}:{sign}'}
url = f'http://{address}/{account}/cache?restype=container'
urllib.request.urlopen(urllib.request.Request(url, method='PUT', headers=headers))
"#;

/// Azurite's documented key, the same on every machine.
const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Starts an emulator of Google's storage.
pub(crate) fn google() -> Server {
    let address = port::free();
    let dir = tempfile::tempdir().unwrap();
    let mut command = python("gcp-storage-emulator");
    command.args(["start", "--host", "127.0.0.1", "--port", &address.port().to_string(), "--in-memory"]);
    command.args(["--default-bucket", "cache"]);
    start(&mut command, address, dir, |address| {
        format!("type=gcs,bucket=cache,prefix=p,endpoint_url=http://{address},anonymous=true")
    })
}
