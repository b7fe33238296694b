//! Work that a signal interrupts.

use std::sync::OnceLock;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::output::{Error, INTERRUPTED};

/// How long tasks may take to end.
const ENDING: Duration = Duration::from_secs(5);

pub(super) fn stopped() -> Error {
    interrupted("stopped")
}

/// The error after a signal. `text` says what was stopped and what is left.
pub(super) fn interrupted(text: &str) -> Error {
    Error::Message(text.into(), None, INTERRUPTED)
}

/// Runs `work` until it ends, or until SIGINT (Ctrl-C), SIGTERM or SIGHUP
/// (`None`). Dropping a build kills its machines; a second signal ends the
/// process at once, without waiting for that.
pub(super) fn interruptible<T>(work: impl Future<Output = T>) -> Result<Option<T>, Error> {
    let runtime = runtime()?;
    let mut told = told_to_stop()?;
    let result = runtime.block_on(async {
        tokio::select! {
            biased;
            _ = told.wait_for(|stop| *stop) => None,
            result = work => Some(result),
        }
    });
    // Tasks remove their machines and staging directories as they end.
    runtime.shutdown_timeout(ENDING);
    Ok(result)
}

/// Runs `work` until it ends, even after a signal: it gets a future that is then
/// ready, and ends what it does in an orderly way. A second signal ends the
/// process at once.
pub(super) fn orderly<T, W: Future<Output = T>>(
    work: impl FnOnce(BoxFuture<'static, ()>) -> W,
) -> Result<T, Error> {
    let runtime = runtime()?;
    let mut told = told_to_stop()?;
    let stop = async move {
        if told.wait_for(|stop| *stop).await.is_err() {
            std::future::pending().await
        }
    };
    let result = runtime.block_on(work(Box::pin(stop)));
    runtime.shutdown_timeout(ENDING);
    Ok(result)
}

fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Error::host(format!("can't start the async runtime: {e}")))
}

/// Returns a flag that becomes true when a signal tells this process to stop.
/// Signals count from the first call on, also between two pieces of work.
fn told_to_stop() -> Result<watch::Receiver<bool>, Error> {
    static TOLD: OnceLock<watch::Receiver<bool>> = OnceLock::new();
    if let Some(told) = TOLD.get() {
        return Ok(told.clone());
    }
    let fail = |e: std::io::Error| Error::host(format!("can't listen for signals: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
    let (tell, told) = watch::channel(false);
    let mut all = {
        let _guard = runtime.enter();
        use tokio::signal::unix::{SignalKind, signal};
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
            .into_iter()
            .map(signal)
            .collect::<Result<Vec<_>, _>>()
            .map_err(fail)?
    };
    let listen = move || {
        runtime.block_on(async {
            for again in [false, true] {
                let signals = all.iter_mut().map(|signal| Box::pin(signal.recv()));
                futures_util::future::select_all(signals).await;
                if again {
                    crate::report::show_keys();
                    std::process::exit(i32::from(INTERRUPTED));
                }
                let _ = tell.send(true);
            }
        });
    };
    std::thread::Builder::new().spawn(listen).map_err(fail)?;
    Ok(TOLD.get_or_init(|| told).clone())
}
