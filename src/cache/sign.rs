//! Signatures of entries, and trusted keys.
//!
//! The envelopes and the signed bytes follow DSSE (Dead Simple Signing
//! Envelope, v1.0.2); the signature is Ed25519.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

const PUBLIC: &str = "ed25519:";
const SECRET: &str = "vimg-secret-ed25519:";

/// A signing key.
#[derive(Clone)]
pub struct Signer(SigningKey);

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({})", self.public())
    }
}

impl Signer {
    /// Makes a new key.
    ///
    /// # Errors
    ///
    /// The system has no randomness.
    pub fn generate() -> std::io::Result<Self> {
        let mut seed = [0; 32];
        let filled = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        if filled < seed.len() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self(SigningKey::from_bytes(&seed)))
    }

    /// Parses the output of [`Signer::secret`]. The error message never
    /// contains the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bytes = key(text, SECRET).ok_or_else(|| {
            let public = text.trim().starts_with(PUBLIC);
            let why =
                if public { "this is a public key, which can't sign" } else { "this is not a signing key" };
            format!("{why}: expected `{SECRET}...`, as `vimg cache keygen` writes it")
        })?;
        Ok(Self(SigningKey::from_bytes(&bytes)))
    }

    /// Encodes the secret key.
    pub fn secret(&self) -> String {
        format!("{SECRET}{}", BASE64.encode(self.0.to_bytes()))
    }

    /// Returns the public half, which readers trust.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// Signs a payload.
    pub fn sign(&self, kind: &str, payload: &[u8]) -> Envelope {
        let signature = self.0.sign(&authenticated(kind, payload));
        Envelope {
            payload_type: kind.to_owned(),
            payload: BASE64.encode(payload),
            signatures: vec![Signed {
                keyid: self.public().to_string(),
                sig: BASE64.encode(signature.to_bytes()),
            }],
        }
    }
}

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// The key's short name in the local store: the beginning of its digest.
    pub fn tag(&self) -> String {
        Digest::of(self.0.as_bytes()).to_string()[..16].to_owned()
    }
}

impl std::fmt::Display for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{PUBLIC}{}", BASE64.encode(self.0.as_bytes()))
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for PublicKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().starts_with(SECRET) {
            return Err("this is a secret key; trust its public half instead".into());
        }
        let bytes = key(text, PUBLIC);
        bytes.and_then(|b| VerifyingKey::from_bytes(&b).ok()).map(Self).ok_or_else(|| {
            format!("this is not a public key: expected `{PUBLIC}...`, as `vimg cache keygen` prints it")
        })
    }
}

fn key(text: &str, prefix: &str) -> Option<[u8; 32]> {
    BASE64.decode(text.trim().strip_prefix(prefix)?).ok()?.try_into().ok()
}

/// The trusted keys, with their domains.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    keys: Vec<(String, PublicKey)>,
    own: Option<PublicKey>,
    /// The domains that this user writes.
    written: Vec<String>,
}

impl Trust {
    /// Trusts a key for a domain. A `*` at the end of the domain matches any
    /// rest.
    pub fn add(&mut self, domain: &str, key: PublicKey) {
        self.keys.push((domain.to_owned(), key));
    }

    /// Trusts the user's own key: for the domains that this user writes, and
    /// for all domains if no other key is trusted.
    pub fn add_own(&mut self, key: PublicKey) {
        self.own = Some(key);
    }

    /// Adds a domain that this user writes.
    pub fn add_written(&mut self, domain: &str) {
        self.written.push(domain.to_owned());
    }

    /// Whether no key is trusted.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.own.is_none()
    }

    /// Whether the key with this tag is trusted for the domain.
    pub fn trusts_tag(&self, domain: &str, tag: &str) -> bool {
        let all = self.keys.iter().map(|(_, key)| key).chain(&self.own);
        all.into_iter().any(|key| key.tag() == tag && self.trusts(domain, key))
    }

    fn trusts(&self, domain: &str, key: &PublicKey) -> bool {
        let fits = |pattern: &str| match pattern.strip_suffix('*') {
            Some(start) => domain.starts_with(start),
            None => domain == pattern,
        };
        let written = self.keys.is_empty() || self.written.iter().any(|d| d == domain);
        (written && self.own.as_ref() == Some(key)) || self.keys.iter().any(|(d, k)| k == key && fits(d))
    }
}

/// Who signed a valid entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// This user's own key.
    Own,
    /// Another trusted key.
    Trusted,
}

