//! Whom a client's certificate names, in the texts that PostgreSQL compares.
//!
//! Owns the common name and the distinguished name. The latter is OpenSSL's `X509_NAME_print_ex` with `XN_FLAG_RFC2253`, byte
//! for byte, which is not quite what the RFC says: attributes have OpenSSL's short names, what is not ASCII is escaped byte by
//! byte, and attributes that stand together stand in reverse order too. Read by hand, because a library sorts such attributes.

use crate::net::ClientCertificate;
use crate::net::tls::der::{self, Element};
use crate::net::tls::short_names::SHORT_NAMES;

/// A name as a certificate has it.
#[derive(Clone, Debug)]
pub(super) struct Subject<'a> {
    attributes: Vec<Attribute<'a>>,
}

#[derive(Clone, Debug)]
struct Attribute<'a> {
    /// Which of the sets it stands in; those of one set stand together.
    set: usize,
    /// In numbers.
    kind: String,
    value: Element<'a>,
}

impl<'a> Subject<'a> {
    /// The subject of a certificate; `None`: OpenSSL could not read it either.
    pub(super) fn of(certificate: &'a [u8]) -> Option<Self> {
        let mut rest = certificate;
        let mut signed = der::take(&mut rest)?.content;
        let fields = der::elements(der::take(&mut signed)?.content)?;
        // The version, which may be absent, then number, algorithm, issuer and validity.
        let is_version = fields.first()?.tag == VERSION;
        let subject = fields.get(4 + usize::from(is_version)).filter(|field| field.tag == der::SEQUENCE)?;
        let mut attributes = Vec::new();
        for (set, one) in der::elements(subject.content)?.into_iter().enumerate() {
            if one.tag != der::SET {
                return None;
            }
            for attribute in der::elements(one.content)? {
                attributes.push(Attribute::of(set, attribute)?);
            }
        }
        Some(Self { attributes })
    }

    /// As rules about clients know it. A common name with a zero byte in it names nobody (CVE-2009-4034), in whatever encoding.
    pub(super) fn client(&self) -> Option<ClientCertificate> {
        let common_name = self.attributes.iter().find(|attribute| attribute.kind == COMMON_NAME);
        let common_name = common_name.map(|attribute| attribute.value.content);
        if common_name.is_some_and(|name| name.contains(&0)) {
            return None;
        }
        let common_name = common_name.and_then(|name| std::str::from_utf8(name).ok()).map(str::to_owned);
        Some(ClientCertificate { common_name, distinguished_name: self.text() })
    }

    /// The last attribute first.
    fn text(&self) -> String {
        let mut text = String::new();
        let mut previous = None;
        for attribute in self.attributes.iter().rev() {
            match previous {
                Some(set) if set == attribute.set => text.push('+'),
                Some(_) => text.push(','),
                None => {}
            }
            previous = Some(attribute.set);
            attribute.print(&mut text);
        }
        text
    }
}

impl<'a> Attribute<'a> {
    fn of(set: usize, attribute: Element<'a>) -> Option<Self> {
        let parts = der::elements(attribute.content)?;
        let [kind, value] = parts.as_slice() else { return None };
        if attribute.tag != der::SEQUENCE || kind.tag != der::OBJECT_IDENTIFIER {
            return None;
        }
        let is_readable = OTHER_TAGS.contains(&value.tag) || characters(value).is_some();
        is_readable.then_some(Self { set, kind: der::object_identifier(kind.content)?, value: *value })
    }

    fn print(&self, text: &mut String) {
        let known = SHORT_NAMES.iter().find(|(kind, _)| *kind == self.kind).map(|(_, name)| *name);
        let kind = self.kind.get(..KIND_BYTES_MAX.min(self.kind.len())).unwrap_or_default();
        text.push_str(known.unwrap_or(kind));
        text.push('=');
        // Of what it does not know OpenSSL shows all bytes, also where they are text.
        match characters(&self.value).filter(|_| known.is_some()) {
            Some(characters) => escape(&characters, text),
            None => {
                text.push('#');
                self.value.whole.iter().for_each(|byte| push_hexadecimal(*byte, text));
            }
        }
    }
}

