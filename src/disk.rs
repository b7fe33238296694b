//! Everything about local disk images: their files, partitions and
//! filesystems; creating, converting and comparing them. It does not know what
//! disks are for.

pub mod qcow2;
pub mod ext4;
pub mod gpt;
pub mod fat;
pub mod grub;
pub mod layout;
pub mod extract;
pub mod volumes;
pub mod bootable;
pub mod difference;
pub mod direct;
pub mod image;
pub mod sparse;
mod tool;

pub use bootable::Problem;
pub use difference::{Exported, Made};
pub use tool::{DiskTool, QemuDisks};
