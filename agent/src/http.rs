//! One HTTP request for a check, as clients of today send it: HTTP/1.1 with a `Host`. It
//! follows no redirects, and takes one response from the connection.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::command;

/// Largest response, in bytes.
const MOST: u64 = 16 << 20;
/// The most headers of a response.
const HEADERS: usize = 128;

/// A response.
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    /// Returns the values of a header.
    pub(crate) fn header<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = move |(n, _): &&(String, String)| n.eq_ignore_ascii_case(name);
        self.headers.iter().filter(named).map(|(_, value)| value.as_str())
    }
}

/// Connects to a port of the machine itself.
pub(crate) fn connect(port: u16, patience: Duration) -> Result<TcpStream, String> {
    let own = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    any(&own, port, patience)
}

fn any(addresses: &[IpAddr], port: u16, patience: Duration) -> Result<TcpStream, String> {
    let mut first = None;
    for address in addresses {
        match TcpStream::connect_timeout(&SocketAddr::new(*address, port), patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                first.get_or_insert(format!("{address} port {port}: {error}"));
            }
        }
    }
    Err(first.unwrap_or_else(|| "the host has no address".into()))
}

/// Requests `url`, within the time `patience`.
pub(crate) fn get(url: &str, patience: Duration) -> Result<Answer, String> {
    let start = Instant::now();
    let rest = url.strip_prefix("http://").ok_or("not an `http://` URL")?;
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(at);
    let (host, port) = host_and_port(authority)?;
    let mut stream = any(&resolve(host)?, port, patience)?;
    let slash = if path.starts_with('/') { "" } else { "/" };
    let request = format!(
        "GET {slash}{path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: vimg\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n"
    );
    stream.set_write_timeout(Some(patience)).map_err(|e| e.to_string())?;
    stream.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
    let mut incoming = Incoming { stream, deadline: start + patience, bytes: Vec::new(), received: 0 };
    let mut head = incoming.head()?;
    // Interim responses come before the final one (RFC 9110, 15.2).
    while (100..200).contains(&head.status) && head.status != SWITCHING {
        head = incoming.head()?;
    }
    let body = match head.framing()? {
        Framing::None => Vec::new(),
        Framing::Chunked => incoming.chunks()?,
        Framing::Length(length) => incoming.take(length)?,
        Framing::Close => incoming.rest()?,
    };
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok(Answer { status: head.status, headers: head.headers, body })
}

/// The status after which the connection has another protocol.
const SWITCHING: u16 = 101;

/// Where the body of a response ends (RFC 9112, 6.3).
enum Framing {
    None,
    Chunked,
    Length(usize),
    /// With the connection.
    Close,
}

struct Head {
    status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    fn framing(&self) -> Result<Framing, String> {
        let value = |name: &str| {
            let mut named = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
            named.next_back().map(|(_, value)| value.trim())
        };
        if [SWITCHING, 204, 304].contains(&self.status) {
            return Ok(Framing::None);
        }
        if let Some(coding) = value("Transfer-Encoding") {
            let chunked = coding.to_ascii_lowercase().ends_with("chunked");
            return Ok(if chunked { Framing::Chunked } else { Framing::Close });
        }
        match value("Content-Length") {
            Some(length) => {
                let length =
                    length.parse().map_err(|_| format!("the response has a length of `{length}`"))?;
                Ok(Framing::Length(length))
            }
            None => Ok(Framing::Close),
        }
    }
}

/// A response that is being received.
struct Incoming {
    stream: TcpStream,
    deadline: Instant,
    /// Received bytes that are not used yet.
    bytes: Vec<u8>,
    /// The bytes received so far.
    received: u64,
}

impl Incoming {
    /// Receives more; returns whether there was more.
    fn more(&mut self) -> Result<bool, String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("the response did not end in time".into());
        }
        self.stream.set_read_timeout(Some(left)).map_err(|e| e.to_string())?;
        let mut chunk = [0; 16 << 10];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Ok(false),
            Ok(n) => {
                self.bytes.extend(&chunk[..n]);
                self.received += n as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err("there was no response in time".into());
            }
            Err(error) => return Err(error.to_string()),
        }
        if self.received > MOST {
            return Err(format!("the response is larger than {} MiB", MOST >> 20));
        }
        Ok(true)
    }

    /// Receives the head of a response.
    fn head(&mut self) -> Result<Head, String> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS];
            let mut response = httparse::Response::new(&mut headers);
            match response.parse(&self.bytes) {
                Ok(httparse::Status::Complete(length)) => {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    let head = Head {
                        status: response.code.ok_or("the response has no status code")?,
                        headers: response
                            .headers
                            .iter()
                            .map(|h| (h.name.to_owned(), text(h.value)))
                            .collect(),
                    };
                    self.bytes.drain(..length);
                    return Ok(head);
                }
                Ok(httparse::Status::Partial) => {}
                Err(error) => return Err(format!("the response is not HTTP: {error}")),
            }
            if !self.more()? {
                return Err("the response ends before the end of its headers".into());
            }
        }
    }

    /// Receives a body of this length.
    fn take(&mut self, length: usize) -> Result<Vec<u8>, String> {
        while self.bytes.len() < length {
            if !self.more()? {
                return Err(format!("the response ends after {} of {length} bytes", self.bytes.len()));
            }
        }
        let rest = self.bytes.split_off(length);
        Ok(std::mem::replace(&mut self.bytes, rest))
    }

    /// Receives a body in chunks; leaves the fields after it.
    fn chunks(&mut self) -> Result<Vec<u8>, String> {
        let mut body = Vec::new();
        loop {
            match httparse::parse_chunk_size(&self.bytes) {
                Ok(httparse::Status::Complete((_, 0))) => return Ok(body),
                Ok(httparse::Status::Complete((start, size))) => {
                    let size = usize::try_from(size).ok().filter(|size| *size as u64 <= MOST);
                    let size =
                        size.ok_or_else(|| format!("the response is larger than {} MiB", MOST >> 20))?;
                    self.bytes.drain(..start);
                    // The chunk and the end of its line.
                    let mut chunk = self.take(size + 2)?;
                    chunk.truncate(size);
                    body.extend(chunk);
                }
                Ok(httparse::Status::Partial) if self.more()? => {}
                Ok(httparse::Status::Partial) => return Err("the response ends before its last chunk".into()),
                Err(_) => return Err("the response has a chunk without a size".into()),
            }
        }
    }

    /// Receives everything up to the end of the connection.
    fn rest(&mut self) -> Result<Vec<u8>, String> {
        while self.more()? {}
        Ok(std::mem::take(&mut self.bytes))
    }
}

