//! What a receiver offers in its startup packet, and what the sender answers.
//!
//! Owns the text of both. An offer names versions and codecs in the receiver's order of preference, the answer one of each.
//! Further fields are features, which neither side knows yet: one that must be understood ends with `!`, and makes the
//! offer one that cannot be accepted.

use std::fmt;
use std::str::FromStr;

use crate::protocol::link::Encoding;

/// Startup parameter of the offer: a protocol extension, which servers that do not know it decline.
pub const OFFER_PARAMETER: &str = "_pq_.walrelay_link";

/// Setting by which an offer is accepted, reported like a server's own.
pub const ANSWER_PARAMETER: &str = "walrelay.link";

/// The only version there is.
pub const VERSION: u32 = 1;

/// How a link can be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Zstandard.
    Zstd,
    /// LZ4 blocks.
    Lz4,
}

impl Codec {
    /// As offers and settings name it.
    pub const fn as_str(self) -> &'static str {
        self.encoding().as_str()
    }

    /// How what it makes is marked.
    pub const fn encoding(self) -> Encoding {
        match self {
            Self::Zstd => Encoding::Zstd,
            Self::Lz4 => Encoding::Lz4,
        }
    }
}

impl FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        [Self::Zstd, Self::Lz4].into_iter().find(|codec| codec.as_str() == text).ok_or(UnknownCodec)
    }
}

/// A text names no codec, or a level that it does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected \"zstd\", \"zstd:LEVEL\" with a level of {} to {}, or \"lz4\"", ZSTD_LEVELS.start(), ZSTD_LEVELS.end())]
pub struct UnknownCodec;

/// How a sender compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Zstandard at this level.
    Zstd {
        /// From fastest to smallest.
        level: i8,
    },
    /// LZ4 blocks.
    Lz4,
}

impl Compression {
    /// Without its level.
    pub const fn codec(self) -> Codec {
        match self {
            Self::Zstd { .. } => Codec::Zstd,
            Self::Lz4 => Codec::Lz4,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zstd { level } => write!(f, "zstd:{level}"),
            Self::Lz4 => f.write_str("lz4"),
        }
    }
}

impl FromStr for Compression {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        let (codec, level) = text.split_once(':').map_or((text, None), |(codec, level)| (codec, Some(level)));
        match (codec.parse()?, level) {
            (Codec::Lz4, None) => Ok(Self::Lz4),
            (Codec::Lz4, Some(_)) => Err(UnknownCodec),
            (Codec::Zstd, None) => Ok(Self::Zstd { level: ZSTD_LEVEL_DEFAULT }),
            (Codec::Zstd, Some(level)) => {
                let level = level.parse().ok().filter(|level| ZSTD_LEVELS.contains(level));
                level.map(|level| Self::Zstd { level }).ok_or(UnknownCodec)
            }
        }
    }
}

/// What a receiver can take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    codecs: Vec<Codec>,
}

/// An offer that is not accepted; the stream is plain then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Declined {
    /// It cannot be read.
    #[error("the offer is malformed")]
    Malformed,
    /// It asks for versions that are not spoken here.
    #[error("the offer has no version that is spoken here")]
    Version,
    /// It asks for more than is known here.
    #[error("the offer demands a feature that is not known here")]
    Feature,
    /// No codec of it is allowed here.
    #[error("the offer has no codec that is allowed here")]
    Codec,
}

impl Offer {
    /// These codecs, the preferred one first; `None` when there are none.
    pub fn of(codecs: &[Codec]) -> Option<Self> {
        (!codecs.is_empty()).then(|| Self { codecs: codecs.to_vec() })
    }

    /// Reads the startup parameter's value.
    pub fn parse(text: &str) -> Result<Self, Declined> {
        if text.len() > OFFER_BYTES_MAX {
            return Err(Declined::Malformed);
        }
        let mut fields = text.split(';');
        let versions = fields.next().unwrap_or_default().split(',');
        let versions: Result<Vec<u32>, _> = versions.map(str::parse).collect();
        if !versions.map_err(|_| Declined::Malformed)?.contains(&VERSION) {
            return Err(Declined::Version);
        }
        let codecs = fields.next().ok_or(Declined::Malformed)?;
        if fields.any(|feature| feature.ends_with('!')) {
            return Err(Declined::Feature);
        }
        // A codec of the future is no reason to do without those of today.
        let codecs: Vec<Codec> = codecs.split(',').filter_map(|codec| codec.parse().ok()).collect();
        Self::of(&codecs).ok_or(Declined::Codec)
    }

    /// The receiver's first choice among what a sender does.
    pub fn choose(&self, allowed: &[Compression]) -> Result<Compression, Declined> {
        let allowed = |codec: &Codec| allowed.iter().copied().find(|allowed| allowed.codec() == *codec);
        self.codecs.iter().find_map(allowed).ok_or(Declined::Codec)
    }

    /// Whether WAL may come so. What does not shrink comes as it is.
    pub fn allows(&self, encoding: Encoding) -> bool {
        encoding == Encoding::Plain || self.codecs.iter().any(|codec| codec.encoding() == encoding)
    }

