//! Bodies that are compressed (HTTP's content codings): requests, within the same limits once they are whole again, and answers, where their callers ask
//! for it and it pays. It never knows what they say.

use std::{
    io::{self, Read},
    sync::Arc,
};

use bytes::{Buf, Bytes};
use flate2::{
    Compression,
    bufread::{GzEncoder, MultiGzDecoder, ZlibDecoder, ZlibEncoder},
};
use hyper::{
    HeaderMap,
    header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue},
};

use super::{
    Context,
    cors::add_to_vary,
    exchange::{BYTES_FREE, Exchange},
};
use crate::{
    egress::{Body, HttpResponse},
    work::{Budget, JobError},
};

/// What is accepted, for those who send something else.
pub(super) const ACCEPTED: HeaderValue = HeaderValue::from_static("gzip, deflate, zstd");
/// Compressed bytes that are taken apart on a connection's thread: with gzip and deflate they become a thousand times as many at most. With zstd there is no such
/// bound.
const INLINE_BYTES_MAX: usize = 1 << 10;
/// Bytes that are taken out of a compressed body at once.
const PART_BYTES: usize = 64 << 10;
/// The largest window of zstd, as a power of two: what every receiver has to have (RFC 9659), and no more memory than that.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// How hard answers are compressed: they wait for it.
const GZIP_LEVEL: u32 = 1;
const ZSTD_LEVEL: i32 = 1;

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Gzip,
    Deflate,
    Zstd,
}

/// Why a body can't be taken out of its coding.
#[derive(Debug)]
pub(super) enum CodingError {
    /// It is in one that this host doesn't have.
    Unknown(String),
    /// It becomes longer than a body may be.
    TooLarge,
    NoRoom(JobError),
    Broken(io::Error),
}

impl Coding {
    const ALL: [Self; 3] = [Self::Zstd, Self::Gzip, Self::Deflate];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
        }
    }

    /// That of a request's body; `None` where it is in none.
    pub(super) fn of_request(header: Option<&HeaderValue>) -> Result<Option<Self>, CodingError> {
        let Some(header) = header else { return Ok(None) };
        match header.to_str().map(|text| text.trim().to_ascii_lowercase()).as_deref() {
            Ok("" | "identity") => Ok(None),
            Ok("gzip" | "x-gzip") => Ok(Some(Self::Gzip)),
            Ok("deflate") => Ok(Some(Self::Deflate)),
            Ok("zstd") => Ok(Some(Self::Zstd)),
            _ => Err(CodingError::Unknown(String::from_utf8_lossy(header.as_bytes()).into_owned())),
        }
    }

    /// The one that a caller likes best of those that it takes; `None` where it takes none.
    fn of_answer(accepted: &HeaderValue) -> Option<Self> {
        let text = accepted.to_str().ok()?;
        let named = |name: &str| {
            text.split(',').find_map(|part| {
                let (found, parameters) = part.split_once(';').unwrap_or((part, ""));
                found.trim().eq_ignore_ascii_case(name).then(|| quality(parameters))
            })
        };
        let weight = |coding: Self| named(coding.name()).or_else(|| named("*")).unwrap_or(0);
        let best = Self::ALL.into_iter().map(|coding| (weight(coding), coding));
        // Of equals the first, and none where what isn't compressed is liked better.
        let plain = named("identity").unwrap_or(0).saturating_sub(1);
        let best =
            best.fold(
                (plain, None),
                |(best, chosen), (weight, coding)| {
                    if weight > best { (weight, Some(coding)) } else { (best, chosen) }
                },
            );
        best.1
    }
}

/// Whether a caller takes gzip.
pub(super) fn takes_gzip(accepted: Option<&HeaderValue>) -> bool {
    let text = accepted.and_then(|accepted| accepted.to_str().ok()).unwrap_or_default();
    text.split(',').any(|part| {
        let (found, parameters) = part.split_once(';').unwrap_or((part, ""));
        found.trim().eq_ignore_ascii_case(Coding::Gzip.name()) && quality(parameters) > 0
    })
}

/// A weight in thousandths: `q=0.5`.
fn quality(parameters: &str) -> u32 {
    let weight = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("q").then(|| value.trim())
    });
    let weight = weight.map_or(Ok(1.0), str::parse::<f32>).unwrap_or_default();
    (weight.clamp(0.0, 1.0) * 1000.0) as u32
}

/// A part of the budget, given back when dropped.
pub(super) struct Taken {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Taken {
    pub(super) fn of(budget: &Arc<Budget>) -> Self {
        Self { budget: Arc::clone(budget), bytes: 0 }
    }

