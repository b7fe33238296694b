//! Works on disks, for callers that do not know how.

use std::fs::File;
use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use tokio::sync::OnceCell;
use vimg_lang::model::DiskFormat;

use super::bootable::{self, Problem};
use super::difference::{self, Exported, Made};
use super::image::{self, Compress, QemuImg};
use super::qcow2;
use crate::host::HostError;

/// Works on local disks, whoever runs machines with them.
pub trait DiskTool: Send + Sync {
    /// Its name in the records of states that it makes.
    fn name(&self) -> String;

    /// Makes a qcow2 disk without a backing file from a raw or qcow2 disk whose
    /// header was checked.
    fn import<'a>(&'a self, disk: &'a Path, to: &'a Path) -> BoxFuture<'a, Result<(), HostError>>;

    /// Flattens a chain of disks into one disk. The lowest comes first here and
    /// below.
    fn flatten<'a>(&'a self, chain: &'a [PathBuf], to: &'a Path) -> BoxFuture<'a, Result<(), HostError>>;

    /// Converts a chain of disks to one file of another format. With a `size` in
    /// bytes, the disk is that large; its partitions stay as they are.
    fn export<'a>(
        &'a self,
        chain: &'a [PathBuf],
        format: DiskFormat,
        size: Option<u64>,
        to: &'a Path,
    ) -> BoxFuture<'a, Result<(), HostError>>;

    /// Whether two disks on top of the same ones are identical, apart from the
    /// times at which they were made. `false` if that is unclear.
    fn alike<'a>(&'a self, below: &'a [PathBuf], a: &'a Made, b: &'a Made) -> BoxFuture<'a, bool>;

    /// Says what keeps the disk from booting, as far as that can be told without
    /// a boot. `own` says that vimg made the disk, so that it boots by GRUB. A
    /// tool that can't read disks finds nothing.
    fn problems<'a>(
        &'a self,
        _chain: &'a [PathBuf],
        _own: bool,
    ) -> BoxFuture<'a, Result<Vec<Problem>, HostError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Changes copies of a previous output so that they hold another chain.
    /// `None` if that is not possible or not worth it; the copies are then
    /// useless.
    fn revise<'a>(
        &'a self,
        chain: &'a [PathBuf],
        earlier: &'a Exported,
        copies: Vec<File>,
    ) -> BoxFuture<'a, Option<Vec<File>>>;
}

/// Works on disks with `qemu-img` and with vimg's own code.
pub struct QemuDisks {
    probes: PathBuf,
    img: OnceCell<QemuImg>,
}

impl QemuDisks {
    /// Makes a tool that looks for `qemu-img` when it is first used, and stores
    /// what it learns of it in `probes`.
    pub fn new(probes: PathBuf) -> Self {
        Self { probes, img: OnceCell::new() }
    }

    async fn img(&self) -> Result<&QemuImg, HostError> {
        self.img.get_or_try_init(|| QemuImg::find(Some(&self.probes))).await
    }
}

impl DiskTool for QemuDisks {
    fn name(&self) -> String {
        self.img.get().map_or_else(|| "qemu".into(), |img| format!("qemu {}", img.version))
    }

    fn import<'a>(&'a self, disk: &'a Path, to: &'a Path) -> BoxFuture<'a, Result<(), HostError>> {
        Box::pin(async move {
            let source = if qcow2::is_qcow2(disk) { image::standalone(disk) } else { image::raw(disk) };
            self.img().await?.convert(&[source], DiskFormat::Qcow2, Compress::No, to).await
        })
    }

    fn flatten<'a>(&'a self, chain: &'a [PathBuf], to: &'a Path) -> BoxFuture<'a, Result<(), HostError>> {
        Box::pin(async move {
            self.img().await?.convert(&image::qcow2s(chain), DiskFormat::Qcow2, Compress::No, to).await
        })
    }

    fn export<'a>(
        &'a self,
        chain: &'a [PathBuf],
        format: DiskFormat,
        size: Option<u64>,
        to: &'a Path,
    ) -> BoxFuture<'a, Result<(), HostError>> {
        Box::pin(async move {
            let img = self.img().await?;
            img.convert(&image::qcow2s(chain), format, Compress::Yes, to).await?;
            match size {
                Some(size) => img.resize(to, format, size).await,
                None => Ok(()),
            }
        })
    }

    fn alike<'a>(&'a self, below: &'a [PathBuf], a: &'a Made, b: &'a Made) -> BoxFuture<'a, bool> {
        // Reading disks blocks the thread.
        let (below, a, b) = (below.to_vec(), a.clone(), b.clone());
        Box::pin(async move {
            let alike = tokio::task::spawn_blocking(move || difference::alike(&below, &a, &b)).await;
            matches!(alike, Ok(Ok(true)))
        })
    }

    fn problems<'a>(
        &'a self,
        chain: &'a [PathBuf],
        own: bool,
    ) -> BoxFuture<'a, Result<Vec<Problem>, HostError>> {
        // Reading disks blocks the thread.
        let chain = chain.to_vec();
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || bootable::problems(&chain, own)).await;
            read.unwrap_or_else(|e| Err(std::io::Error::other(e)))
                .map_err(|e| HostError::io("the disk can't be read", &e))
        })
    }

    fn revise<'a>(
        &'a self,
        chain: &'a [PathBuf],
        earlier: &'a Exported,
        copies: Vec<File>,
    ) -> BoxFuture<'a, Option<Vec<File>>> {
        // Reading disks blocks the thread.
        let (chain, earlier) = (chain.to_vec(), earlier.clone());
        Box::pin(async move {
            let revise = move || difference::revise(&chain, &earlier, &copies).map(|()| copies);
            tokio::task::spawn_blocking(revise).await.ok()?.ok()
        })
    }
}