/// The characters of a value; `None`: it is no text.
fn characters(value: &Element<'_>) -> Option<String> {
    let bytes = value.content;
    match value.tag {
        UTF8_STRING => std::str::from_utf8(bytes).ok().map(str::to_owned),
        // OpenSSL takes T.61 for Latin-1, and does not look whether the others hold to their alphabets.
        NUMERIC_STRING | PRINTABLE_STRING | T61_STRING | IA5_STRING => {
            Some(bytes.iter().copied().map(char::from).collect())
        }
        BMP_STRING => {
            let units =
                bytes.chunks(2).map(|unit| Some(u32::from(u16::from_be_bytes(unit.try_into().ok()?))));
            units.map(|unit| char::from_u32(unit?)).collect()
        }
        UNIVERSAL_STRING => {
            let units = bytes.chunks(4).map(|unit| Some(u32::from_be_bytes(unit.try_into().ok()?)));
            units.map(|unit| char::from_u32(unit?)).collect()
        }
        _ => None,
    }
}

fn escape(characters: &str, text: &mut String) {
    let last = characters.chars().count().saturating_sub(1);
    for (index, character) in characters.chars().enumerate() {
        let is_special = match character {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => true,
            ' ' => index == 0 || index == last,
            // Alone it is the last one, and then not the first one.
            '#' => index == 0 && last > 0,
            _ => false,
        };
        if is_special {
            text.push('\\');
        }
        if matches!(character, ' '..='~') {
            text.push(character);
            continue;
        }
        for byte in character.encode_utf8(&mut [0; 4]).bytes() {
            text.push('\\');
            push_hexadecimal(byte, text);
        }
    }
}

fn push_hexadecimal(byte: u8, text: &mut String) {
    text.push_str(&format!("{byte:02X}"));
}

const COMMON_NAME: &str = "2.5.4.3";

/// `[0]`, in which a certificate has its version.
const VERSION: u8 = 0xa0;

const UTF8_STRING: u8 = 12;
const NUMERIC_STRING: u8 = 18;
const PRINTABLE_STRING: u8 = 19;
const T61_STRING: u8 = 20;
const IA5_STRING: u8 = 22;
const UNIVERSAL_STRING: u8 = 28;
const BMP_STRING: u8 = 30;
/// What OpenSSL lets a name have beside texts: a bit string and a sequence.
const OTHER_TAGS: [u8; 2] = [3, der::SEQUENCE];

