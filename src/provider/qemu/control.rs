//! The operations of an instance under QEMU.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::io::AsyncWrite;
use tokio::net::UnixStream;
use vimg_lang::model::Forward;

use super::instance::{OPENING, Process, QemuInstance, inside, inward, unkept};
use super::snapshot::Snapshot;
use crate::host::HostError;
use crate::host::child;
use crate::host::keeper;
use crate::host::network::WayOut;
use crate::provider::{Ended, Instance, Place};

/// How often vimg looks whether a machine hangs.
const LOOKS: Duration = Duration::from_secs(10);

impl Instance for QemuInstance {
    type Channel = UnixStream;

    fn runner(&self) -> String {
        self.way.clone()
    }

    fn place(&self) -> Place {
        self.place.clone()
    }

    fn channel(&mut self) -> Option<UnixStream> {
        self.agent.take()
    }

    fn keyboard(&mut self) -> Option<Box<dyn AsyncWrite + Send + Sync + Unpin>> {
        Some(Box::new(self.keys.take()?))
    }

    async fn snapshot(&mut self, next: &Path) -> Result<(), HostError> {
        self.disks.add(&mut self.monitor, next).await?;
        self.disks.switch(&mut self.monitor).await
    }

    fn way_out(&self) -> WayOut {
        self.way_out.clone()
    }

    async fn ended(&mut self) -> Ended {
        let mut looks = tokio::time::interval(LOOKS);
        loop {
            tokio::select! {
                // Events first: they say more than the end of the process.
                biased;
                event = self.events.recv() => match event {
                    Some(event) => if let Some(ended) = self.judge(&event) { return ended },
                    None => {
                        if let Process::Own(child) = &mut self.process {
                            let _ = child.wait().await;
                        }
                        return Ended::Killed(child::last_words(&self.log));
                    }
                },
                _ = looks.tick() => if let Some(seconds) = self.hangs() {
                    return Ended::Hangs(seconds);
                },
                _ = self.process.wait() => {
                    while let Ok(event) = self.events.try_recv() {
                        if let Some(ended) = self.judge(&event) {
                            return ended;
                        }
                    }
                    return Ended::Killed(child::last_words(&self.log));
                }
            }
        }
    }

    fn console_since(&self, seen: u64) -> (u64, Vec<u8>) {
        self.console.since(seen)
    }

    async fn stop(mut self) {
        match &mut self.process {
            // A kill is enough: the disk was synced before, if it matters.
            Process::Own(child) => {
                let _ = child.kill().await;
            }
            Process::Found => {
                let _ = self.monitor.execute("quit", json!({})).await;
                // Its monitor closes when it ends.
                let gone = async { while self.events.recv().await.is_some() {} };
                let _ = tokio::time::timeout(OPENING, gone).await;
            }
        }
    }
}

impl QemuInstance {
    /// Continues after a pause, with normal priority.
    pub(super) async fn go_on(&mut self) -> Result<(), HostError> {
        if let Process::Own(child) = &self.process
            && let Some(program) = child.id()
        {
            child::competes(program);
        }
        self.execute("cont", json!({})).await.map(|_| ())
    }

    /// Removes the snapshot that it was forked from.
    pub(super) fn distrust(&mut self) {
        if let Some(snapshot) = self.snapshot.take() {
            Snapshot::at(&snapshot).remove();
        }
        if let Some(origin) = self.origin.take() {
            origin.distrust();
        }
    }

    /// Changes the forwarded ports of a server.
    pub(super) async fn forward(&mut self, before: &[Forward], after: &[Forward]) -> Result<(), HostError> {
        let Some(keeper) = &self.keeper else { return Err(unkept(keeper::lost("it has ended"))) };
        let apart = keeper.namespaces().is_some();
        keeper.lead(&inward(after)).await.map_err(unkept)?;
        // In a namespace of its own, QEMU is reached only through the server's
        // companion process. Otherwise QEMU listens on the host's ports itself.
        let rules = |forwards: &[Forward]| -> Vec<(String, Forward)> {
            let rule = |(inside, f): (u16, &Forward)| match apart {
                true => (format!("tcp::{inside}"), f.clone()),
                false => (format!("tcp:{}:{}", f.address, f.host), f.clone()),
            };
            inside(forwards).map(rule).collect()
        };
        let (before, after) = (rules(before), rules(after));
        let other = |of: &[(String, Forward)], rule: &(String, Forward)| !of.contains(rule);
        for (rule, _) in before.iter().filter(|rule| other(&after, rule)) {
            self.tell(&format!("hostfwd_remove net0 {rule}")).await?;
        }
        for (rule, forward) in after.iter().filter(|rule| other(&before, rule)) {
            let said = self.tell(&format!("hostfwd_add net0 {rule}-:{}", forward.guest)).await?;
            if !said.trim().is_empty() {
                return Err(unkept(keeper::taken(&forward.address, forward.host)));
            }
        }
        Ok(())
    }

    /// Drops the handle of a server, which keeps running.
    pub(super) fn leave(self) {
        if let Process::Own(child) = self.process {
            // Dropping the handle would kill it.
            std::mem::forget(child);
        }
    }
}
