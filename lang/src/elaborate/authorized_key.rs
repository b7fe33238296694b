//! The form of a public key of SSH: sshd skips a damaged one in silence.

/// The types of keys that sshd takes (sshd(8), "AUTHORIZED_KEYS FILE FORMAT").
const TYPES: [&str; 8] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ssh-dss",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

/// Checks a line of `authorized_keys`; returns it without blanks around it.
pub(super) fn public_key(text: &str) -> Result<String, String> {
    let line = text.trim();
    if line.contains("PRIVATE KEY") {
        return Err("this is a private key, which belongs into no recipe: use the `.pub` file".into());
    }
    if line.contains(char::is_control) {
        return Err("expected one key on one line; write an `authorized-key` for each".into());
    }
    match kind(&words(line)) {
        Some(_) => Ok(line.to_owned()),
        None => Err("expected the line of a `.pub` file, such as `ssh-ed25519 AAAAC3... ada@laptop`".into()),
    }
}

/// Whether the key of such a line is complete.
pub(super) fn is_complete(line: &str) -> bool {
    let words = words(line);
    let Some(at) = kind(&words) else { return false };
    let bytes = words.get(at + 1).and_then(|text| decode(text));
    let fields = bytes.as_deref().and_then(fields);
    fields.is_some_and(|fields| fields.len() > 1 && fields[0] == words[at].as_bytes())
}

/// Finds the type of the key. Only options may be before it.
fn kind(words: &[&str]) -> Option<usize> {
    words.iter().position(|word| TYPES.contains(word)).filter(|at| *at < 2)
}

/// Splits a line at blanks, except for those between quotes: options may have some.
fn words(line: &str) -> Vec<&str> {
    let (mut quoted, mut escaped) = (false, false);
    line.split(|c: char| {
        quoted ^= c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        c.is_ascii_whitespace() && !quoted
    })
    .filter(|word| !word.is_empty())
    .collect()
}

/// Decodes Base64 (RFC 4648, 4).
fn decode(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// Splits the fields of a key, each of which has its length before it (RFC 4253, 6.6).
fn fields(mut bytes: &[u8]) -> Option<Vec<&[u8]>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (field, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        fields.push(field);
        bytes = rest;
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA000000000000000000000000000000000000000001";

    #[test]
    fn lines_of_keys_are_known() {
        for line in [
            KEY.to_owned(),
            format!("{KEY} ada@laptop"),
            format!(" {KEY} of Ada\n"),
            format!(r#"from="10.0.0.0/8",command="echo \"ssh-rsa a\" b" {KEY}"#),
            format!("restrict {KEY}"),
        ] {
            assert_eq!(public_key(&line).as_deref(), Ok(line.trim()));
            assert!(is_complete(line.trim()), "{line}");
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for (line, why) in [
            ("", "`.pub` file"),
            ("SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU", "`.pub` file"),
            (&format!("{KEY}\n{KEY}"), "one line"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn", "private key"),
        ] {
            let message = public_key(line).unwrap_err();
            assert!(message.contains(why), "{line}: {message}");
        }
    }

    #[test]
    fn damaged_keys_are_known() {
        for line in [
            "ssh-ed25519",
            "ssh-ed25519 AAAA ada",
            &KEY[..KEY.len() - 4],
            &KEY[..KEY.len() - 1],
            &format!("{KEY}0"),
            &KEY.replace("ed25519", "rsa"),
        ] {
            assert!(public_key(line).is_ok() && !is_complete(line), "{line}");
        }
    }
}
