//! Sockets of clients: listeners, and connections that are driven from above during the negotiation and then serve a
//! device by themselves.
//!
//! Rules: each connection has one thread, which alone reads from its socket; commands reach it through a bounded queue
//! and are answered in order; closing never waits for the peer (the socket is shut down under whatever reads or writes).
//! TLS lies below all of it: whoever reads and writes does not see it, and a plain socket does not pay for it.
mod connection;
mod listener;
mod patience;
mod socket;
mod tls;

pub use connection::{CONNECTION_READ_BYTES_MAX, Connection};
pub(crate) use listener::ConnectionCount;
pub use listener::{CONNECTION_COUNT_MAX, Endpoint, Listener};
pub(crate) use patience::Patience;
pub(crate) use socket::Socket;
pub use tls::{TlsConfig, TlsPeer};
