//! A proxy in front of an S3 server makes one fault at one request. Every state
//! that arrives is correct, and vimg reports every failure.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vimg::cache::gc;
use vimg::cache::object::Object;
use vimg::cache::remote::Remote;
use vimg::cache::spec::Spec;
use vimg::digest::Key;

use crate::common::{Runner, listed, wait};
use crate::{s3_here, servers};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The connection ends without an answer.
    Cut,
    /// There is no answer, and the connection stays open.
    Stall,
    /// The answer is late.
    Delay,
    /// The answer waits until the next request is answered.
    Reorder,
    /// A byte of the answer's body is changed.
    CorruptAnswer,
    /// A byte of the request's body is changed.
    CorruptRequest,
    /// The answer ends in the middle, but announces its full length.
    Truncate,
    /// The answer is complete, but has only half of the body.
    Short,
    /// The halves of the answer are swapped.
    Swap,
    /// The answer has another status.
    Status(u16, &'static str),
}

const FAULTS: [Fault; 13] = [
    Fault::Cut,
    Fault::Stall,
    Fault::Delay,
    Fault::Reorder,
    Fault::CorruptAnswer,
    Fault::CorruptRequest,
    Fault::Truncate,
    Fault::Short,
    Fault::Swap,
    Fault::Status(500, ""),
    Fault::Status(503, ""),
    Fault::Status(503, "Retry-After: 1\r\n"),
    Fault::Status(429, "Retry-After: 1\r\n"),
];

/// The proxy, with its fault and the number of requests so far.
struct Proxy {
    address: SocketAddr,
    count: Arc<AtomicUsize>,
}

impl Proxy {
    /// Makes the fault at the request with this number, and at the following
    /// ones, `times` in all.
    fn new(upstream: SocketAddr, fault: Option<Fault>, at: usize, times: usize) -> Self {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let address = listen(move |client| {
            let counter = counter.clone();
            async move { serve(client, upstream, fault, at..at.saturating_add(times), &counter).await }
        });
        Self { address, count }
    }
}

/// Listens on a free port of the loopback and serves each client.
fn listen<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    wait(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // A fault may well end a connection.
                tokio::spawn(serve(client));
            }
        });
        address
    })
}

/// Reads a message's head and its body, whose length the head gives.
async fn message(stream: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    };
    let body = bytes.split_off(end);
    let head = String::from_utf8_lossy(&bytes).into_owned();
    Ok((head, body))
}

fn length(head: &str) -> Option<usize> {
    let line =
        head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length:").map(str::to_owned))?;
    line.trim().parse().ok()
}

