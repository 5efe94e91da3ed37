//! Zstandard and LZ4, as frames use them.
//!
//! Owns the contexts of both libraries, made once and used again. A standalone frame is compressed whole; a stream of frames
//! shares one window, is flushed with every frame and begins anew with its epoch. The receiving side gives out exactly as
//! many bytes as a frame declares, or an error, and its windows are limited before memory is given for them.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, ErrorCode, InBuffer, OutBuffer, ResetDirective, get_error_name,
};

use crate::protocol::link::{Compression, Encoding};

/// A codec's library refuses what it was asked for, or cannot read what it was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CodecError(pub String);

impl CodecError {
    fn zstd(code: ErrorCode) -> Self {
        Self(format!("zstd: {}", get_error_name(code)))
    }
}

/// Compresses standalone frames.
pub struct BulkEncoder {
    zstd: Option<CCtx<'static>>,
    table: CompressTable,
}

impl BulkEncoder {
    /// Takes the memory that it needs for as long as it lives.
    pub fn new(compression: Compression) -> Result<Self, CodecError> {
        let zstd = match compression {
            Compression::Zstd { level } => Some(zstd_context(level)?),
            Compression::Lz4 => None,
        };
        Ok(Self { zstd, table: CompressTable::large() })
    }

    /// Encodes WAL into `out`, whose content is replaced. What does not shrink stays as it is.
    pub fn encode(&mut self, wal: &[u8], out: &mut Vec<u8>) -> Result<Encoding, CodecError> {
        let encoding = match &mut self.zstd {
            Some(context) => {
                out.clear();
                out.reserve(zstd_safe::compress_bound(wal.len()));
                context.compress2(out, wal).map_err(CodecError::zstd)?;
                Encoding::Zstd
            }
            None => {
                compress_lz4(wal, out, &mut self.table)?;
                Encoding::Lz4
            }
        };
        Ok(unless_it_grew(wal, out, encoding))
    }
}

/// Compresses a stream of frames, each of which is complete.
pub struct StreamEncoder {
    zstd: Option<CCtx<'static>>,
    table: CompressTable,
    /// Pieces of one frame side by side.
    gathered: Vec<u8>,
}

impl StreamEncoder {
    /// Takes the memory that it needs for as long as it lives.
    pub fn new(compression: Compression) -> Result<Self, CodecError> {
        let zstd = match compression {
            Compression::Zstd { level } => {
                let mut context = zstd_context(level)?;
                if level >= WIDE_WINDOW_LEVEL {
                    context.set_parameter(CParameter::WindowLog(WINDOW_LOG_MAX)).map_err(CodecError::zstd)?;
                }
                Some(context)
            }
            Compression::Lz4 => None,
        };
        Ok(Self { zstd, table: CompressTable::default(), gathered: Vec::new() })
    }

    /// What follows needs nothing of what was before.
    pub fn restart(&mut self) -> Result<(), CodecError> {
        if let Some(context) = &mut self.zstd {
            context.reset(ResetDirective::SessionOnly).map_err(CodecError::zstd)?;
        }
        Ok(())
    }

    /// Encodes pieces of WAL that follow one another into `out`, whose content is replaced.
    pub fn encode<'a>(
        &mut self,
        pieces: impl IntoIterator<Item = &'a [u8]>,
        out: &mut Vec<u8>,
    ) -> Result<Encoding, CodecError> {
        match &mut self.zstd {
            Some(context) => {
                flush_pieces(context, pieces, out).map_err(CodecError::zstd)?;
                Ok(Encoding::Zstd)
            }
            None => {
                self.gathered.clear();
                for piece in pieces {
                    self.gathered.extend_from_slice(piece);
                }
                compress_lz4(&self.gathered, out, &mut self.table)?;
                Ok(unless_it_grew(&self.gathered, out, Encoding::Lz4))
            }
        }
    }
}

fn zstd_context(level: i8) -> Result<CCtx<'static>, CodecError> {
    let mut context = CCtx::try_create().ok_or_else(|| CodecError("zstd: out of memory".to_owned()))?;
    context.set_parameter(CParameter::CompressionLevel(i32::from(level))).map_err(CodecError::zstd)?;
    Ok(context)
}

fn flush_pieces<'a>(
    context: &mut CCtx<'static>,
    pieces: impl IntoIterator<Item = &'a [u8]>,
    out: &mut Vec<u8>,
) -> Result<(), ErrorCode> {
    out.clear();
    for piece in pieces {
        let mut input = InBuffer::around(piece);
        while input.pos() < piece.len() {
            step(context, &mut input, out, ZSTD_EndDirective::ZSTD_e_continue)?;
        }
    }
    while step(context, &mut InBuffer::around(&[]), out, ZSTD_EndDirective::ZSTD_e_flush)? > 0 {}
    Ok(())
}

/// Returns how much is left to be flushed, at least.
fn step(
    context: &mut CCtx<'static>,
    input: &mut InBuffer<'_>,
    out: &mut Vec<u8>,
    directive: ZSTD_EndDirective,
) -> Result<usize, ErrorCode> {
    out.reserve(STEP_BYTES_MIN);
    let at = out.len();
    context.compress_stream2(&mut OutBuffer::around_pos(out, at), input, directive)
}

