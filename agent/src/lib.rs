//! The agent: the configuration manager inside a machine.
//!
//! A small static program that starts early in boot, serves the host over a
//! virtio-serial port, and applies layers. It does not know about recipes, images or
//! graphs. The host uses [`protocol`], [`fsctl`] and [`xattrs`].

pub mod protocol;
mod failure;
pub mod fsctl;
pub mod xattrs;
mod system;
mod place;
mod resolver;
mod offline;
mod fetch;
mod priority;
mod command;
mod boot_loader;
pub mod hooks;
mod ledger;
mod distribution;
mod init;
mod packages;
mod modules;
mod filesystem;
mod network;
pub mod opened;
mod retarget;
mod resume;
mod appliance;
mod primitive;
mod heartbeat;
mod apply;
mod http;
mod check;
mod exec;
mod list;
mod private_keys;
mod seal;
pub mod serve;
pub mod early;