    pub(super) fn grow_to(&mut self, bytes: usize) -> Result<(), JobError> {
        if bytes > BYTES_FREE && bytes > self.bytes {
            self.budget.take(bytes - self.bytes)?;
            self.bytes = bytes;
        }
        Ok(())
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.budget.give_back(self.bytes);
        }
    }
}

/// A request's body out of its coding.
///
/// # Errors
/// It is no such body, or longer than one may be.
pub(super) async fn decoded(
    body: Bytes,
    coding: Option<Coding>,
    limit: usize,
    exchange: &Exchange,
) -> Result<Bytes, CodingError> {
    let Some(coding) = coding else { return Ok(body) };
    Box::pin(async {
        let (bytes, taken) = decoded_message(&exchange.context, body, coding, limit).await?;
        exchange.keep_bytes(taken.into_bytes());
        Ok(bytes)
    })
    .await
}

/// Bytes out of their coding, with what they hold of the budget: few on this thread, many on another.
///
/// # Errors
/// They are no such bytes, or become longer than the limit.
pub(super) async fn decoded_message(
    context: &Context,
    body: Bytes,
    coding: Coding,
    limit: usize,
) -> Result<(Bytes, Taken), CodingError> {
    let taken = Taken::of(&context.budget);
    if body.len() <= INLINE_BYTES_MAX && coding != Coding::Zstd {
        return decode(&body, coding, limit, taken);
    }
    let lost = || CodingError::NoRoom(JobError::Lost);
    let thread = Arc::clone(&context.coding).acquire_owned().await.map_err(|_| lost())?;
    let work = move || {
        let _thread = thread;
        decode(&body, coding, limit, taken)
    };
    context.blocking.spawn_blocking(work).await.map_err(|_| lost())?
}

impl Taken {
    /// Whoever gets the number gives it back.
    fn into_bytes(mut self) -> usize {
        std::mem::take(&mut self.bytes)
    }
}

fn decode(
    body: &[u8],
    coding: Coding,
    limit: usize,
    mut taken: Taken,
) -> Result<(Bytes, Taken), CodingError> {
    let mut reader: Box<dyn Read + '_> = match coding {
        Coding::Gzip => Box::new(MultiGzDecoder::new(body)),
        Coding::Deflate => Box::new(ZlibDecoder::new(body)),
        Coding::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(body).map_err(CodingError::Broken)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(CodingError::Broken)?;
            Box::new(decoder)
        }
    };
    let mut whole: Vec<u8> = Vec::new();
    let mut part = vec![0; PART_BYTES];
    loop {
        let count = reader.read(&mut part).map_err(CodingError::Broken)?;
        if count == 0 {
            return Ok((whole.into(), taken));
        }
        let needed = whole.len() + count;
        if needed > limit {
            return Err(CodingError::TooLarge);
        }
        if needed > whole.capacity() {
            // What is held is what is counted.
            let room = needed.max(2 * whole.capacity()).min(limit);
            taken.grow_to(room).map_err(CodingError::NoRoom)?;
            whole.reserve_exact(room - whole.len());
        }
        whole.extend_from_slice(&part[..count]);
    }
}

/// The answer in a coding that its caller takes, where it is long enough to pay. Tensors are compressed for those alone who name one coding and nothing else:
/// many clients name all that they know in every request.
pub(super) async fn encoded(
    exchange: &Exchange,
    accepted: Option<&HeaderValue>,
    response: HttpResponse,
) -> HttpResponse {
    let least = exchange.context.server.compress_bytes_min;
    let is_long = response.body().whole_bytes().is_some_and(|bytes| least > 0 && bytes >= least);
    if !is_long || !response.status().is_success() || response.headers().contains_key(CONTENT_ENCODING) {
        return response;
    }
    Box::pin(encode_long(exchange, accepted, response)).await
}

