//! Brings up an appliance's network card with a fixed address: this needs no DHCP and no
//! program of the image.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::ioctl::{Opcode, Setter, ioctl};
use rustix::net::{AddressFamily, SocketType, socket};

use crate::protocol::card::{ADDRESS, GATEWAY, NETMASK};

// linux/sockios.h
const SIOCADDRT: Opcode = 0x890B;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFADDR: Opcode = 0x8916;
const SIOCSIFNETMASK: Opcode = 0x891C;
/// net/if.h: IFF_UP and IFF_RUNNING.
const UP: u16 = 0x41;
/// linux/route.h: RTF_UP and RTF_GATEWAY.
const ROUTE: u16 = 0x3;
const CARD_WAIT: Duration = Duration::from_secs(10);

/// `struct ifreq`: a name, and the members of its union that are used here.
#[repr(C)]
struct Interface {
    name: [u8; 16],
    value: [u8; 24],
}

/// `struct sockaddr_in`.
fn address(of: [u8; 4]) -> [u8; 16] {
    let mut out = [0; 16];
    out[..2].copy_from_slice(&2_u16.to_ne_bytes());
    out[4..8].copy_from_slice(&of);
    out
}

/// `struct rtentry` on 64 bits: padding, three addresses, flags, the rest zero.
#[repr(C)]
struct Route {
    pad1: u64,
    to: [u8; 16],
    gateway: [u8; 16],
    mask: [u8; 16],
    flags: u16,
    rest: [u64; 8],
}

fn interface(name: &str, value: &[u8]) -> Interface {
    let mut request = Interface { name: [0; 16], value: [0; 24] };
    request.name[..name.len().min(15)].copy_from_slice(&name.as_bytes()[..name.len().min(15)]);
    request.value[..value.len()].copy_from_slice(value);
    request
}

fn set<const OPCODE: Opcode>(socket: &OwnedFd, request: Interface) -> io::Result<()> {
    // SAFETY: the opcode takes a `struct ifreq`, which `Interface` is.
    unsafe { ioctl(socket.as_fd(), Setter::<OPCODE, Interface>::new(request)) }.map_err(io::Error::from)
}

/// Brings up the loopback device, which every machine has.
pub(crate) fn loopback() -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    set::<SIOCSIFFLAGS>(&socket, interface("lo", &UP.to_ne_bytes()))
}

/// Brings up the first card. Its driver is already loaded.
pub(crate) fn up() -> io::Result<()> {
    let start = Instant::now();
    let card = loop {
        let mut cards =
            fs::read_dir("/sys/class/net")?.flatten().filter_map(|e| e.file_name().into_string().ok());
        if let Some(card) = cards.find(|name| name != "lo") {
            break card;
        }
        if start.elapsed() > CARD_WAIT {
            return Err(io::Error::other("timed out waiting for the network card"));
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    set::<SIOCSIFADDR>(&socket, interface(&card, &address(ADDRESS)))?;
    set::<SIOCSIFNETMASK>(&socket, interface(&card, &address(NETMASK)))?;
    set::<SIOCSIFFLAGS>(&socket, interface(&card, &UP.to_ne_bytes()))?;
    let route = Route {
        pad1: 0,
        to: address([0; 4]),
        gateway: address(GATEWAY),
        mask: address([0; 4]),
        flags: ROUTE,
        rest: [0; 8],
    };
    // SAFETY: the opcode takes a `struct rtentry`, which `Route` is.
    let added = unsafe { ioctl(socket.as_fd(), Setter::<SIOCADDRT, Route>::new(route)) };
    match added {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
