//! The agent's end of the channel to the host: sends messages, receives blobs.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::offline;
use crate::protocol::{self, Blob, Digest, Frame, FromAgent, Malformed, ToAgent};

/// Sends messages. Clones may be used in other threads.
#[derive(Clone)]
pub(crate) struct Sender {
    out: Arc<Mutex<Box<dyn Write + Send>>>,
}

impl Sender {
    pub(crate) fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out: Arc::new(Mutex::new(out)) }
    }

    pub(crate) fn send(&self, message: &FromAgent) -> io::Result<()> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        protocol::write_message(&mut *out, message)
    }

    /// Sends bytes unchanged.
    pub(crate) fn raw(&self, bytes: &[u8]) -> io::Result<()> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out.write_all(bytes)?;
        out.flush()
    }
}

/// Receives frames, and requests blobs.
pub(crate) struct Channel {
    pub(crate) sender: Sender,
    input: Box<dyn Read + Send>,
    /// Whether the network is enabled, once that is known.
    open: Option<bool>,
}

/// A frame or handshake from the host.
pub(crate) enum Received {
    Message(ToAgent),
    /// Input of a program.
    Data(Vec<u8>),
    /// A new handshake with this nonce.
    Sync([u8; 8]),
    /// The end of the channel.
    End,
}

impl Channel {
    pub(crate) fn new(input: Box<dyn Read + Send>, sender: Sender) -> Self {
        Self { sender, input, open: None }
    }

    /// Waits for the next message or handshake.
    pub(crate) fn receive(&mut self) -> io::Result<Received> {
        let mut header = [0; 4];
        if let Err(error) = self.input.read_exact(&mut header) {
            return match error.kind() {
                io::ErrorKind::UnexpectedEof => Ok(Received::End),
                _ => Err(error),
            };
        }
        if header == protocol::SYNC[..4] {
            let mut rest = [0; 20];
            self.input.read_exact(&mut rest)?;
            if rest[..12] != protocol::SYNC[4..] {
                return Err(Malformed("incomplete handshake".into()).into());
            }
            let mut nonce = [0; 8];
            nonce.copy_from_slice(&rest[12..]);
            return Ok(Received::Sync(nonce));
        }
        let mut body = vec![0; Frame::length(header)?];
        self.input.read_exact(&mut body)?;
        Ok(match Frame::from_body(body)? {
            Frame::Data(bytes) => Received::Data(bytes),
            frame => Received::Message(frame.message()?),
        })
    }

    /// Requests blobs, a few thousand at most. Read them with [`Channel::blob`], in the
    /// same order.
    pub(crate) fn request(&mut self, blobs: &[Blob]) -> io::Result<()> {
        let digests: Vec<Digest> = blobs.iter().map(|b| b.digest).collect();
        self.sender.send(&FromAgent::Fetch { digests })
    }

    /// Writes a requested blob to `out` and checks its digest.
    pub(crate) fn blob(&mut self, blob: Blob, out: &mut dyn Write) -> io::Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut left = blob.size;
        // An empty blob has one frame, too.
        loop {
            let Some(Frame::Data(bytes)) = protocol::read_frame(&mut self.input)? else {
                return Err(Malformed("unexpected message: expected data".into()).into());
            };
            let Some(rest) = left.checked_sub(bytes.len() as u64) else {
                return Err(Malformed("more data than expected".into()).into());
            };
            left = rest;
            hasher.update(&bytes);
            out.write_all(&bytes)?;
            if left == 0 {
                break;
            }
        }
        if *hasher.finalize().as_bytes() != blob.digest.0 {
            return Err(Malformed("data with an unexpected digest".into()).into());
        }
        Ok(())
    }

    /// Enables or disables the network; returns once the host has done so.
    pub(crate) fn network(&mut self, open: bool) -> io::Result<()> {
        if self.open == Some(open) {
            return Ok(());
        }
        self.sender.send(&FromAgent::Network { open })?;
        match self.receive()? {
            Received::Message(ToAgent::Network { variables }) => {
                offline::set_proxies(if open { variables } else { Vec::new() });
                self.open = Some(open);
                Ok(())
            }
            _ => Err(Malformed("unexpected message: expected the reply to a network request".into()).into()),
        }
    }

    /// Forgets whether the network is enabled: the host may have disabled it.
    pub(crate) fn forget_network(&mut self) {
        self.open = None;
    }

    /// Fetches a secret of at most 1 MiB.
    pub(crate) fn secret(&mut self, name: &str) -> io::Result<Vec<u8>> {
        self.sender.send(&FromAgent::FetchSecret { name: name.to_owned() })?;
        let mut secret = Vec::new();
        loop {
            match protocol::read_frame(&mut self.input)? {
                Some(Frame::Data(bytes)) if bytes.is_empty() => return Ok(secret),
                Some(Frame::Data(bytes)) if secret.len() + bytes.len() <= 1 << 20 => secret.extend(bytes),
                Some(Frame::Data(_)) => {
                    return Err(Malformed("the secret is larger than 1 MiB".into()).into());
                }
                _ => return Err(Malformed("unexpected message: expected a secret".into()).into()),
            }
        }
    }

    /// Reads a requested blob of at most 64 MiB into memory.
    pub(crate) fn bytes(&mut self, blob: Blob) -> io::Result<Vec<u8>> {
        if blob.size > 64 << 20 {
            return Err(Malformed("the blob is larger than 64 MiB".into()).into());
        }
        let mut out = Vec::with_capacity(blob.size as usize);
        self.blob(blob, &mut out)?;
        Ok(out)
    }

    /// Sends a file as frames of data, followed by an empty frame of data.
    pub(crate) fn send_file(&self, path: &str) -> io::Result<()> {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; protocol::CHUNK];
        loop {
            let n = file.read(&mut buffer)?;
            self.sender.raw(&protocol::encode_data(&buffer[..n])?)?;
            if n == 0 {
                return Ok(());
            }
        }
    }
}
