//! The attributes of a SCRAM message: `a=value,b=value`.
//!
//! Takes one attribute at a time off the front; what a fault is called is each side's own matter.

/// What is wrong with an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttributeError {
    /// Another attribute, or none, is there.
    Expected { attribute: char, found: Option<char> },
    /// No `=` follows the attribute.
    NoEquals { attribute: char },
    /// The message ends where an attribute must be.
    End,
    /// No attribute has this name.
    Invalid { found: char },
}

/// Takes the attribute `attribute`.
pub(super) fn take<'a>(rest: &mut &'a str, attribute: char) -> Result<&'a str, AttributeError> {
    let after = rest
        .strip_prefix(attribute)
        .ok_or(AttributeError::Expected { attribute, found: rest.chars().next() })?;
    value(rest, after, attribute)
}

/// Takes whatever attribute is next.
pub(super) fn take_any<'a>(rest: &mut &'a str) -> Result<(char, &'a str), AttributeError> {
    let mut characters = rest.chars();
    match characters.next() {
        None => Err(AttributeError::End),
        Some(attribute) if attribute.is_ascii_alphabetic() => {
            Ok((attribute, value(rest, characters.as_str(), attribute)?))
        }
        Some(found) => Err(AttributeError::Invalid { found }),
    }
}

fn value<'a>(rest: &mut &'a str, after: &'a str, attribute: char) -> Result<&'a str, AttributeError> {
    let after = after.strip_prefix('=').ok_or(AttributeError::NoEquals { attribute })?;
    let (value, next) = after.split_once(',').unwrap_or((after, ""));
    *rest = next;
    Ok(value)
}

/// Whether a nonce has only the characters it may have (RFC 5802, `printable`).
pub(super) fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',')
}

/// A character as it is shown in messages (`sanitize_char`); `None` is the end of the message.
pub(super) fn sanitized(character: Option<char>) -> String {
    match character {
        Some(character) if character.is_ascii_graphic() => character.to_string(),
        Some(character) => {
            let mut bytes = [0; 4];
            let first = character.encode_utf8(&mut bytes).bytes().next().unwrap_or(0);
            format!("0x{first:02x}")
        }
        None => "0x00".to_owned(),
    }
}