/// OpenSSL has no room for more.
const KIND_BYTES_MAX: usize = 79;

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    /// An attribute: its kind, the tag of its value, and the value.
    type Given = (&'static str, u8, Vec<u8>);

    fn element(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        let mut der = vec![tag, 0x82];
        if content.len() < 0x80 {
            der = vec![tag, length[1]];
        } else if content.len() < 0x100 {
            der = vec![tag, 0x81, length[1]];
        } else {
            der.extend(length);
        }
        der.extend(content);
        der
    }

    fn object(text: &str) -> Vec<u8> {
        let numbers: Vec<u128> = text.split('.').map(|number| number.parse().unwrap()).collect();
        let mut content = Vec::new();
        for number in std::iter::once(numbers[0] * 40 + numbers[1]).chain(numbers[2..].iter().copied()) {
            let mut places = vec![u8::try_from(number & 0x7f).unwrap()];
            let mut rest = number >> 7;
            while rest > 0 {
                places.push(u8::try_from(rest & 0x7f).unwrap() | 0x80);
                rest >>= 7;
            }
            content.extend(places.into_iter().rev());
        }
        element(der::OBJECT_IDENTIFIER, &content)
    }

    /// A certificate that nobody has signed, with this subject.
    fn certificate(sets: &[Vec<Given>]) -> Vec<u8> {
        let attribute = |(kind, tag, value): &Given| {
            element(der::SEQUENCE, &[object(kind), element(*tag, value)].concat())
        };
        let set = |set: &Vec<Given>| element(der::SET, &set.iter().flat_map(attribute).collect::<Vec<_>>());
        let subject = element(der::SEQUENCE, &sets.iter().flat_map(set).collect::<Vec<_>>());
        let algorithm = |kind: &str| element(der::SEQUENCE, &[object(kind), element(5, &[])].concat());
        let signature = algorithm("1.2.840.113549.1.1.11");
        let time = element(23, b"250101000000Z");
        let key_bits = element(3, &[0, der::SEQUENCE, 6, 2, 1, 3, 2, 1, 3]);
        let key = element(der::SEQUENCE, &[algorithm("1.2.840.113549.1.1.1"), key_bits].concat());
        let version = element(VERSION, &element(2, &[2]));
        let (number, issuer) = (element(2, &[1]), element(der::SEQUENCE, &[]));
        let validity = element(der::SEQUENCE, &[time.clone(), time].concat());
        let signed = [version, number, signature.clone(), issuer, validity, subject, key].concat();
        let signed = element(der::SEQUENCE, &signed);
        element(der::SEQUENCE, &[signed, signature, element(3, &[0, 1])].concat())
    }

    fn ours(sets: &[Vec<Given>]) -> Option<String> {
        let certificate = certificate(sets);
        Subject::of(&certificate).map(|subject| subject.text())
    }

    /// What OpenSSL prints; `None`: it cannot read the certificate.
    fn theirs(sets: &[Vec<Given>]) -> Option<String> {
        let arguments = ["x509", "-inform", "DER", "-noout", "-subject", "-nameopt", "RFC2253"];
        let mut program = Command::new("openssl");
        program.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = program.spawn().unwrap();
        child.stdin.take().unwrap().write_all(&certificate(sets)).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        output
            .status
            .success()
            .then(|| text.trim_end_matches('\n').strip_prefix("subject=").unwrap().to_owned())
    }

    /// Whether there is something to compare with.
    fn is_openssl_here() -> bool {
        let is_here = Command::new("openssl").arg("version").stdout(Stdio::null()).status().is_ok();
        assert!(is_here || std::env::var("CI").as_deref() != Ok("true"), "openssl is needed");
        if !is_here {
            eprintln!("skipped: there is no openssl");
        }
        is_here
    }

    fn text(kind: &'static str, value: &str) -> Given {
        (kind, UTF8_STRING, value.as_bytes().to_vec())
    }

    #[test]
    fn names_are_printed_as_postgresql_compares_them() {
        let printed = |sets: &[Vec<Given>]| ours(sets).unwrap();
        let email = ("1.2.840.113549.1.9.1", IA5_STRING, b"ops@x".to_vec());
        assert_eq!(printed(&[vec![text("2.5.4.3", "edge")], vec![email]]), "emailAddress=ops@x,CN=edge");
        assert_eq!(printed(&[vec![text("2.5.4.10", "Müller")]]), r"O=M\C3\BCller");
        let latin = ("2.5.4.10", T61_STRING, b"M\xfcller".to_vec());
        assert_eq!(printed(&[vec![latin]]), r"O=M\C3\BCller");
        let two_bytes = ("2.5.4.10", BMP_STRING, b"\0M\0\xfc\x20\xac".to_vec());
        let four_bytes = ("2.5.4.10", UNIVERSAL_STRING, b"\0\0\0M\0\x01\xf6\0".to_vec());
        assert_eq!(printed(&[vec![two_bytes], vec![four_bytes]]), r"O=M\F0\9F\98\80,O=M\C3\BC\E2\82\AC");
        let serial = ("2.5.4.5", PRINTABLE_STRING, b"7".to_vec());
        let together = vec![text("2.5.4.10", "a"), text("2.5.4.3", "b"), serial];
        assert_eq!(printed(&[together, vec![text("2.5.4.3", "c")]]), "CN=c,serialNumber=7+CN=b+O=a");
        assert_eq!(printed(&[vec![text("1.3.6.1.4.1.99999.1", "abc")]]), "1.3.6.1.4.1.99999.1=#0C03616263");
        assert_eq!(printed(&[vec![text("2.5.4.3", " #a\\,b ")]]), r"CN=\ #a\\\,b\ ");
        assert_eq!(printed(&[]), "");
    }

    #[test]
    fn a_common_name_with_a_zero_byte_names_nobody() {
        let client = |given: Given| Subject::of(&certificate(&[vec![given]])).unwrap().client();
        assert_eq!(client(text("2.5.4.3", "edge")).unwrap().common_name.as_deref(), Some("edge"));
        assert_eq!(client(text("2.5.4.3", "edge\0.evil")), None);
        assert_eq!(client(("2.5.4.3", BMP_STRING, b"\0e".to_vec())), None);
        let elsewhere = client(text("2.5.4.10", "a\0b")).unwrap();
        assert_eq!((elsewhere.common_name, elsewhere.distinguished_name.as_str()), (None, r"O=a\00b"));
    }

    #[test]
    fn no_certificate_cut_short_has_a_subject() {
        let whole = certificate(&[vec![text("2.5.4.3", "edge")], vec![text("2.5.4.10", "o")]]);
        for length in 0..whole.len() {
            assert!(Subject::of(&whole[..length]).is_none(), "{length} bytes");
        }
    }

    struct Random(u64);

    impl Random {
        /// xorshift64
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 >> 33).unwrap() % limit
        }

        fn pick<T: Clone>(&mut self, from: &[T]) -> T {
            from[self.below(from.len())].clone()
        }

        fn value(&mut self) -> (u8, Vec<u8>) {
            let pieces = [
                "a", "Z9", " ", "#", "+", ",", ";", "<", ">", "\"", "\\", "=", "/", "é", "€", "😀", "\0",
                "\n",
            ];
            let characters: String = (0..self.below(6)).map(|_| self.pick(&pieces)).collect();
            let narrow: Vec<u8> = characters.chars().filter_map(|one| u8::try_from(one).ok()).collect();
            let (two, four) = (
                characters.encode_utf16().flat_map(u16::to_be_bytes).collect::<Vec<_>>(),
                characters.chars().flat_map(|one| u32::from(one).to_be_bytes()).collect::<Vec<_>>(),
            );
            match self.below(40) {
                0..20 => (UTF8_STRING, characters.into_bytes()),
                20..23 => (PRINTABLE_STRING, narrow),
                23..26 => (T61_STRING, narrow),
                26..28 => (IA5_STRING, narrow),
                28 => (NUMERIC_STRING, narrow),
                29..31 => (BMP_STRING, two),
                31..33 => (UNIVERSAL_STRING, four),
                33..35 => (3, [&[0], narrow.as_slice()].concat()),
                35 => (der::SEQUENCE, element(UTF8_STRING, characters.as_bytes())),
                36 => {
                    (self.pick(&[UTF8_STRING, BMP_STRING, UNIVERSAL_STRING]), [&four[..], &[0xff]].concat())
                }
                37 => (self.pick(&[4, 21, 26, 27]), narrow),
                _ => (UTF8_STRING, characters.repeat(40).into_bytes()),
            }
        }

        fn kind(&mut self) -> &'static str {
            let unknown = [
                "1.3.6.1.4.1.99999.1",
                "2.999.77777777777",
                "2.5.4.9999",
                "1.3.6.1.4.1.99999.4294967295.1.2",
            ];
            match self.below(8) {
                0 => self.pick(&unknown),
                1..4 => self.pick(SHORT_NAMES).0,
                _ => self.pick(&["2.5.4.3", "2.5.4.10", "2.5.4.11", "2.5.4.5", "0.9.2342.19200300.100.1.25"]),
            }
        }

        fn subject(&mut self) -> Vec<Vec<Given>> {
            let mut sets = Vec::new();
            for _ in 0..1 + self.below(4) {
                let mut set = Vec::new();
                for _ in 0..1 + self.below(3) {
                    let kind = self.kind();
                    let (tag, value) = self.value();
                    set.push((kind, tag, value));
                }
                sets.push(set);
            }
            sets
        }
    }

    #[test]
    fn any_subject_is_printed_as_openssl_prints_it() {
        if !is_openssl_here() {
            return;
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (mut good, mut wrong) = (0, 0);
        for _ in 0..400 {
            let sets = random.subject();
            let expected = theirs(&sets);
            assert_eq!(ours(&sets), expected, "{sets:?}");
            if expected.is_some() { good += 1 } else { wrong += 1 }
        }
        println!("{good} subjects printed, {wrong} refused by both");
        assert!(good > 200 && wrong > 20);
        // As long as OpenSSL prints a kind, and longer.
        let long =
            "1.3.4294967295.4294967295.4294967295.4294967295.4294967295.4294967295.4294967295.4294967295";
        let sets = vec![vec![text(long, "a")]];
        assert_eq!(ours(&sets), theirs(&sets));
    }

    #[test]
    fn each_short_name_is_openssls() {
        if !is_openssl_here() {
            return;
        }
        let output = Command::new("openssl").args(["list", "-objects"]).output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        // As in "CN = commonName, 2.5.4.3" and "title = 2.5.4.12".
        let by_kind: std::collections::BTreeMap<&str, &str> = listed
            .lines()
            .filter_map(|line| {
                let (name, rest) = line.split_once(" = ")?;
                Some((rest.rsplit(", ").next()?, name))
            })
            .collect();
        let mut compared = 0;
        for (kind, name) in SHORT_NAMES {
            // Older versions know fewer.
            if let Some(expected) = by_kind.get(kind) {
                assert_eq!(name, expected, "{kind}");
                compared += 1;
            }
        }
        assert!(compared > 100, "{compared}");
    }
}
