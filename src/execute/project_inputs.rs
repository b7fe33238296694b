//! Gives workers the files of the project and the secrets.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use vimg_lang::FileRef;

use super::context::Secrets;
use super::inputs::Inputs;
use super::session::Source;
use crate::digest::Digest;
use crate::files::{FileError, Project};
use crate::graph::{BlobSource, LayerWork};

/// The files of layers, and the secrets.
pub(super) struct ProjectInputs {
    project: Arc<Project>,
    secrets: Arc<Secrets>,
    sources: BTreeMap<Digest, BlobSource>,
}

impl ProjectInputs {
    /// Makes the inputs for layers of the project.
    pub(super) fn new<'a>(
        project: Arc<Project>,
        secrets: Arc<Secrets>,
        layers: impl Iterator<Item = &'a LayerWork>,
    ) -> Self {
        let mut sources = BTreeMap::new();
        for (digest, source) in layers.flat_map(|layer| &layer.blobs) {
            // Of equal files, the first layer's is read: a failure is placed there.
            sources.entry(*digest).or_insert_with(|| source.clone());
        }
        Self { project, secrets, sources }
    }
}

impl Inputs for ProjectInputs {
    fn blob(&self, digest: &Digest, to: &Path) -> Result<Source, FileError> {
        match self.sources.get(digest) {
            Some(BlobSource::Bytes(bytes)) => Ok(Source::Bytes(bytes.clone())),
            Some(BlobSource::File(file)) => {
                self.project.copy(file, digest, to)?;
                Ok(Source::File(to.to_owned()))
            }
            None => {
                let (file, why) = (digest.to_string(), "no layer of the order has it".to_owned());
                Err(FileError { file, why, is_full: false })
            }
        }
    }

    fn open(&self, file: &FileRef) -> io::Result<File> {
        self.project.open_file(&file.path)
    }

    fn secret(&self, name: &str) -> Result<Arc<[u8]>, String> {
        self.secrets.get(name).cloned().unwrap_or_else(|| Err("it is unknown".to_owned()))
    }
}
