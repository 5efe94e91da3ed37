//! The settings of compressed links between relays.

use std::num::NonZeroU64;

use crate::config::raw::{Quantity, RawDownstream};
use crate::config::{LinkMode, Links, error::Problem, units::Size};
use crate::protocol::link::{Codec, Compression};

pub(super) fn mode(text: &str) -> Result<LinkMode, Problem> {
    match text {
        "off" => Ok(LinkMode::Off),
        "prefer" => Ok(LinkMode::Prefer),
        "require" => Ok(LinkMode::Require),
        other => {
            Err(Problem::invalid("upstream.link", other, "expected \"off\", \"prefer\", or \"require\""))
        }
    }
}

/// Codecs in order; none twice, and not none at all.
pub(super) fn codecs(texts: &[String]) -> Result<Vec<Codec>, Problem> {
    const KEY: &str = "upstream.link_codecs";
    let mut codecs = Vec::new();
    for text in texts {
        let advice = "expected \"zstd\" or \"lz4\", each at most once";
        let codec = text.parse().map_err(|_| Problem::invalid(KEY, text, advice))?;
        if codecs.contains(&codec) {
            return Err(Problem::invalid(KEY, text, advice));
        }
        codecs.push(codec);
    }
    if codecs.is_empty() {
        return Err(Problem::invalid(
            KEY,
            "",
            "expected at least one codec; upstream.link = \"off\" turns links off",
        ));
    }
    Ok(codecs)
}

pub(super) fn sent(raw: &RawDownstream) -> Result<Links, Problem> {
    const KEY: &str = "downstream.link_codecs";
    let mut compressions: Vec<Compression> = Vec::new();
    for text in &raw.link_codecs {
        let compression: Compression =
            text.parse().map_err(|error| Problem::invalid(KEY, text, format!("{error}")))?;
        // Each would cost memory and time of its own.
        if compressions.iter().any(|known| known.codec() == compression.codec()) {
            return Err(Problem::invalid(KEY, text, "expected each codec at most once"));
        }
        compressions.push(compression);
    }
    Ok(Links {
        compressions,
        adapt: raw.link_adapt,
        link_rate_max: rate("downstream.link_rate_max", &raw.link_rate_max)?,
        links_rate_max: rate("downstream.links_rate_max", &raw.links_rate_max)?,
    })
}

fn rate(key: &'static str, raw: &Quantity) -> Result<Option<NonZeroU64>, Problem> {
    RateLimit::parse(&raw.0).map(RateLimit::bytes).map_err(|advice| Problem::invalid(key, &raw.0, advice))
}

/// Bytes in a second that may be sent, or no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit(Option<NonZeroU64>);

impl RateLimit {
    /// Reads a number of bytes, with or without a unit; 0 is no limit. The error says what would be right.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let bytes = text.parse().ok().or_else(|| Size::parse(text).ok().map(|size| size.0)).ok_or(ADVICE)?;
        match NonZeroU64::new(bytes) {
            None => Ok(Self(None)),
            // Less could not carry a live stream at all, and more is no limit.
            Some(rate) if RATES.contains(&rate.get()) => Ok(Self(Some(rate))),
            Some(_) => Err(ADVICE),
        }
    }

    /// Bytes in a second; `None` is no limit.
    pub fn bytes(self) -> Option<NonZeroU64> {
        self.0
    }
}

const RATES: std::ops::RangeInclusive<u64> = 1 << 10..=1 << 40;
const ADVICE: &str = "expected bytes in a second, such as \"10MB\", from 1kB to 1TB, or 0 for no limit";
