//! The HTTP listener as clients meet it: who may ask for what, and what those cost who may not.

use secrecy::SecretString;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
};

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

/// With these tokens: the one that may do everything, and the one that may only read.
async fn start(operator: Option<&str>, reader: Option<&str>) -> SocketAddr {
    let [operator, reader] =
        [operator, reader].map(|token| token.map(|text| SecretString::from(text.to_owned())));
    let tokens = Tokens::new(operator, reader);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let admin = Admin::new(listener, tokens, Arc::new(Fake), Arc::new(Fake));
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
    let address = start(None, None).await;
    assert!(get(address, "/livez", "").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/metrics", "").await.ends_with("walrelay_x 1\n"));
    assert!(get(address, "/status", "").await.ends_with("{\"name\":\"dc1_a\"}"));
    let ready = get(address, "/readyz", "").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.ends_with("no upstream yet\n"), "{ready}");
}

/// Every route, and its status: without a token set; with tokens of which none is given, a wrong one, the one that may only
/// read, and the one that may do everything.
const ROUTES: [(&str, &str, [u16; 5]); 16] = [
    ("GET", "/livez", [200, 200, 200, 200, 200]),
    ("GET", "/readyz", [503, 503, 503, 503, 503]),
    ("GET", "/metrics", [200, 401, 401, 200, 200]),
    ("POST", "/metrics", [405, 401, 401, 405, 405]),
    ("GET", "/status", [200, 401, 401, 200, 200]),
    ("POST", "/status", [405, 401, 401, 405, 405]),
    ("POST", "/fence", [403, 401, 401, 403, 200]),
    ("POST", "/unfence", [403, 401, 401, 403, 200]),
    ("POST", "/reload", [403, 401, 401, 403, 422]),
    ("GET", "/reload", [403, 401, 401, 403, 405]),
    ("GET", "/fence", [403, 401, 401, 403, 405]),
    ("PUT", "/unfence", [403, 401, 401, 403, 405]),
    ("POST", "/links", [403, 401, 401, 403, 400]),
    ("GET", "/links", [403, 401, 401, 403, 405]),
    ("GET", "/", [404, 404, 404, 404, 404]),
    ("POST", "/", [404, 404, 404, 404, 404]),
];

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

#[tokio::test]
async fn every_route_wants_the_token_it_should() {
    let open = start(None, None).await;
    let [guarded, read_only] =
        [start(Some("canary"), Some("reader")).await, start(None, Some("reader")).await];
    let wrong = [
        "Bearer canar",
        "Bearer canary2",
        "Bearer",
        "Basic canary",
        "canary",
        "bearer  canary",
        "Bearer read",
    ];
    for (method, path, [unset, absent, refused, reader, operator]) in ROUTES {
        let status = async |address, header: &str| {
            let answer = ask(address, method, path, header).await;
            answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
        };
        let of = format!("{method} {path}");
        assert_eq!(status(open, "").await, unset, "{of}, no token is set");
        assert_eq!(status(open, &bearer("canary")).await, unset, "{of}, no token is set");
        assert_eq!(status(guarded, "").await, absent, "{of}, none given");
        for wrong in wrong {
            let header = format!("Authorization: {wrong}\r\n");
            assert_eq!(status(guarded, &header).await, refused, "{of}, {wrong}");
        }
        assert_eq!(status(guarded, &bearer("reader")).await, reader, "{of}, to read");
        assert_eq!(status(guarded, &bearer("canary")).await, operator, "{of}");
        // With the one to read alone nothing can be changed by anybody.
        assert_eq!(status(read_only, &bearer("reader")).await, reader, "{of}, to read, alone");
        let nobody = if unset == 403 { 403 } else { refused };
        assert_eq!(status(read_only, &bearer("canary")).await, nobody, "{of}, one that is not set");
    }
}

#[tokio::test]
async fn the_token_to_read_shows_what_is_there_and_is_told_that_it_does_no_more() {
    let address = start(Some("canary"), Some("reader")).await;
    let (reader, operator) = (bearer("reader"), bearer("canary"));
    assert!(get(address, "/readyz", &reader).await.ends_with("no upstream yet\n"));
    assert!(get(address, "/metrics", &reader).await.ends_with("walrelay_x 1\n"));
    let told = ask(address, "POST", "/fence", &reader).await;
    assert!(told.ends_with("the token of admin.read_token_file may only read\n"), "{told}");
    assert!(get(address, "/metrics", &operator).await.ends_with("walrelay_x 1\n"));
    let alone = start(None, Some("reader")).await;
    let told = ask(alone, "POST", "/fence", &reader).await;
    assert!(told.ends_with("admin.token_file must be set for this\n"), "{told}");
}

#[tokio::test]
async fn nothing_is_told_to_those_without_the_token() {
    let address = start(Some("canary"), None).await;
    assert!(get(address, "/readyz", "").await.ends_with("not ready\n"));
    assert!(get(address, "/status", "").await.ends_with("a token is required\n"));
    let right = &bearer("canary");
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
    let address = start(Some("canary"), None).await;
    let meant = |name: &str| format!("{}{RELAY_HEADER}: {name}\r\n", bearer("canary"));
    for (path, status) in [("/fence", "200"), ("/unfence", "200"), ("/reload", "422")] {
        let answer = ask(address, "POST", path, &meant("dc1_a")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        let answer = ask(address, "POST", path, &meant("dc1_b")).await;
        assert!(answer.starts_with("HTTP/1.1 409"), "{answer}");
        assert!(answer.ends_with("{\"error\":\"this is relay \\\"dc1_a\\\"\"}"), "{answer}");
    }
}

/// An idle connection from one of this machine's own addresses.
async fn idle_from(address: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((address, 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

#[tokio::test]
async fn whoever_holds_many_idle_connections_keeps_nobody_out() {
    let address = start(Some("canary"), None).await;
    // From elsewhere, and from where the operator is, too.
    for crowd in [[127, 0, 0, 2], [127, 0, 0, 1]] {
        let mut idle = Vec::new();
        for _ in 0..16 + 200 {
            idle.push(idle_from(crowd, address).await);
        }
        let begun = std::time::Instant::now();
        let answer = ask(address, "POST", "/fence", &bearer("canary")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_left_soon() {
    let address = start(None, None).await;
    let begun = tokio::time::Instant::now();
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.read_to_end(&mut Vec::new()).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), IDLE_TIME_MAX.as_secs());
}

#[tokio::test]
async fn where_a_token_is_set_only_those_who_show_it_may_ask_again() {
    let (open, guarded) = (start(None, None).await, start(Some("canary"), Some("reader")).await);
    let ask_twice = async |address, header: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET /livez HTTP/1.1\r\nHost: x\r\n{header}\r\n");
        let last = format!("GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n");
        stream.write_all((request + &last).as_bytes()).await.unwrap();
        let mut answers = Vec::new();
        stream.read_to_end(&mut answers).await.unwrap();
        String::from_utf8(answers).unwrap().matches("HTTP/1.1 200").count()
    };
    assert_eq!(ask_twice(open, "").await, 2);
    assert_eq!(ask_twice(guarded, "").await, 1);
    assert_eq!(ask_twice(guarded, &bearer("wrong")).await, 1);
    for token in ["reader", "canary"] {
        assert_eq!(ask_twice(guarded, &bearer(token)).await, 2, "{token}");
    }
}
