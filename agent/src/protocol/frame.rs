//! Frames, which carry messages and data.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest frame in bytes, including the kind.
pub const MAX_FRAME: usize = 1 << 20;

/// The start of the handshake. Its first four bytes are not a valid length, so an agent
/// that waits for a frame recognises a new handshake.
pub const SYNC: [u8; 16] = *b"\xff\xff\xff\xffvimg-sync-1\n";

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A message as JSON.
    Message(Vec<u8>),
    /// Bytes of a file or stream.
    Data(Vec<u8>),
}

const MESSAGE: u8 = 0;
const DATA: u8 = 1;

/// Why a frame is invalid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed(pub String);

impl From<Malformed> for io::Error {
    fn from(malformed: Malformed) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, malformed.0)
    }
}

impl Frame {
    /// Decodes and checks the length, the first four bytes of a frame.
    pub fn length(header: [u8; 4]) -> Result<usize, Malformed> {
        let length = u32::from_le_bytes(header) as usize;
        if length == 0 || length > MAX_FRAME {
            return Err(Malformed(format!("invalid frame of {length} bytes")));
        }
        Ok(length)
    }

    /// Decodes a frame from the bytes after the length.
    pub fn from_body(mut body: Vec<u8>) -> Result<Self, Malformed> {
        match body.first() {
            Some(&MESSAGE) => Ok(Self::Message(body.split_off(1))),
            Some(&DATA) => Ok(Self::Data(body.split_off(1))),
            Some(kind) => Err(Malformed(format!("unknown kind of frame: {kind}"))),
            None => Err(Malformed("empty frame".into())),
        }
    }

    /// Decodes the message of a frame.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M, Malformed> {
        match self {
            Self::Message(bytes) => {
                serde_json::from_slice(bytes).map_err(|e| Malformed(format!("invalid message: {e}")))
            }
            Self::Data(_) => Err(Malformed("unexpected data: expected a message".into())),
        }
    }
}

/// Encodes a message as a frame.
pub fn encode_message<M: Serialize>(message: &M) -> io::Result<Vec<u8>> {
    encode(MESSAGE, &serde_json::to_vec(message)?)
}

/// Encodes a frame of data.
pub fn encode_data(bytes: &[u8]) -> io::Result<Vec<u8>> {
    encode(DATA, bytes)
}

fn encode(kind: u8, payload: &[u8]) -> io::Result<Vec<u8>> {
    let length = payload.len() + 1;
    if length > MAX_FRAME {
        return Err(Malformed(format!("invalid frame of {length} bytes")).into());
    }
    let mut out = Vec::with_capacity(length + 4);
    out.extend((length as u32).to_le_bytes());
    out.push(kind);
    out.extend(payload);
    Ok(out)
}

/// Reads a frame; `None` at the end of the stream.
pub fn read_frame(reader: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0; 4];
    if let Err(error) = reader.read_exact(&mut header) {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => Ok(None),
            _ => Err(error),
        };
    }
    let mut body = vec![0; Frame::length(header)?];
    reader.read_exact(&mut body)?;
    Ok(Some(Frame::from_body(body)?))
}

/// Writes a message.
pub fn write_message<M: Serialize>(writer: &mut impl Write, message: &M) -> io::Result<()> {
    writer.write_all(&encode_message(message)?)?;
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::super::blob::CHUNK;
    use super::super::message::FromAgent;
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let message = FromAgent::Output { step: 3, text: "é".into() };
        let mut wire = encode_message(&message).unwrap();
        wire.extend(encode_data(b"abc").unwrap());
        let mut reader = wire.as_slice();
        assert_eq!(read_frame(&mut reader).unwrap().unwrap().message(), Ok(message));
        assert_eq!(read_frame(&mut reader).unwrap(), Some(Frame::Data(b"abc".to_vec())));
        assert_eq!(read_frame(&mut reader).unwrap(), None);
    }

    #[test]
    fn lengths_are_checked_before_allocation() {
        assert!(Frame::length(u32::MAX.to_le_bytes()).is_err());
        assert!(Frame::length(0_u32.to_le_bytes()).is_err());
        assert!(Frame::length([SYNC[0], SYNC[1], SYNC[2], SYNC[3]]).is_err());
        assert!(read_frame(&mut [5, 0, 0, 0, 0, 1].as_slice()).is_err());
        assert!(read_frame(&mut [1, 0, 0, 0, 9].as_slice()).is_err());
    }

    const _: () = assert!(CHUNK < MAX_FRAME);

    #[test]
    fn every_frame_within_the_cap_is_legal() {
        assert!(encode_data(&vec![0; MAX_FRAME]).is_err());
        assert!(encode_data(&vec![0; MAX_FRAME - 1]).is_ok());
    }
}
