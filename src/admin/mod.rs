//! The HTTP listener: `/livez`, `/readyz`, `/metrics`, `/status`, and `POST` to `/fence`, `/unfence`, `/links` and
//! `/reload`.
//!
//! Owns HTTP and its authentication (`tokens`). Serves no WAL. What the pages show, and what the operations do, comes from whoever builds
//! the [`Pages`] and the [`Operations`]; nothing is changed without a token, from wherever it is asked for. Every connection
//! costs a bounded amount of memory and time, whoever opens it, and nobody without a token keeps anybody with one out
//! (`guests`).

mod guests;
#[cfg(test)]
mod tests;
mod tokens;

use std::{collections::BTreeMap, future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::{
    body::Incoming,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

use crate::admin::guests::{GUESTS_MAX, Guest, Guests};
use crate::admin::tokens::Standing;
use crate::config::RateLimit;
use crate::net::Network;

pub use tokens::Tokens;

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
    /// Serves whoever comes to `listener`, once it runs. With tokens, `/metrics` and `/status` want one of them in
    /// `Authorization: Bearer TOKEN`; `/livez` and `/readyz` tell no more than yes or no to those without. What changes
    /// something wants the one that may do that always: where there is none it is refused.
    pub fn new(
        listener: TcpListener,
        tokens: Tokens,
        pages: Arc<dyn Pages>,
        operations: Arc<dyn Operations>,
    ) -> Self {
        let shared = Arc::new(Shared { tokens, pages, operations });
        let operations = Router::new()
            .route("/fence", post(fence))
            .route("/unfence", post(unfence))
            .route("/links", post(links).layer(DefaultBodyLimit::max(OPERATION_BYTES_MAX)))
            .route("/reload", post(reload))
            .route_layer(axum::middleware::from_fn_with_state(Arc::clone(&shared), require_operator));
        let guarded = Router::new()
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .route_layer(axum::middleware::from_fn_with_state(Arc::clone(&shared), require_reader));
        let open = Router::new().route("/livez", get(|| async { "ok\n" })).route("/readyz", get(readyz));
        let routes = open.merge(guarded).merge(operations);
        let recognized = routes.layer(axum::middleware::from_fn_with_state(Arc::clone(&shared), recognize));
        Self { listener, router: recognized.with_state(shared) }
    }

    /// The address that was bound, with the port that the system chose.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`. Requests under way then have a few seconds left.
    pub async fn run(self, shutdown: CancellationToken) {
        let guests = Arc::<Guests>::default();
        // One more than there are guests: he who leaves for the next one may still be on his way out.
        let connections = Arc::new(Semaphore::new(GUESTS_MAX + 1));
        loop {
            let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "could not accept an HTTP connection");
                    tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                    continue;
                }
            };
            let guest = Arc::new(guests.admit(Network::of(address.ip())));
            let router = self.router.clone();
            tokio::spawn(async move {
                // Whoever is dropped is too slow, or unknown: there is nobody to tell.
                tokio::select! {
                    () = serve_connection(stream, router, &guest) => {}
                    () = has_to_go(&guest) => {}
                }
                drop((guest, permit));
            });
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Router, guest: &Arc<Guest>) {
    let (service, guest) = (TowerToHyperService::new(router), Arc::clone(guest));
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(Arc::clone(&guest));
        service.call(request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIME_MAX)
        .max_buf_size(REQUEST_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "HTTP connection ended");
    }
}

/// Comes back when somebody has to go: his time is over, or another one needs the place.
async fn has_to_go(guest: &Guest) {
    let time_is_over = async {
        tokio::time::sleep(STRANGER_TIME_MAX).await;
        if !guest.is_stranger() {
            tokio::time::sleep(CONNECTION_TIME_MAX.saturating_sub(STRANGER_TIME_MAX)).await;
        }
    };
    tokio::select! {
        () = guest.must_leave() => {}
        () = time_is_over => {}
    }
}

struct Shared {
    tokens: Tokens,
    pages: Arc<dyn Pages>,
    operations: Arc<dyn Operations>,
}

/// Sees who asks, before anything else. Whoever could have shown a token and has not is answered once.
async fn recognize(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let standing = shared.tokens.standing(request.headers());
    let guest = request.extensions().get::<Arc<Guest>>().cloned();
    let answer = guest.as_ref().and_then(|guest| guest.answer(standing));
    request.extensions_mut().insert(standing);
    let mut response = match answer {
        Some(_) => next.run(request).await,
        None => (StatusCode::SERVICE_UNAVAILABLE, "too many requests are being answered\n").into_response(),
    };
    if answer.is_none() || shared.tokens.are_set() && standing == Standing::Stranger {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// For what changes something: nobody may who is not known, from this machine neither.
async fn require_operator(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if !shared.tokens.has_operators() {
        return (StatusCode::FORBIDDEN, "admin.token_file must be set for this\n").into_response();
    }
    match standing_of(&request) {
        Standing::Operator => next.run(request).await,
        Standing::Reader => {
            (StatusCode::FORBIDDEN, "the token of admin.read_token_file may only read\n").into_response()
        }
        Standing::Stranger => unauthorized(),
    }
}

/// For what is shown to those who are known; where nobody can be, to all.
async fn require_reader(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if shared.tokens.may_read(standing_of(&request)) { next.run(request).await } else { unauthorized() }
}

fn standing_of(request: &Request) -> Standing {
    request.extensions().get().copied().unwrap_or(Standing::Stranger)
}

fn unauthorized() -> Response {
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], "a token is required\n")
        .into_response()
}

async fn readyz(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    match shared.pages.readiness() {
        Ok(()) => "ok\n".into_response(),
        Err(why) if shared.tokens.may_read(standing_of(&request)) => {
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

/// Most descriptors that the listener and its connections have: one beside those of the guests is for who is at the door.
pub const DESCRIPTORS_MAX: usize = GUESTS_MAX + 2;

/// Longest body of a request that changes something.
const OPERATION_BYTES_MAX: usize = 4 << 10;

/// Longest request head.
const REQUEST_BYTES_MAX: usize = 16 << 10;

/// Time for the head of a request to arrive, the first one or another.
const IDLE_TIME_MAX: Duration = Duration::from_secs(5);

/// Longest life of a connection over which no token was shown.
const STRANGER_TIME_MAX: Duration = Duration::from_secs(10);

/// Longest life of a connection.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(120);

/// Pause after a failed accept, which would otherwise spin when descriptors are exhausted.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
