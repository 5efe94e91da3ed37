//! The HTTP listener: `/livez`, `/readyz`, `/metrics`, `/status`, and `POST` to `/fence`, `/unfence`, `/links` and
//! `/reload`.
//!
//! Owns HTTP and its authentication. Serves no WAL. What the pages show, and what the operations do, comes from whoever builds
//! the [`Pages`] and the [`Operations`]; nothing is changed without a token, from wherever it is asked for. Every connection
//! costs a bounded amount of memory and time, whoever opens it.

use std::{collections::BTreeMap, future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::config::RateLimit;

/// What the pages show.
pub trait Pages: Send + Sync + 'static {
    /// `Ok` when WAL can be served, else why not, in one line.
    fn readiness(&self) -> Result<(), String>;
    /// The text of `/metrics`.
    fn metrics(&self) -> String;
    /// The JSON of `/status`.
    fn status(&self) -> serde_json::Value;
}

/// What can be changed.
pub trait Operations: Send + Sync + 'static {
    /// Fences the relay, or takes the fence away; the answer is what is so then, durably.
    fn set_fence(&self, fence: FenceWish) -> OperationFuture<'_>;
    /// Changes how fast links may send; the answer is what holds then, until the relay is started again.
    fn set_rates(&self, wish: RatesWish) -> OperationFuture<'_>;
    /// Reads the files again that can be; the error says what is wrong with them, and then all is as it was.
    fn reload(&self) -> OperationFuture<'_>;
}

/// The JSON of an operation's answer, or why it was not done, in one line.
pub type OperationFuture<'a> = Pin<Box<dyn Future<Output = Result<serde_json::Value, String>> + Send + 'a>>;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceWish {
    /// Nothing more is to be received or acknowledged.
    Fence,
    /// It may go on.
    Unfence,
}

/// How fast links are to send; what is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RatesWish {
    /// Each of them.
    pub link_rate_max: Option<RateLimit>,
    /// All together.
    pub links_rate_max: Option<RateLimit>,
}

/// The listener and what it serves.
pub struct Admin {
    listener: TcpListener,
    router: Router,
}

impl Admin {
    /// Serves whoever comes to `listener`, once it runs. With a token, `/metrics` and `/status` want `Authorization: Bearer
    /// TOKEN`; `/livez` and `/readyz` tell no more than yes or no to those without it. What changes something wants it always:
    /// without a token it is refused.
    pub fn new(
        listener: TcpListener,
        token: Option<SecretString>,
        pages: Arc<dyn Pages>,
        operations: Arc<dyn Operations>,
    ) -> Self {
        let shared = Arc::new(Shared { token, pages, operations });
        let operations = Router::new()
            .route("/fence", post(fence))
            .route("/unfence", post(unfence))
            .route("/links", post(links).layer(DefaultBodyLimit::max(OPERATION_BYTES_MAX)))
            .route("/reload", post(reload))
            .route_layer(axum::middleware::from_fn_with_state(Arc::clone(&shared), require_set_token));
        let guarded = Router::new()
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .route_layer(axum::middleware::from_fn_with_state(Arc::clone(&shared), require_token));
        let open = Router::new().route("/livez", get(|| async { "ok\n" })).route("/readyz", get(readyz));
        Self { listener, router: open.merge(guarded).merge(operations).with_state(shared) }
    }

    /// The address that was bound, with the port that the system chose.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`. Requests under way then have a few seconds left.
    pub async fn run(self, shutdown: CancellationToken) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "could not accept an HTTP connection");
                    tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                    continue;
                }
            };
            let router = self.router.clone();
            tokio::spawn(async move {
                // A client that is too slow is dropped; there is nobody to tell.
                let _ = timeout(CONNECTION_TIME_MAX, serve_connection(stream, router)).await;
                drop(permit);
            });
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Router) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIME_MAX)
        .max_buf_size(REQUEST_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!(%error, "HTTP connection ended");
    }
}

struct Shared {
    token: Option<SecretString>,
    pages: Arc<dyn Pages>,
    operations: Arc<dyn Operations>,
}

impl Shared {
    fn is_authorized(&self, request: &Request) -> bool {
        let Some(token) = &self.token else { return true };
        let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        given.and_then(|value| value.strip_prefix("Bearer ")).is_some_and(|given| {
            verify_slices_are_equal(given.as_bytes(), token.expose_secret().as_bytes()).is_ok()
        })
    }
}

/// For what changes something: nobody may who is not known, from this machine neither.
async fn require_set_token(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if shared.token.is_none() {
        return (StatusCode::FORBIDDEN, "admin.token_file must be set for this\n").into_response();
    }
    require_token(State(shared), request, next).await
}

async fn require_token(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if shared.is_authorized(&request) {
        return next.run(request).await;
    }
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], "a token is required\n")
        .into_response()
}

