//! Servers: machines that keep running after vimg has ended. Each has a
//! directory with its disks, its sockets and a record.

mod record;
mod ports;
mod running;
mod branch;
mod hooks;
mod end;
mod start;
mod apply;

pub use apply::{Changes, apply, difference};
pub use branch::save;
pub use end::{down, exec};
pub use ports::free_ports;
pub use record::{ServerRecord, known};
pub use running::runs;
pub use start::{Came, up};