    /// What a sender has chosen; `None` unless it is of this offer.
    pub fn read_answer(&self, text: &str) -> Option<Compression> {
        let mut fields = text.split(';');
        let version: u32 = fields.next()?.parse().ok()?;
        let compression: Compression = fields.next()?.parse().ok()?;
        let is_of_offer = version == VERSION && self.codecs.contains(&compression.codec());
        let is_understood = !fields.any(|feature| feature.ends_with('!'));
        (is_of_offer && is_understood).then_some(compression)
    }
}

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let codecs: Vec<&str> = self.codecs.iter().map(|codec| codec.as_str()).collect();
        write!(f, "{VERSION};{}", codecs.join(","))
    }
}

/// The answer to an offer: the setting's value.
pub fn answer(chosen: Compression) -> String {
    format!("{VERSION};{chosen}")
}

/// Levels of zstd that may be asked for.
pub const ZSTD_LEVELS: std::ops::RangeInclusive<i8> = -7..=19;

/// Fast enough for most links, and hardly larger than the next.
pub const ZSTD_LEVEL_DEFAULT: i8 = 1;

/// Longest offer that is read.
const OFFER_BYTES_MAX: usize = 256;

/// Body of the fuzz target: what is read must write and read back the same, and be answered by what it can take.
pub fn fuzz_offer(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let allowed = [Compression::Lz4, Compression::Zstd { level: ZSTD_LEVEL_DEFAULT }];
    if let Ok(offer) = Offer::parse(&text) {
        assert_eq!(Offer::parse(&offer.to_string()), Ok(offer.clone()));
        let chosen = offer.choose(&allowed);
        assert!(chosen.is_ok_and(|chosen| offer.read_answer(&answer(chosen)) == Some(chosen)));
    }
    let everything = Offer { codecs: vec![Codec::Zstd, Codec::Lz4] };
    if let Some(chosen) = everything.read_answer(&text) {
        assert_eq!(everything.read_answer(&answer(chosen)), Some(chosen));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZSTD: Compression = Compression::Zstd { level: 1 };

    #[test]
    fn the_receivers_order_decides_among_what_the_sender_does() {
        let chosen = |offer: &str, allowed: &[Compression]| Offer::parse(offer)?.choose(allowed);
        assert_eq!(chosen("1;zstd,lz4", &[Compression::Lz4, ZSTD]), Ok(ZSTD));
        assert_eq!(chosen("1;lz4,zstd", &[ZSTD, Compression::Lz4]), Ok(Compression::Lz4));
        assert_eq!(chosen("1;zstd", &[Compression::Lz4]), Err(Declined::Codec));
        assert_eq!(chosen("1;zstd", &[]), Err(Declined::Codec));
    }

    #[test]
    fn newer_offers_are_read_as_far_as_they_allow() {
        let good = Offer::of(&[Codec::Zstd]);
        for text in ["1;zstd", "3,2,1;zstd", "1;brotli,zstd", "1;zstd;dictionary", "1;zstd;a=b;c"] {
            assert_eq!(Offer::parse(text).ok(), good, "{text}");
        }
        for (text, declined) in [
            ("2;zstd", Declined::Version),
            ("", Declined::Malformed),
            ("x;zstd", Declined::Malformed),
            ("1", Declined::Malformed),
            ("1;", Declined::Codec),
            ("1;brotli", Declined::Codec),
            ("1;zstd;dictionary!", Declined::Feature),
            ("1;zstd;a;b!", Declined::Feature),
        ] {
            assert_eq!(Offer::parse(text), Err(declined), "{text}");
        }
        assert_eq!(Offer::parse(&format!("1;zstd;{}", "x".repeat(300))), Err(Declined::Malformed));
    }

    #[test]
    fn an_answer_counts_only_if_it_is_of_the_offer() {
        let offer = Offer::of(&[Codec::Zstd]).unwrap();
        assert_eq!(offer.read_answer("1;zstd:3"), Some(Compression::Zstd { level: 3 }));
        assert_eq!(offer.read_answer("1;zstd:3;later"), Some(Compression::Zstd { level: 3 }));
        for text in ["1;lz4", "2;zstd:1", "1;zstd:20", "1;zstd:1;later!", "1", "", ";zstd", "1;none"] {
            assert_eq!(offer.read_answer(text), None, "{text}");
        }
    }

    #[test]
    fn levels_are_limited() {
        for (text, level) in [("zstd", 1), ("zstd:-7", -7), ("zstd:19", 19)] {
            assert_eq!(text.parse(), Ok(Compression::Zstd { level }));
        }
        for text in ["zstd:20", "zstd:-8", "zstd:", "zstd:x", "lz4:1", "none", "", "ZSTD"] {
            assert_eq!(text.parse::<Compression>(), Err(UnknownCodec), "{text}");
        }
        let error = UnknownCodec.to_string();
        assert_eq!(error, "expected \"zstd\", \"zstd:LEVEL\" with a level of -7 to 19, or \"lz4\"");
    }
}