async fn readyz(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    match shared.pages.readiness() {
        Ok(()) => "ok\n".into_response(),
        Err(why) if shared.is_authorized(&request) => {
            (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response()
        }
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (content_type, shared.pages.metrics()).into_response()
}

async fn status(State(shared): State<Arc<Shared>>) -> Response {
    axum::Json(shared.pages.status()).into_response()
}

async fn fence(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    set_fence(&shared, &headers, FenceWish::Fence).await
}

async fn unfence(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    set_fence(&shared, &headers, FenceWish::Unfence).await
}

async fn links(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    match rates_wish(&body) {
        Ok(wish) => {
            if let Some(refusal) = another_is_meant(&shared, &headers) {
                return refusal;
            }
            answer(shared.operations.set_rates(wish).await, StatusCode::SERVICE_UNAVAILABLE)
        }
        Err(why) => {
            (StatusCode::BAD_REQUEST, axum::Json(serde_json::json!({ "error": why }))).into_response()
        }
    }
}

/// Rates as the settings have them: bytes in a second as a number, or with a unit; 0 is no limit.
fn rates_wish(body: &[u8]) -> Result<RatesWish, String> {
    let members: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(body).map_err(|error| format!("invalid JSON: {error}"))?;
    let mut wish = RatesWish::default();
    for (name, value) in members {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let limit =
            RateLimit::parse(&text).map_err(|advice| format!("invalid value for \"{name}\": {advice}"))?;
        match name.as_str() {
            "link_rate_max" => wish.link_rate_max = Some(limit),
            "links_rate_max" => wish.links_rate_max = Some(limit),
            _ => return Err(format!("unknown member \"{name}\"")),
        }
    }
    Ok(wish)
}

async fn set_fence(shared: &Shared, headers: &HeaderMap, wish: FenceWish) -> Response {
    if let Some(refusal) = another_is_meant(shared, headers) {
        return refusal;
    }
    answer(shared.operations.set_fence(wish).await, StatusCode::SERVICE_UNAVAILABLE)
}

async fn reload(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if let Some(refusal) = another_is_meant(&shared, &headers) {
        return refusal;
    }
    answer(shared.operations.reload().await, StatusCode::UNPROCESSABLE_ENTITY)
}

fn answer(outcome: Result<serde_json::Value, String>, when_not_done: StatusCode) -> Response {
    match outcome {
        Ok(told) => axum::Json(told).into_response(),
        Err(why) => (when_not_done, axum::Json(serde_json::json!({ "error": why }))).into_response(),
    }
}

/// The refusal of a request that names another relay.
fn another_is_meant(shared: &Shared, headers: &HeaderMap) -> Option<Response> {
    let meant = headers.get(RELAY_HEADER)?;
    let name = shared.pages.status().get("name").and_then(|name| Some(name.as_str()?.to_owned()));
    let name = name.unwrap_or_default();
    // Blanks at the ends of a header are nobody's.
    if meant.as_bytes() == name.trim().as_bytes() {
        return None;
    }
    let error = format!("this is relay \"{name}\"");
    Some((StatusCode::CONFLICT, axum::Json(serde_json::json!({ "error": error }))).into_response())
}

/// Header of a request that changes something: the name of the relay that is meant. Another one that is reached does nothing.
pub const RELAY_HEADER: &str = "walrelay-name";

/// HTTP connections served at a time; further ones wait in the listen queue.
pub const CONNECTIONS_MAX: usize = 16;

/// Longest body of a request that changes something.
const OPERATION_BYTES_MAX: usize = 4 << 10;

/// Longest request head.
const REQUEST_BYTES_MAX: usize = 16 << 10;

/// Time for the head of a request to arrive.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(5);

/// Longest life of a connection, also of an idle one.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(120);

/// Pause after a failed accept, which would otherwise spin when descriptors are exhausted.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    struct Fake;

    impl Pages for Fake {
        fn readiness(&self) -> Result<(), String> {
            Err("no upstream yet".to_owned())
        }
        fn metrics(&self) -> String {
            "walrelay_x 1\n".to_owned()
        }
        fn status(&self) -> serde_json::Value {
            serde_json::json!({"name": "dc1_a"})
        }
    }

    impl Operations for Fake {
        fn set_fence(&self, fence: FenceWish) -> OperationFuture<'_> {
            Box::pin(async move { Ok(serde_json::json!({"fenced": fence == FenceWish::Fence})) })
        }
        fn set_rates(&self, wish: RatesWish) -> OperationFuture<'_> {
            Box::pin(async move { Ok(serde_json::json!(format!("{wish:?}"))) })
        }
        fn reload(&self) -> OperationFuture<'_> {
            Box::pin(async { Err("line 2 is wrong".to_owned()) })
        }
    }

    async fn start(token: Option<&str>) -> SocketAddr {
        let token = token.map(|text| SecretString::from(text.to_owned()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = Admin::new(listener, token, Arc::new(Fake), Arc::new(Fake));
        let address = admin.address().unwrap();
        tokio::spawn(admin.run(CancellationToken::new()));
        address
    }

    async fn get(address: SocketAddr, path: &str, header: &str) -> String {
        ask(address, "GET", path, header).await
    }

    async fn ask(address: SocketAddr, method: &str, path: &str, header: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn pages_are_served_without_a_token_when_none_is_set() {
        let address = start(None).await;
        assert!(get(address, "/livez", "").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics", "").await.ends_with("walrelay_x 1\n"));
        assert!(get(address, "/status", "").await.ends_with("{\"name\":\"dc1_a\"}"));
        let ready = get(address, "/readyz", "").await;
        assert!(ready.starts_with("HTTP/1.1 503") && ready.ends_with("no upstream yet\n"), "{ready}");
    }

    /// Every route, and its status: without a token set; with one that is not given, given wrong, and given right.
    const ROUTES: [(&str, &str, [u16; 4]); 14] = [
        ("GET", "/livez", [200, 200, 200, 200]),
        ("GET", "/readyz", [503, 503, 503, 503]),
        ("GET", "/metrics", [200, 401, 401, 200]),
        ("GET", "/status", [200, 401, 401, 200]),
        ("POST", "/status", [405, 401, 401, 405]),
        ("POST", "/fence", [403, 401, 401, 200]),
        ("POST", "/unfence", [403, 401, 401, 200]),
        ("POST", "/reload", [403, 401, 401, 422]),
        ("GET", "/reload", [403, 401, 401, 405]),
        ("GET", "/fence", [403, 401, 401, 405]),
        ("PUT", "/unfence", [403, 401, 401, 405]),
        ("POST", "/links", [403, 401, 401, 400]),
        ("GET", "/links", [403, 401, 401, 405]),
        ("GET", "/", [404, 404, 404, 404]),
    ];

    #[tokio::test]
    async fn every_route_wants_the_token_it_should() {
        let (open, guarded) = (start(None).await, start(Some("canary")).await);
        let wrong = ["Bearer canar", "Bearer canary2", "Bearer", "Basic canary", "canary", "bearer  canary"];
        for (method, path, [unset, absent, refused, right]) in ROUTES {
            let status = async |address, header: &str| {
                let answer = ask(address, method, path, header).await;
                answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
            };
            let of = format!("{method} {path}");
            assert_eq!(status(open, "").await, unset, "{of}, no token is set");
            assert_eq!(
                status(open, "Authorization: Bearer canary\r\n").await,
                unset,
                "{of}, no token is set"
            );
            assert_eq!(status(guarded, "").await, absent, "{of}, none given");
            for wrong in wrong {
                let header = format!("Authorization: {wrong}\r\n");
                assert_eq!(status(guarded, &header).await, refused, "{of}, {wrong}");
            }
            assert_eq!(status(guarded, "Authorization: Bearer canary\r\n").await, right, "{of}");
        }
    }

    #[tokio::test]
    async fn nothing_is_told_to_those_without_the_token() {
        let address = start(Some("canary")).await;
        assert!(get(address, "/readyz", "").await.ends_with("not ready\n"));
        assert!(get(address, "/status", "").await.ends_with("a token is required\n"));
        let right = "Authorization: Bearer canary\r\n";
        assert!(ask(address, "POST", "/fence", right).await.ends_with("{\"fenced\":true}"));
        assert!(ask(address, "POST", "/unfence", right).await.ends_with("{\"fenced\":false}"));
        assert!(ask(address, "POST", "/reload", right).await.ends_with("{\"error\":\"line 2 is wrong\"}"));
    }

    #[test]
    fn rates_are_read_as_in_the_settings_and_nothing_else_is() {
        let rate = |bytes| RateLimit::parse(bytes).unwrap();
        let read = |text: &str| rates_wish(text.as_bytes());
        let both = RatesWish { link_rate_max: Some(rate("10MB")), links_rate_max: Some(rate("0")) };
        assert_eq!(read(r#"{"link_rate_max": "10MB", "links_rate_max": 0}"#), Ok(both));
        let one = RatesWish { link_rate_max: Some(rate("65536B")), links_rate_max: None };
        assert_eq!(read(r#"{"link_rate_max": 65536}"#), Ok(one));
        assert_eq!(read("{}"), Ok(RatesWish::default()));
        for wrong in [
            "",
            "[]",
            r#"{"link_rate_max": "fast"}"#,
            r#"{"link_rate_max": 5}"#,
            r#"{"link_rate_max": -1}"#,
            r#"{"link_rate_max": null}"#,
            r#"{"rate": 1}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        assert_eq!(read(r#"{"rate": 0}"#).unwrap_err(), "unknown member \"rate\"");
    }

    #[tokio::test]
    async fn a_relay_that_was_not_meant_changes_nothing() {
        let address = start(Some("canary")).await;
        let meant = |name: &str| format!("Authorization: Bearer canary\r\n{RELAY_HEADER}: {name}\r\n");
        for (path, status) in [("/fence", "200"), ("/unfence", "200"), ("/reload", "422")] {
            let answer = ask(address, "POST", path, &meant("dc1_a")).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
            let answer = ask(address, "POST", path, &meant("dc1_b")).await;
            assert!(answer.starts_with("HTTP/1.1 409"), "{answer}");
            assert!(answer.ends_with("{\"error\":\"this is relay \\\"dc1_a\\\"\"}"), "{answer}");
        }
    }
}
