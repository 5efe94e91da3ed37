//! The settings of compressed links between relays.

use std::num::NonZeroU64;

use crate::config::check::size;
use crate::config::raw::{Quantity, RawDownstream};
use crate::config::{LinkMode, Links, error::Problem};
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

/// Bytes in a second; 0 is no limit. Less than the least could not carry a live stream at all.
fn rate(key: &'static str, raw: &Quantity) -> Result<Option<NonZeroU64>, Problem> {
    let bytes = size(key, raw, 0..=1 << 40)?;
    if bytes > 0 && bytes < RATE_MIN {
        return Err(Problem::invalid(key, &raw.0, "expected 0 (no limit), or at least 1kB in a second"));
    }
    Ok(NonZeroU64::new(bytes))
}

/// Bytes in a second that a limit allows at least.
pub(crate) const RATE_MIN: u64 = 1 << 10;