async fn serve(
    mut client: TcpStream,
    upstream: SocketAddr,
    fault: Option<Fault>,
    at: std::ops::Range<usize>,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let (head, mut body) = message(&mut client).await?;
    let all = length(&head).unwrap_or(0);
    while body.len() < all {
        if client.read_buf(&mut body).await? == 0 {
            return Ok(());
        }
    }
    let number = count.fetch_add(1, Ordering::SeqCst);
    let fault = fault.filter(|_| at.contains(&number));
    match fault {
        Some(Fault::Cut) => return Ok(()),
        Some(Fault::Stall) => std::future::pending().await,
        Some(Fault::Status(status, header)) => {
            let answer =
                format!("HTTP/1.1 {status} No\r\n{header}Content-Length: 0\r\nConnection: close\r\n\r\n");
            return client.write_all(answer.as_bytes()).await;
        }
        Some(Fault::CorruptRequest) if !body.is_empty() => {
            let middle = body.len() / 2;
            body[middle] ^= 1;
        }
        _ => {}
    }
    let mut server = TcpStream::connect(upstream).await?;
    let head: Vec<&str> = head.lines().filter(|l| !l.to_lowercase().starts_with("connection:")).collect();
    let head = format!("{}\r\nConnection: close\r\n\r\n", head.join("\r\n").trim_end());
    server.write_all(head.as_bytes()).await?;
    server.write_all(&body).await?;
    let (head, mut body) = message(&mut server).await?;
    server.read_to_end(&mut body).await?;
    let half = body.len() / 2;
    let mut head = head;
    match fault {
        Some(Fault::Delay) => tokio::time::sleep(Duration::from_millis(100)).await,
        Some(Fault::Reorder) => {
            let start = Instant::now();
            while count.load(Ordering::SeqCst) == number + 1 && start.elapsed() < Duration::from_millis(300) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        Some(Fault::CorruptAnswer) if !body.is_empty() => body[half] ^= 1,
        Some(Fault::Swap) => body.rotate_left(half),
        Some(Fault::Truncate) => body.truncate(half),
        Some(Fault::Short) if length(&head).is_some_and(|all| all > 1) => {
            head = head.replace(&format!("{}", length(&head).unwrap()), &half.to_string());
            body.truncate(half);
        }
        _ => {}
    }
    client.write_all(head.as_bytes()).await?;
    client.write_all(&body).await
}

/// The result of sending everything and fetching it.
struct Ended {
    requests: usize,
    /// How many states arrived.
    fetched: usize,
    /// All notices.
    told: Vec<String>,
}

fn scenario(writer: &Runner, keys: [Key; 3], fault: Option<Fault>, at: usize, times: usize) -> Ended {
    let server = s3_here::serve();
    let proxy = Proxy::new(server.address(), fault, at, times);
    let patience = if fault == Some(Fault::Stall) { 1 } else { 4 };
    let open = |to| {
        let spec = format!("{},domain=main,timeout={patience}s", server.spec_at(proxy.address));
        Arc::new(Remote::open(Spec::parse(&spec, to).unwrap()).unwrap())
    };
    let to = open(true);
    let mut told = Vec::new();
    if let Err(why) = writer.try_push(&writer.with(&to, Some(&to)), &to, &keys) {
        told.push(why);
    }
    told.extend(to.faults().into_keys());
    let reader = Runner::new();
    let from = open(false);
    let caches = reader.with(&from, None);
    let mut fetched = 0;
    for key in [keys[2], keys[1]] {
        match reader.fetch(&caches, key) {
            Ok(_) => {
                assert!(reader.same(writer, key), "{fault:?} at {at}: a wrong state came through");
                fetched += 1;
            }
            Err(why) => {
                assert!(!reader.store.has(&key), "{fault:?} at {at}: {why}, and it is there");
                told.push(why);
            }
        }
    }
    told.extend(from.faults().into_keys());
    told.extend(reader.told());
    Ended { requests: proxy.count.load(Ordering::SeqCst), fetched, told }
}

#[test]
fn no_fault_of_a_server_makes_a_wrong_state() {
    let mut writer = Runner::new();
    let (base, layer, output) = writer.project(70);
    let keys = [base, layer, output];
    let plain = scenario(&writer, keys, None, 0, 0);
    assert_eq!((plain.fetched, plain.told.len()), (2, 0), "{:?}", plain.told);
    assert!((15..60).contains(&plain.requests), "{}", plain.requests);
    let cases: Vec<(Fault, usize)> =
        (0..plain.requests).flat_map(|at| FAULTS.iter().map(move |fault| (*fault, at))).collect();
    let next = AtomicUsize::new(0);
    let whole = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some((fault, at)) = cases.get(next.fetch_add(1, Ordering::SeqCst)).copied() {
                    let ended = scenario(&writer, keys, Some(fault), at, 1);
                    let silent = ended.told.is_empty();
                    assert!(ended.fetched == 2 || !silent, "{fault:?} at {at}: not said");
                    let loud = matches!(fault, Fault::Cut | Fault::Stall | Fault::Status(..));
                    assert!(!loud || !silent, "{fault:?} at {at}: not said");
                    let harmless = matches!(fault, Fault::Delay | Fault::Reorder);
                    assert!(
                        !harmless || (ended.fetched == 2 && silent),
                        "{fault:?} at {at}: {:?}",
                        ended.told
                    );
                    whole.fetch_add(usize::from(ended.fetched == 2), Ordering::SeqCst);
                }
            });
        }
    });
    // Most requests that fail once are repeated.
    let whole = whole.into_inner();
    assert!(whole * 10 > cases.len() * 7, "only {whole} of {} came through", cases.len());
}

