//! DER, element by element, for what is read by hand: where a library would sort, or refuse what OpenSSL takes.
//!
//! Owns tags, lengths and object identifiers. Copies nothing, and knows nothing of certificates.

/// One element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Element<'a> {
    /// Its first byte: class, form and number.
    pub(super) tag: u8,
    /// With tag and length.
    pub(super) whole: &'a [u8],
    pub(super) content: &'a [u8],
}

/// Takes the first element off `der`; `None`: it is not whole, or of a form that no certificate needs.
pub(super) fn take<'a>(der: &mut &'a [u8]) -> Option<Element<'a>> {
    let bytes = *der;
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    if tag & LONG_TAG == LONG_TAG || first == INDEFINITE_LENGTH {
        return None;
    }
    let (length, rest) = if first < INDEFINITE_LENGTH {
        (usize::from(first), rest)
    } else {
        let (length, rest) = rest.split_at_checked(usize::from(first & !INDEFINITE_LENGTH))?;
        if length.len() > LENGTH_BYTES_MAX {
            return None;
        }
        (length.iter().fold(0, |all, byte| all << 8 | usize::from(*byte)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    let whole = bytes.get(..bytes.len() - rest.len())?;
    *der = rest;
    Some(Element { tag, whole, content })
}

/// All elements of a content.
pub(super) fn elements(mut content: &[u8]) -> Option<Vec<Element<'_>>> {
    let mut elements = Vec::new();
    while !content.is_empty() {
        elements.push(take(&mut content)?);
    }
    Some(elements)
}

/// The content of an object identifier in text, as in `2.5.4.3`.
pub(super) fn object_identifier(content: &[u8]) -> Option<String> {
    if content.last()? & MORE_FOLLOWS != 0 {
        return None;
    }
    let mut text = String::new();
    let mut number: u128 = 0;
    let mut is_at_start = true;
    for byte in content {
        // Zeros in front say nothing.
        if is_at_start && *byte == MORE_FOLLOWS {
            return None;
        }
        number = number.checked_mul(1 << 7)? | u128::from(byte & !MORE_FOLLOWS);
        is_at_start = byte & MORE_FOLLOWS == 0;
        if is_at_start {
            if text.is_empty() {
                // The first two numbers share a place.
                let first = (number / 40).min(2);
                text = format!("{first}.{}", number - first * 40);
            } else {
                text.push_str(&format!(".{number}"));
            }
            number = 0;
        }
    }
    Some(text)
}

pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const SET: u8 = 0x31;

/// A tag whose number does not fit into its byte.
const LONG_TAG: u8 = 0x1f;
/// The length is not told; greater ones are numbers of bytes that tell it.
const INDEFINITE_LENGTH: u8 = 0x80;
/// Bytes of the greatest length that is read.
const LENGTH_BYTES_MAX: usize = 4;
/// The number goes on in the next byte.
const MORE_FOLLOWS: u8 = 0x80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_taken_whole_or_not_at_all() {
        let mut der: &[u8] = &[0x30, 2, 5, 0, 4, 0x81, 1, 7];
        let first = take(&mut der).unwrap();
        assert_eq!((first.tag, first.whole, first.content), (0x30, &[0x30, 2, 5, 0][..], &[5, 0][..]));
        assert_eq!(take(&mut der).unwrap().content, [7]);
        assert_eq!((take(&mut der), der.len()), (None, 0));
        for wrong in [
            &[0x30][..],
            &[0x30, 1],
            &[0x30, 0x80, 0, 0],
            &[0x1f, 1, 0],
            &[4, 0x82, 1],
            &[4, 0x85, 0, 0, 0, 0, 0],
            &[4, 0x84, 0xff, 0xff, 0xff, 0xff, 0],
        ] {
            assert_eq!(elements(wrong), None, "{wrong:?}");
        }
        assert_eq!(elements(&[]), Some(Vec::new()));
    }

    #[test]
    fn object_identifiers_are_printed_in_numbers() {
        let text = |content: &[u8]| object_identifier(content);
        assert_eq!(text(&[0x55, 4, 3]).as_deref(), Some("2.5.4.3"));
        assert_eq!(text(&[0x2a, 0x86, 0x48]).as_deref(), Some("1.2.840"));
        assert_eq!(text(&[0x88, 0x37, 1]).as_deref(), Some("2.999.1"));
        assert_eq!(text(&[39]).as_deref(), Some("0.39"));
        for wrong in [&[][..], &[0x80, 1], &[0x55, 0x84], &[0x55, 0x80, 4], &[0xff; 20]] {
            assert_eq!(text(wrong), None, "{wrong:?}");
        }
    }
}
