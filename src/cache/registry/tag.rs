//! The tags of records and builds.

use crate::cache::object::Object;
use crate::cache::spec::is_name;
use crate::digest::Key;

/// The tag of an object; `None` for blobs. Domains and names contain no
/// `:`, like tags.
pub(super) fn of(object: &Object) -> Option<String> {
    match object {
        Object::Record { domain, key } => Some(format!("r-{domain}-{key}")),
        Object::Build { domain, name } => Some(format!("b-{}-{domain}-{name}", domain.len())),
        Object::Pack(_) | Object::Tombstones | Object::Aside(_) => None,
    }
}

/// Returns the object of a tag, if it is one of vimg.
pub(super) fn parse(tag: &str) -> Option<Object> {
    if let Some(rest) = tag.strip_prefix("r-") {
        let (domain, key) = rest.rsplit_once('-').filter(|(domain, _)| is_name(domain))?;
        return Some(Object::Record { domain: domain.to_owned(), key: Key(key.parse().ok()?) });
    }
    let (length, rest) = tag.strip_prefix("b-")?.split_once('-')?;
    let (domain, name) = rest.split_at_checked(length.parse().ok()?)?;
    Some(Object::Build { domain: domain.to_owned(), name: name.strip_prefix('-')?.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_read_as_they_were_written() {
        let key = Key(crate::digest::Digest::of(b"x"));
        let objects = [
            Object::Record { domain: "pr-12".into(), key },
            Object::Build { domain: "a-b.c".into(), name: "web-1".into() },
        ];
        for object in objects {
            let tag = of(&object).unwrap();
            assert!(tag.len() <= 128, "{tag}");
            assert_eq!(parse(&tag), Some(object));
        }
        assert_eq!(parse("latest"), None);
        assert_eq!(parse("b-99-x-y"), None);
    }
}
