//! Sockets in a directory, by short names.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::process::Child;

/// Connects to a socket in `dir`. The path of a socket is limited to 108 bytes;
/// through the descriptor of the directory it is always short.
pub(crate) async fn connect(dir: &Path, name: &str) -> std::io::Result<UnixStream> {
    let handle = std::fs::File::open(dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd())).await
}

/// Creates a socket in `dir`, and listens.
pub(crate) fn listen(dir: &Path, name: &str) -> std::io::Result<UnixListener> {
    let handle = std::fs::File::open(dir)?;
    UnixListener::bind(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd()))
}

/// Connects to a socket as soon as it exists; `None` if the program ends first.
pub(crate) async fn wait_and_connect(dir: &Path, name: &str, child: &mut Child) -> Option<UnixStream> {
    loop {
        if let Ok(stream) = connect(dir, name).await {
            return Some(stream);
        }
        if !matches!(child.try_wait(), Ok(None)) {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