async fn encode_long(
    exchange: &Exchange,
    accepted: Option<&HeaderValue>,
    mut response: HttpResponse,
) -> HttpResponse {
    add_to_vary(response.headers_mut(), &HeaderValue::from_name(ACCEPT_ENCODING));
    let Some(accepted) = accepted else { return response };
    let of_tensors =
        response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/octet-stream");
    let is_asked = !accepted.as_bytes().contains(&b',') && accepted != "*";
    let Some(coding) = Coding::of_answer(accepted).filter(|_| is_asked || !of_tensors) else {
        return response;
    };
    let context = &*exchange.context;
    // Where all cores do so already, it goes out as it is.
    let Ok(thread) = Arc::clone(&context.coding).try_acquire_owned() else { return response };
    let (mut head, body) = response.into_parts();
    let Body::Whole(answer) = body else { return HttpResponse::from_parts(head, body) };
    let plain = answer.clone();
    let work = move || {
        let _thread = thread;
        encode(&answer.into_bytes(), coding)
    };
    match context.blocking.spawn_blocking(work).await {
        Ok(Ok(bytes)) if bytes.len() < plain.remaining() => {
            head.headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
            HttpResponse::from_parts(head, Bytes::from(bytes).into())
        }
        // It is as good as it was.
        _ => HttpResponse::from_parts(head, plain.into()),
    }
}

pub(super) fn encode(bytes: &[u8], coding: Coding) -> io::Result<Vec<u8>> {
    let mut encoded = Vec::new();
    match coding {
        Coding::Gzip => GzEncoder::new(bytes, Compression::new(GZIP_LEVEL)).read_to_end(&mut encoded)?,
        Coding::Deflate => ZlibEncoder::new(bytes, Compression::new(GZIP_LEVEL)).read_to_end(&mut encoded)?,
        Coding::Zstd => return zstd::encode_all(bytes, ZSTD_LEVEL),
    };
    Ok(encoded)
}

/// The header of a request that says how its body is compressed.
pub(super) fn of_headers(headers: &HeaderMap) -> Result<Option<Coding>, CodingError> {
    let mut values = headers.get_all(CONTENT_ENCODING).iter();
    let first = values.next();
    match values.next() {
        Some(second) => Err(CodingError::Unknown(format!("a second one, {second:?}"))),
        None => Coding::of_request(first),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn budget(bytes: usize) -> Taken {
        Taken::of(&Arc::new(Budget::new(bytes)))
    }

    #[test]
    fn a_caller_gets_the_coding_that_it_likes_best() {
        for (accepted, expected) in [
            ("gzip", Some(Coding::Gzip)),
            ("gzip, deflate, br", Some(Coding::Gzip)),
            ("deflate, gzip", Some(Coding::Gzip)),
            ("gzip;q=0.5, deflate", Some(Coding::Deflate)),
            ("gzip, deflate, br, zstd", Some(Coding::Zstd)),
            ("zstd;q=0, gzip", Some(Coding::Gzip)),
            ("*", Some(Coding::Zstd)),
            ("*;q=0.1, zstd;q=0", Some(Coding::Gzip)),
            ("br", None),
            ("identity", None),
            ("gzip;q=0", None),
            ("gzip;q=x", None),
            ("", None),
            ("gzip;Q=0", None),
            ("identity, gzip;q=0.1", None),
            ("identity, gzip", Some(Coding::Gzip)),
            ("gzip; q = 0.5 , identity;q=0.9", None),
        ] {
            let found = Coding::of_answer(&HeaderValue::from_static(accepted));
            assert_eq!(found, expected, "{accepted}");
        }
    }

    #[test]
    fn what_is_compressed_comes_back_and_a_bomb_doesnt() {
        for coding in Coding::ALL {
            let whole: Vec<u8> = (0..300_000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect();
            let small = encode(&whole, coding).unwrap();
            assert!(small.len() < whole.len(), "{coding:?}");
            let (decoded, taken) = decode(&small, coding, whole.len(), budget(1 << 30)).unwrap();
            assert!(decoded == whole && (whole.len()..=2 * whole.len()).contains(&taken.bytes));
            let over = decode(&small, coding, whole.len() - 1, budget(1 << 30));
            assert!(matches!(over, Err(CodingError::TooLarge)), "{coding:?}");
            let scarce = decode(&small, coding, whole.len(), budget(100_000));
            assert!(matches!(scarce, Err(CodingError::NoRoom(JobError::Busy(_)))), "{coding:?}");
            let bomb = encode(&vec![0; 64 << 20], coding).unwrap();
            let bombed = decode(&bomb, coding, 1 << 20, budget(1 << 30));
            assert!(matches!(bombed, Err(CodingError::TooLarge)), "{coding:?}");
            // Nothing of a body that is cut off is taken for all of it.
            assert!(
                decode(&small[..small.len() - 5], coding, whole.len(), budget(1 << 30)).is_err(),
                "{coding:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_taken_apart_or_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
            for coding in Coding::ALL {
                let _ = decode(&body, coding, 1 << 20, budget(1 << 30));
            }
        }
    }
}