fn compress_lz4(wal: &[u8], out: &mut Vec<u8>, table: &mut CompressTable) -> Result<(), CodecError> {
    out.resize(get_maximum_output_size(wal.len()), 0);
    let len =
        compress_into_with_table(wal, out, table).map_err(|error| CodecError(format!("lz4: {error}")))?;
    out.truncate(len);
    Ok(())
}

fn unless_it_grew(wal: &[u8], out: &mut Vec<u8>, encoding: Encoding) -> Encoding {
    if out.len() < wal.len() - wal.len() / WORTHWHILE_PART {
        return encoding;
    }
    out.clear();
    out.extend_from_slice(wal);
    Encoding::Plain
}

/// Reads frames. One that is part of a stream needs those before it.
#[derive(Default)]
pub struct Decoder {
    standalone: Option<DCtx<'static>>,
    stream: Option<DCtx<'static>>,
}

impl Decoder {
    /// Nothing was read yet; memory is taken when it is needed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes a frame that needs no other. It must fill `wal` exactly.
    pub fn standalone(
        &mut self,
        encoding: Encoding,
        payload: &[u8],
        wal: &mut [u8],
    ) -> Result<(), CodecError> {
        let len = match encoding {
            Encoding::Plain => return copy(payload, wal),
            Encoding::Lz4 => return expand_lz4(payload, wal),
            Encoding::Zstd => {
                let context = created(&mut self.standalone)?;
                context.decompress(wal, payload).map_err(CodecError::zstd)?
            }
        };
        exactly(len, wal)
    }

    /// Decodes the next frame of a stream, or its first. It must fill `wal` exactly.
    pub fn stream(
        &mut self,
        is_first: bool,
        encoding: Encoding,
        payload: &[u8],
        wal: &mut [u8],
    ) -> Result<(), CodecError> {
        if is_first && let Some(context) = &mut self.stream {
            context.reset(ResetDirective::SessionOnly).map_err(CodecError::zstd)?;
        }
        match encoding {
            Encoding::Plain => copy(payload, wal),
            Encoding::Lz4 => expand_lz4(payload, wal),
            Encoding::Zstd => expand_stream(created(&mut self.stream)?, payload, wal),
        }
    }
}

fn created<'a>(context: &'a mut Option<DCtx<'static>>) -> Result<&'a mut DCtx<'static>, CodecError> {
    if context.is_none() {
        let mut new = DCtx::try_create().ok_or_else(|| CodecError("zstd: out of memory".to_owned()))?;
        new.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(CodecError::zstd)?;
        *context = Some(new);
    }
    context.as_mut().ok_or_else(|| CodecError("zstd: no context".to_owned()))
}

fn expand_stream(context: &mut DCtx<'static>, payload: &[u8], wal: &mut [u8]) -> Result<(), CodecError> {
    let wanted = wal.len();
    let mut input = InBuffer::around(payload);
    let mut output = OutBuffer::around(wal);
    loop {
        let before = (input.pos(), output.pos());
        context.decompress_stream(&mut output, &mut input).map_err(CodecError::zstd)?;
        let is_done = input.pos() == payload.len() && output.pos() == wanted;
        if is_done || (input.pos(), output.pos()) == before {
            break;
        }
    }
    if output.pos() < wanted {
        return Err(too_short(output.pos(), wanted));
    }
    let mut beyond = [0];
    let mut probe = OutBuffer::around(&mut beyond);
    context.decompress_stream(&mut probe, &mut input).map_err(CodecError::zstd)?;
    if probe.pos() > 0 || input.pos() < payload.len() {
        return Err(CodecError(format!("it has more than the {wanted} bytes that it declares")));
    }
    Ok(())
}

fn expand_lz4(payload: &[u8], wal: &mut [u8]) -> Result<(), CodecError> {
    let len = decompress_into(payload, wal).map_err(|error| CodecError(format!("lz4: {error}")))?;
    exactly(len, wal)
}

fn copy(payload: &[u8], wal: &mut [u8]) -> Result<(), CodecError> {
    exactly(payload.len(), wal)?;
    wal.copy_from_slice(payload);
    Ok(())
}

fn exactly(len: usize, wal: &[u8]) -> Result<(), CodecError> {
    if len == wal.len() { Ok(()) } else { Err(too_short(len, wal.len())) }
}

fn too_short(len: usize, wanted: usize) -> CodecError {
    CodecError(format!("it has {len} bytes, and declares {wanted}"))
}

/// Largest window of a stream, by its logarithm: as much as an epoch has. More is refused before memory is given for it.
pub const WINDOW_LOG_MAX: u32 = 22;

/// From this level on zstd would take wider windows.
const WIDE_WINDOW_LEVEL: i8 = 9;

/// A frame that shrinks by less than this part is sent as it is: the receiver need not decode it.
const WORTHWHILE_PART: usize = 32;