/// A signed payload in DSSE's format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// The type of the payload.
    pub payload_type: String,
    /// The payload, in Base64.
    pub payload: String,
    /// The signatures.
    pub signatures: Vec<Signed>,
}

/// A signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The public key.
    pub keyid: String,
    /// The signature, in Base64.
    pub sig: String,
}

impl Envelope {
    /// Decodes the payload, without checking signatures.
    pub fn payload(&self) -> Option<Vec<u8>> {
        BASE64.decode(&self.payload).ok()
    }

    /// Finds the trusted key for `domain` that signed the payload. The error
    /// says why there is none.
    pub fn writer(
        &self,
        kind: &str,
        payload: &[u8],
        domain: &str,
        trust: &Trust,
    ) -> Result<(Writer, PublicKey), String> {
        if self.payload_type != kind {
            return Err(format!("it is signed as `{}`", self.payload_type.escape_default()));
        }
        if self.signatures.is_empty() {
            return Err("it is not signed".into());
        }
        let mut foreign = None;
        for signed in self.signatures.iter().take(8) {
            let Ok(key) = signed.keyid.parse::<PublicKey>() else { continue };
            if !trust.trusts(domain, &key) {
                foreign = Some(key);
                continue;
            }
            let signature = BASE64.decode(&signed.sig).ok().and_then(|b| Signature::from_slice(&b).ok());
            let holds =
                signature.is_some_and(|s| key.0.verify_strict(&authenticated(kind, payload), &s).is_ok());
            return match holds {
                true if trust.own == Some(key) => Ok((Writer::Own, key)),
                true => Ok((Writer::Trusted, key)),
                false => Err("its signature is invalid".into()),
            };
        }
        Err(match foreign {
            Some(key) => format!("it is signed by {key}, which is not trusted for `{domain}`"),
            None => "it has no readable signature".into(),
        })
    }
}

/// Encodes what is signed: DSSE's "pre-authentication encoding".
fn authenticated(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trusted_keys_sign() {
        let (ours, theirs) = (Signer::generate().unwrap(), Signer::generate().unwrap());
        let mut trust = Trust::default();
        let envelope = ours.sign("k", b"payload");
        let ask = |trust: &Trust, domain: &str| {
            envelope.writer("k", b"payload", domain, trust).map(|(writer, _)| writer)
        };
        assert!(ask(&trust, "main").unwrap_err().contains("not trusted for `main`"));
        trust.add("pr-*", ours.public());
        let tag = ours.public().tag();
        assert!(trust.trusts_tag("pr-1", &tag) && !trust.trusts_tag("main", &tag));
        assert!(ask(&trust, "main").is_err());
        assert_eq!(ask(&trust, "pr-12"), Ok(Writer::Trusted));
        trust.add_own(ours.public());
        assert!(ask(&trust, "main").is_err(), "a key for `pr-*` signs for nothing else");
        trust.add_written("main");
        assert_eq!(ask(&trust, "main"), Ok(Writer::Own));
        assert!(envelope.writer("k", b"payloae", "main", &trust).unwrap_err().contains("is invalid"));
        assert!(envelope.writer("j", b"payload", "main", &trust).unwrap_err().contains("signed as"));
        let mut forged = theirs.sign("k", b"payload");
        assert!(forged.writer("k", b"payload", "main", &trust).unwrap_err().contains("not trusted"));
        forged.signatures[0].keyid = ours.public().to_string();
        assert!(forged.writer("k", b"payload", "main", &trust).unwrap_err().contains("is invalid"));
        forged.signatures.clear();
        assert!(forged.writer("k", b"payload", "main", &trust).unwrap_err().contains("not signed"));
    }

    #[test]
    fn keys_are_written_and_read() {
        let signer = Signer::generate().unwrap();
        assert_eq!(Signer::parse(&format!("{}\n", signer.secret())).unwrap().public(), signer.public());
        assert_eq!(signer.public().to_string().parse::<PublicKey>(), Ok(signer.public()));
        assert!(Signer::parse(&signer.public().to_string()).unwrap_err().contains("public key"));
        let error = signer.secret().parse::<PublicKey>().unwrap_err();
        assert!(error.contains("secret key") && !error.contains(&signer.secret()[30..]));
        assert!("ed25519:AAAA".parse::<PublicKey>().is_err());
    }

    /// The example of DSSE's protocol document.
    #[test]
    fn what_is_signed_is_as_the_standard_says() {
        let bytes = authenticated("http://example.com/HelloWorld", b"hello world");
        assert_eq!(bytes, b"DSSEv1 29 http://example.com/HelloWorld 11 hello world");
    }
}