/// A server that fails at everything delays a build by no more than the retry
/// budget.
#[test]
fn a_server_that_always_fails_is_given_up() {
    let mut writer = Runner::new();
    let (base, layer, output) = writer.project(80);
    for fault in
        [Fault::Stall, Fault::Cut, Fault::Status(503, "Retry-After: 3600\r\n"), Fault::Status(500, "")]
    {
        let ended = scenario(&writer, [base, layer, output], Some(fault), 0, usize::MAX);
        assert_eq!(ended.fetched, 0);
        assert!(!ended.told.is_empty());
        assert!(ended.requests < 60, "{fault:?}: {} requests", ended.requests);
    }
}

/// A list is whole, or there is none: what a list lacks would be deleted.
#[test]
fn a_list_is_never_a_part_of_one() {
    let mut writer = Runner::new();
    let (base, layer, output) = writer.project(90);
    let server = servers::webdav();
    let open = |address, patience| {
        let spec = format!("{},domain=main,timeout={patience}", server.spec_at(address));
        Arc::new(Remote::open(Spec::parse(&spec, true).unwrap()).unwrap())
    };
    let to = open(server.address(), "60s");
    writer.try_push(&writer.with(&to, Some(&to)), &to, &[base, layer, output]).unwrap();
    let names = |remote: Arc<Remote>| {
        let listing = wait(gc::list(&remote));
        listing.map(|listing| (listed(&listing), listing.packs))
    };
    let whole = names(to).unwrap();
    assert!(whole.0.len() >= 2 && !whole.1.is_empty(), "{whole:?}");
    let quiet = Proxy::new(server.address(), None, 0, 0);
    names(open(quiet.address, "60s")).unwrap();
    let requests = quiet.count.load(Ordering::SeqCst);
    assert!((4..40).contains(&requests), "{requests}");
    for at in 0..requests {
        for (fault, times) in
            [(Fault::Cut, 1), (Fault::Cut, usize::MAX), (Fault::Status(500, ""), usize::MAX)]
        {
            let proxy = Proxy::new(server.address(), Some(fault), at, times);
            match names(open(proxy.address, "60s")) {
                Ok(found) => assert_eq!(found, whole, "{fault:?} at {at}"),
                Err(_) => assert!(times > 1, "{fault:?} at {at} is not tried again"),
            }
        }
    }
    // No server listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(names(open(free, "2s")).is_err());
}

/// Answers of a registry take only a limited amount of memory.
#[test]
fn a_registry_that_does_not_end_is_cut_off() {
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let address = listen(move |client| {
        let counter = counter.clone();
        async move { answer_without_end(client, &counter).await }
    });
    let spec = Spec::parse(&format!("type=registry,ref={address}/cache/web,domain=main"), false).unwrap();
    let remote = Arc::new(Remote::open(spec).unwrap());
    let record = Object::Record { domain: "main".into(), key: Key(vimg::digest::Digest::of(b"x")) };
    for asked in [wait(remote.get(&record, 100)).err(), wait(gc::list(&remote)).err()] {
        let why = asked.map(|trouble| trouble.to_string()).unwrap_or_default();
        assert!(why.contains("a response is too long"), "{why}");
    }
    // Sockets buffer some more than was read.
    let sent = sent.load(Ordering::SeqCst);
    assert!((8 << 20..64 << 20).contains(&sent), "{sent} bytes were taken");
}

/// A registry whose manifests and lists of tags never end.
async fn answer_without_end(mut client: TcpStream, sent: &AtomicUsize) -> std::io::Result<()> {
    let (head, _) = message(&mut client).await?;
    if head.starts_with("GET /v2/ ") {
        return client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    }
    client.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await?;
    loop {
        client.write_all(&[b' '; 64 << 10]).await?;
        sent.fetch_add(64 << 10, Ordering::SeqCst);
    }
}
