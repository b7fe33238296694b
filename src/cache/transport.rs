//! HTTP transport of the caches. It honours `Retry-After`.

use std::collections::BTreeMap;
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::header::RETRY_AFTER;
use http::{Request, Response, StatusCode};
use opendal::{Buffer, Error, ErrorKind, HttpBody, HttpTransport, HttpTransporter};
use opendal_http_transport_reqwest::ReqwestTransport;

/// Timeout for opening a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// The end of a rate limit that a server asked for, if there is one.
#[derive(Debug, Default)]
pub(super) struct RateLimit(Mutex<Option<Instant>>);

impl RateLimit {
    /// Returns the time that is left of the rate limit; `None` if it is over.
    pub(super) fn left(&self) -> Option<Duration> {
        let until = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Reads the rate limit from a response.
    pub(super) fn note<T>(&self, response: &Response<T>) {
        let asks =
            matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let header = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        if let Some(wait) = header.filter(|_| asks).and_then(|text| parse(text, SystemTime::now())) {
            let until = Instant::now().checked_add(wait);
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
        }
    }
}

/// Counts failed requests that were retried, by reason.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<BTreeMap<String, usize>>);

impl Faults {
    pub(super) fn add(&self, why: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(why).or_default() += 1;
    }

    /// Returns all failures since the last call.
    pub(super) fn take(&self) -> BTreeMap<String, usize> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// `Retry-After` is a number of seconds or a date (RFC 9110, 10.2.3).
fn parse(text: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text.trim()).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// The transport of a cache's requests.
pub(super) struct Transport {
    inner: HttpTransporter,
    rate_limit: std::sync::Arc<RateLimit>,
}

impl Transport {
    pub(super) fn new(rate_limit: std::sync::Arc<RateLimit>) -> Result<Self, String> {
        ready_for_tls();
        let client = reqwest::Client::builder()
            .user_agent(concat!("vimg/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .build()
            .map_err(|e| e.to_string())?;
        Ok(Self { inner: HttpTransporter::new(ReqwestTransport::new(client)), rate_limit })
    }
}

impl HttpTransport for Transport {
    async fn fetch(&self, request: Request<Buffer>) -> opendal::Result<Response<HttpBody>> {
        if let Some(left) = self.rate_limit.left() {
            // This error is not temporary, so that the retry layer does not
            // repeat the request at once. The caller waits.
            let text = format!("rate limited for another {} s", left.as_secs() + 1);
            return Err(Error::new(ErrorKind::RateLimited, text));
        }
        let response = self.inner.fetch(request).await?;
        self.rate_limit.note(&response);
        let status = response.status();
        let tries_again = matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504);
        if !tries_again {
            return Ok(response);
        }
        // The body of an error response is ignored.
        let error = Error::new(ErrorKind::Unexpected, format!("HTTP status {}", status.as_u16()));
        Err(if self.rate_limit.left().is_some() { error } else { error.set_temporary() })
    }
}

/// Selects the TLS implementation: the dependencies bring more than one.
pub(super) fn ready_for_tls() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Another caller may have installed one already; that one is fine too.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_when_to_come_back() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        assert_eq!(parse("7", now), Some(Duration::from_secs(7)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(Duration::from_secs(7)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:27 GMT", now), Some(Duration::ZERO));
        assert_eq!(parse("soon", now), None);
        let rate_limit = RateLimit::default();
        let mut response = Response::new(());
        response.headers_mut().insert(RETRY_AFTER, http::HeaderValue::from_static("60"));
        rate_limit.note(&response);
        assert!(rate_limit.left().is_none(), "a good answer is no reason");
        *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        rate_limit.note(&response);
        assert!(rate_limit.left().unwrap() > Duration::from_secs(50));
    }
}
