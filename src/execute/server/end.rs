//! Programs in a server, and its end.

use tokio::sync::mpsc;
use vimg_agent::protocol::{Exec, Stream};

use super::super::guest::Stopped;
use super::super::session::{Ended, Input};
use super::hooks::hooks;
use super::record::ServerRecord;
use super::running::{find, leave, servers, words};
use crate::provider::{Instance, Provider};
use crate::store::ServerHome;

/// Shuts a server down in order, or with `force` ends it without asking it.
/// With `remove` and without `force`, runs its `decommission` hooks first.
/// Returns whether it was running.
pub async fn down<P: Provider>(
    provider: &P,
    home: &ServerHome,
    force: bool,
    remove: bool,
) -> Result<bool, String> {
    let ran = match force {
        true => match servers(provider)?.find(home.dir()).await.map_err(|e| e.message)? {
            Some(instance) => {
                instance.stop().await;
                true
            }
            None => false,
        },
        false => match find(provider, home).await? {
            Some(mut found) => {
                if remove && let Err(mut said) = hooks::<P>(&mut found, "decommission", |_| {}).await {
                    leave(provider, found);
                    let why = said.pop().unwrap_or_default();
                    return Err(said.pop().map_or(why.clone(), |last| format!("{why}; last output: {last}")));
                }
                found.switch_off().await.map_err(|stopped| match stopped {
                    Stopped::Ended(_) => format!("it did not shut down in order: {}", words(stopped)),
                    stopped => words(stopped),
                })?;
                true
            }
            None if remove && home.record().is_some_and(|record: ServerRecord| record.parting) => {
                return Err(
                    "it is off, and has hooks to run before its removal: start it with `vimg up`".into()
                );
            }
            None => false,
        },
    };
    if remove {
        home.forget().map_err(|e| format!("{}: {e}", home.dir().display()))?;
    }
    Ok(ran)
}

/// Runs a program in a running server.
pub async fn exec<P: Provider>(
    provider: &P,
    home: &ServerHome,
    exec: Exec,
    listen: impl FnOnce() -> mpsc::Receiver<Input>,
    mut output: impl FnMut(Stream, &[u8]) + Send,
) -> Result<Ended, String> {
    let Some(mut found) = find(provider, home).await? else {
        return Err("it is switched off".into());
    };
    let input = listen();
    let ended = found.ask(async |session| session.exec(exec, input, &mut output).await).await;
    leave(provider, found);
    ended.map_err(words)
}