fn host_and_port(authority: &str) -> Result<(&str, u16), String> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("`[` without `]`")?;
            (host, rest.strip_prefix(':'))
        }
        None => match authority.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = port.map_or(Ok(80), str::parse).map_err(|_| format!("`{authority}` has an invalid port"))?;
    Ok((host, port))
}

/// Resolves a host name. A static program can't use the name services of the machine, so
/// this runs `getent`.
fn resolve(host: &str) -> Result<Vec<IpAddr>, String> {
    if host == "localhost" {
        return Ok(vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
    }
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    let mut getent = command::command("getent");
    getent.args(["ahosts", host]);
    let (_, text) = command::query(&mut getent, command::QUESTION).map_err(|f| f.message)?;
    let mut found: Vec<IpAddr> =
        text.lines().filter_map(|l| l.split_whitespace().next()?.parse().ok()).collect();
    found.dedup();
    if found.is_empty() { Err(format!("the machine can't resolve `{host}`")) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_taken_apart() {
        assert_eq!(host_and_port("localhost"), Ok(("localhost", 80)));
        assert_eq!(host_and_port("a:8080"), Ok(("a", 8080)));
        assert_eq!(host_and_port("[::1]:8080"), Ok(("::1", 8080)));
        assert_eq!(host_and_port("[::1]"), Ok(("::1", 80)));
        assert!(host_and_port("a:b").is_err());
    }

    /// Starts a server on a loopback address that answers each request with the next of
    /// `answers`, and leaves its connections open.
    fn serve(address: &str, answers: &'static [&'static [u8]]) -> Option<u16> {
        let listener = std::net::TcpListener::bind((address, 0)).ok()?;
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let n = stream.read(&mut request).unwrap();
                assert!(request[..n].starts_with(b"GET /a?b HTTP/1.1\r\nHost: localhost:"));
                stream.write_all(answer).unwrap();
                if answer.ends_with(b"\n") || answer.ends_with(b"b") {
                    drop(stream);
                } else {
                    open.push(stream);
                }
            }
            std::thread::park();
        });
        Some(port)
    }

    fn ask(port: u16) -> Result<Answer, String> {
        get(&format!("http://localhost:{port}/a?b"), Duration::from_secs(10))
    }

    #[test]
    fn answers_are_read_to_their_end_and_nonsense_is_named() {
        let port = serve(
            "127.0.0.1",
            &[
                b"HTTP/1.1 404 Not Found\r\nServer: x\r\nserver: y\r\n\r\nno \xff\n",
                b"SSH-2.0-OpenSSH\r\n",
                b"HTTP/1.1 200 OK\r\nA: b",
                b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nb",
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfull\r\nb",
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffff\r\nb",
            ],
        )
        .unwrap();
        let answer = ask(port).unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (404, "no \u{fffd}\n"));
        assert_eq!(answer.header("SERVER").collect::<Vec<_>>(), ["x", "y"]);
        for wrong in ["not HTTP", "ends before", "after 1 of 9", "last chunk", "larger than"] {
            let message = ask(port).err().unwrap();
            assert!(message.contains(wrong), "{wrong}: {message}");
        }
    }

    #[test]
    fn a_response_ends_where_it_says_and_not_with_its_connection() {
        // Each server leaves the connection open.
        let port = serve(
            "127.0.0.1",
            &[
                b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfull",
                b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n\
                  3;x=y\r\nfu \r\n2\r\nll\r\n0\r\n\r\n ",
                b"HTTP/1.1 204 No Content\r\n\r\n ",
                b"HTTP/1.1 301 Moved\r\nLocation: /\r\nContent-Length: 1\r\n\r\n.",
            ],
        )
        .unwrap();
        let answers: Vec<(u16, String)> =
            (0..4).map(|_| ask(port).unwrap()).map(|answer| (answer.status, answer.body)).collect();
        let expected = [(200, "full"), (200, "fu ll"), (204, ""), (301, ".")];
        assert_eq!(answers, expected.map(|(status, body)| (status, body.to_owned())));
    }

    #[test]
    fn localhost_is_also_the_address_of_version_6() {
        // A host without IPv6 has no such address.
        if let Some(port) = serve("::1", &[b"HTTP/1.1 200 OK\r\n\r\nsix\n"]) {
            assert_eq!(ask(port).unwrap().body, "six\n");
        }
    }
}
