//! One HTTP request for a check: HTTP/1.0, so that a response is not chunked and ends
//! with its connection.

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
    let request =
        format!("GET {slash}{path} HTTP/1.0\r\nHost: {authority}\r\nUser-Agent: vimg\r\nAccept: */*\r\n\r\n");
    stream.set_write_timeout(Some(patience)).map_err(|e| e.to_string())?;
    stream.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let left = patience.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err("the response did not end in time".into());
        }
        stream.set_read_timeout(Some(left)).map_err(|e| e.to_string())?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => bytes.extend(&chunk[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err("there was no response in time".into());
            }
            Err(error) => return Err(error.to_string()),
        }
        if bytes.len() as u64 > MOST {
            return Err(format!("the response is larger than {} MiB", MOST >> 20));
        }
    }
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<Answer, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let head = match answer.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Err("the response ends before the end of its headers".into()),
        Err(error) => return Err(format!("the response is not HTTP: {error}")),
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Answer {
        status: answer.code.ok_or("the response has no status code")?,
        headers: answer.headers.iter().map(|h| (h.name.to_owned(), text(h.value))).collect(),
        body: text(&bytes[head..]),
    })
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

    /// Starts a server that answers each request with the next of `answers`.
    fn serve(answers: &'static [&'static [u8]]) -> u16 {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let n = stream.read(&mut request).unwrap();
                assert!(request[..n].starts_with(b"GET /a?b HTTP/1.0\r\nHost: localhost:"));
                stream.write_all(answer).unwrap();
            }
        });
        port
    }

    #[test]
    fn answers_are_read_to_their_end_and_nonsense_is_named() {
        let port = serve(&[
            b"HTTP/1.1 404 Not Found\r\nServer: x\r\nserver: y\r\n\r\nno \xff",
            b"SSH-2.0-OpenSSH\r\n",
            b"HTTP/1.1 200 OK\r\nA: b",
        ]);
        let url = format!("http://localhost:{port}/a?b");
        let answer = get(&url, Duration::from_secs(10)).unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (404, "no \u{fffd}"));
        assert_eq!(answer.header("SERVER").collect::<Vec<_>>(), ["x", "y"]);
        assert!(get(&url, Duration::from_secs(10)).err().unwrap().contains("not HTTP"));
        assert!(get(&url, Duration::from_secs(10)).err().unwrap().contains("ends before"));
    }
}