/// Space that is there for each step of a stream's encoder.
const STEP_BYTES_MIN: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::link::offer::ZSTD_LEVELS;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9E37_79B9_u32;
        let byte = |_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_be_bytes()[0]
        };
        (0..len).map(byte).collect()
    }

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|n| b"a record much like the one before it "[n % 37] ^ u8::from(n % 91 == 0)).collect()
    }

    fn all() -> Vec<Compression> {
        ZSTD_LEVELS.map(|level| Compression::Zstd { level }).chain([Compression::Lz4]).collect()
    }

    #[test]
    fn standalone_frames_come_back_and_noise_stays_as_it_is() {
        let mut decoder = Decoder::new();
        for compression in all() {
            let mut encoder = BulkEncoder::new(compression).unwrap();
            let mut out = Vec::new();
            for wal in [text(1), text(262_144), noise(100_000), text(1 << 20), noise(1)] {
                let encoding = encoder.encode(&wal, &mut out).unwrap();
                assert_eq!(encoding == Encoding::Plain, out.len() == wal.len(), "{compression}");
                assert!(out.len() <= wal.len());
                let mut back = vec![0; wal.len()];
                decoder.standalone(encoding, &out, &mut back).unwrap();
                assert!(back == wal, "{compression}");
            }
        }
    }

    #[test]
    fn a_stream_comes_back_frame_by_frame_and_after_each_restart() {
        for compression in all() {
            let (mut encoder, mut decoder) = (StreamEncoder::new(compression).unwrap(), Decoder::new());
            let mut out = Vec::new();
            for epoch in 0..3 {
                encoder.restart().unwrap();
                for (number, len) in [500, 8, 131_072, 1, 30_000].into_iter().enumerate() {
                    let wal = if number == 2 { noise(len) } else { text(len) };
                    let (head, tail) = wal.split_at(len / 3);
                    let encoding = encoder.encode([head, tail], &mut out).unwrap();
                    assert!(out.len() <= crate::protocol::link::frame::payload_bytes_max(len));
                    let mut back = vec![0; len];
                    decoder.stream(number == 0, encoding, &out, &mut back).unwrap();
                    assert!(back == wal, "{compression}, epoch {epoch}, frame {number}");
                }
            }
        }
    }

    #[test]
    fn a_stream_shrinks_more_than_frames_that_stand_alone() {
        let compression = Compression::Zstd { level: 1 };
        let (mut stream, mut bulk) =
            (StreamEncoder::new(compression).unwrap(), BulkEncoder::new(compression).unwrap());
        let (mut out, mut streamed, mut alone) = (Vec::new(), 0, 0);
        for _ in 0..100 {
            stream.encode([&text(300)[..]], &mut out).unwrap();
            streamed += out.len();
            bulk.encode(&text(300), &mut out).unwrap();
            alone += out.len();
        }
        assert!(streamed * 2 < alone, "{streamed} {alone}");
    }

    #[test]
    fn what_is_longer_or_shorter_than_declared_is_refused() {
        let wal = text(10_000);
        for compression in [Compression::Zstd { level: 1 }, Compression::Lz4] {
            let mut out = Vec::new();
            let encoding = BulkEncoder::new(compression).unwrap().encode(&wal, &mut out).unwrap();
            for len in [0, 1, 9_999, 10_001, 1 << 20] {
                let refused = Decoder::new().standalone(encoding, &out, &mut vec![0; len]);
                assert!(refused.is_err(), "{compression}, {len}");
            }
            let encoding = StreamEncoder::new(compression).unwrap().encode([&wal[..]], &mut out).unwrap();
            for len in [1, 9_999, 10_001, 1 << 20] {
                let refused = Decoder::new().stream(true, encoding, &out, &mut vec![0; len]);
                assert!(refused.is_err(), "{compression}, {len}");
            }
        }
    }

    #[test]
    fn a_window_that_is_too_wide_is_refused_before_memory_is_given() {
        let mut context = CCtx::create();
        context.set_parameter(CParameter::WindowLog(WINDOW_LOG_MAX + 1)).unwrap();
        let mut out = Vec::new();
        flush_pieces(&mut context, [&text(1000)[..]], &mut out).unwrap();
        let mut decoder = Decoder::new();
        let error = decoder.stream(true, Encoding::Zstd, &out, &mut vec![0; 1000]).unwrap_err();
        assert_eq!(error.to_string(), "zstd: Frame requires too much memory for decoding");
        assert!(decoder.stream.unwrap().sizeof() < 1 << 20);
    }

    #[test]
    fn no_prefix_of_a_frame_fills_what_it_declares() {
        let wal = noise(3_000).repeat(2);
        for compression in [Compression::Zstd { level: 1 }, Compression::Lz4] {
            let mut out = Vec::new();
            let encoding = BulkEncoder::new(compression).unwrap().encode(&wal, &mut out).unwrap();
            assert_ne!(encoding, Encoding::Plain);
            for len in 0..out.len() {
                let cut = Decoder::new().standalone(encoding, &out[..len], &mut vec![0; wal.len()]);
                assert!(cut.is_err(), "{compression}, {len}");
            }
        }
    }
}
