//! TLS under a connection: the credentials of a server, and the records of one connection.
//!
//! Rules of a session:
//! - The connection's state is one for both directions. Its lock is held while records are made or opened, never across a
//!   system call: a sender that waits for its peer does not hold up the reading thread.
//! - Records leave in the order in which they were made: whoever makes some holds `outgoing` until they are sent.
//! - Locks are taken in the order `incoming` or `outgoing`, then `connection`.
//! - What a peer can make us keep is bounded by the buffers here and by the bounds of the library (I8).
//! - No tickets are given out and no session is taken up again: every connection shows its certificate anew.
use super::socket::RawSocket;
use crate::{EngineError, Result};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Names of the files in a folder of credentials, as QEMU, libvirt and the other NBD servers have them.
const CA_FILE: &str = "ca-cert.pem";
const REVOKED_FILE: &str = "ca-crl.pem";
const CERTIFICATE_FILE: &str = "server-cert.pem";
const KEY_FILE: &str = "server-key.pem";

/// Longest file of credentials (I8).
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Records as they come from the peer, received in one go.
const INCOMING_BYTES: usize = 256 << 10;

/// Data that is turned into records and sent in one go.
const OUTGOING_BYTES_MAX: usize = 128 << 10;

/// What a server shows and whom it lets in: certificate, key, and the authority of its clients.
pub struct TlsConfig(Arc<ServerConfig>);

/// What a handshake settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPeer {
    /// `TLSv1_3` or `TLSv1_2`.
    pub protocol: String,
    /// Name of the cipher suite.
    pub cipher_suite: String,
    /// The peer's certificate (DER), if one was asked for: it was verified then.
    pub certificate: Option<Vec<u8>>,
}

impl TlsConfig {
    /// Reads `server-cert.pem` and `server-key.pem`, and where clients are to be verified `ca-cert.pem` and, if there is one,
    /// `ca-crl.pem`. With `verify_clients` a client without a certificate of that authority is refused.
    ///
    /// `TLS_CREDENTIALS_INVALID` names the file: missing, not PEM, without what is wanted, a key of another certificate.
    pub fn load(directory: &Path, verify_clients: bool) -> Result<TlsConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| EngineError::new("ENGINE_PANIC", libc::EIO, format!("TLS cannot be set up: {error}")))?;
        let builder = if verify_clients {
            let ca_path = directory.join(CA_FILE);
            let mut roots = RootCertStore::empty();
            for certificate in read_certificates(&ca_path)? {
                roots.add(certificate).map_err(|error| invalid(&ca_path, format!("is no certificate of an authority: {error}")))?;
            }
            let revoked_path = directory.join(REVOKED_FILE);
            let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            if revoked_path.try_exists().unwrap_or(true) {
                let lists = read_sections::<CertificateRevocationListDer<'static>>(&revoked_path, "list of revoked certificates")?;
                // A list speaks of the authority that made it; certificates of others stand on their own.
                verifier = verifier.with_crls(lists).allow_unknown_revocation_status();
                verifier.clone().build().map_err(|error| invalid(&revoked_path, format!("cannot be used: {error}")))?;
            }
            builder.with_client_cert_verifier(verifier.build().map_err(|error| invalid(&ca_path, format!("cannot be used: {error}")))?)
        } else {
            builder.with_no_client_auth()
        };
        let (certificate_path, key_path) = (directory.join(CERTIFICATE_FILE), directory.join(KEY_FILE));
        let chain = read_certificates(&certificate_path)?;
        let key = read_key(&key_path)?;
        let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => invalid(&key_path, format!("is not the key of {}", certificate_path.display())),
            rustls::Error::InvalidCertificate(error) => invalid(&certificate_path, format!("cannot be used: {error}")),
            error => invalid(&key_path, format!("cannot be used with {}: {error}", certificate_path.display())),
        })?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(TlsConfig(Arc::new(config)))
    }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    read_sections(path, "certificate")
}

/// Every section of one kind in a PEM file, at least one.
fn read_sections<T: PemObject>(path: &Path, what: &str) -> Result<Vec<T>> {
    let text = read_file(path)?;
    let found = T::pem_slice_iter(&text).collect::<std::result::Result<Vec<T>, pem::Error>>();
    match found {
        Ok(found) if found.is_empty() => Err(invalid(path, format!("has no {what} in PEM form"))),
        Ok(found) => Ok(found),
        Err(_) => Err(invalid(path, "is not in PEM form".to_owned())),
    }
}

/// The private key of a PEM file. No message says anything of what is in the file.
fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let text = read_file(path)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        pem::Error::NoItemsFound => invalid(path, "has no private key without a passphrase in PEM form".to_owned()),
        _ => invalid(path, "is not in PEM form".to_owned()),
    })
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    let failed = |error: io::Error| invalid(path, format!("cannot be read: {error}"));
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(invalid(path, format!("is longer than {FILE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

fn invalid(path: &Path, problem: String) -> EngineError {
    let path: PathBuf = path.to_owned();
    EngineError::new("TLS_CREDENTIALS_INVALID", libc::EINVAL, format!("{} {problem}", path.display())).with("path", path.display())
}

/// The records of one connection, once its handshake is done.
pub(super) struct TlsSession {
    connection: Mutex<ServerConnection>,
    /// The reading thread's alone; a lock only because that thread has no more than a shared reference.
    incoming: Mutex<Incoming>,
    /// Held while records are made and sent. Empty between.
    outgoing: Mutex<Vec<u8>>,
}

/// Bytes received and not looked at yet.
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Receives what is there. 0: end of file. Call it when empty.
    fn fill(&mut self, socket: &RawSocket, deadline: Option<Instant>) -> Result<usize> {
        debug_assert!(self.is_empty());
        let count = socket.receive_until(&mut self.bytes, deadline)?;
        (self.start, self.end) = (0, count);
        Ok(count)
    }

    /// Moves some of it into the connection, which opens what is whole now.
    fn feed(&mut self, connection: &mut ServerConnection) -> std::result::Result<(), rustls::Error> {
        let mut rest = &self.bytes[self.start..self.end];
        match connection.read_tls(&mut rest) {
            // Never, as far as the library says; whoever calls this again and again would not end.
            Ok(0) => return Err(rustls::Error::General("a record makes no progress".to_owned())),
            Ok(count) => self.start += count,
            Err(error) => return Err(rustls::Error::General(error.to_string())),
        }
        connection.process_new_packets().map(|_| ())
    }
}

impl TlsSession {
    /// Shakes hands as the server. `TLS_HANDSHAKE_FAILED` says why not, `READ_TIMEOUT` that `deadline` passed; the connection is
    /// of no use then. Bytes that the peer sent before it was told to begin are taken as its first record: what was meant as
    /// plain text is no record, and the handshake fails.
    pub(super) fn accept(socket: &RawSocket, config: &TlsConfig, deadline: Instant) -> Result<(TlsSession, TlsPeer)> {
        let mut connection = ServerConnection::new(config.0.clone()).map_err(|error| handshake_failed(&error.to_string()))?;
        // Bounded by whoever fills it: everything that is put in is taken out at once.
        connection.set_buffer_limit(None);
        let mut incoming = Incoming { bytes: vec![0; INCOMING_BYTES], start: 0, end: 0 };
        let mut records = Vec::new();
        loop {
            take_records(&mut connection, &mut records)?;
            socket.send_all_until(&records, deadline)?;
            records.clear();
            if !connection.is_handshaking() {
                break;
            }
            if incoming.is_empty() && incoming.fill(socket, Some(deadline))? == 0 {
                return Err(handshake_failed("the peer closed the connection"));
            }
            if let Err(error) = incoming.feed(&mut connection) {
                // The alert that says why, if it can go out at once.
                if take_records(&mut connection, &mut records).is_ok() {
                    socket.send_now(&records);
                }
                return Err(handshake_failed(&error.to_string()));
            }
        }
        let peer = TlsPeer {
            protocol: connection.protocol_version().and_then(|version| version.as_str()).unwrap_or("unknown").to_owned(),
            cipher_suite: connection.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str()).unwrap_or("unknown").to_owned(),
            certificate: connection.peer_certificates().and_then(|chain| chain.first()).map(|first| first.to_vec()),
        };
        let session = TlsSession { connection: Mutex::new(connection), incoming: Mutex::new(incoming), outgoing: Mutex::new(records) };
        Ok((session, peer))
    }

    /// As `RawSocket::receive_until`, of what the records hold. A connection that ends without the peer's goodbye has ended all
    /// the same: requests say themselves how long they are.
    pub(super) fn receive_until(&self, socket: &RawSocket, buffer: &mut [u8], deadline: Option<Instant>) -> Result<usize> {
        let mut incoming = self.incoming.lock();
        loop {
            match self.open_records(&mut incoming, buffer) {
                Ok(Some(count)) => return Ok(count),
                Ok(None) => {}
                Err(error) => {
                    // The alert that says why.
                    self.send_now(socket, |_| {});
                    let message = format!("the peer sent what TLS does not allow: {error}");
                    return Err(EngineError::new("CONNECTION_CLOSED", libc::EPIPE, message));
                }
            }
            if incoming.fill(socket, deadline)? == 0 {
                return Ok(0);
            }
        }
    }

    /// Opens records that are here until the buffer is full. `None`: there is nothing to be had; `Some(0)`: the peer said goodbye.
    fn open_records(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> std::result::Result<Option<usize>, rustls::Error> {
        let mut connection = self.connection.lock();
        let mut filled = 0;
        loop {
            match connection.reader().read(&mut buffer[filled..]) {
                Ok(0) => return Ok(Some(filled)),
                Ok(count) => filled += count,
                // Nothing is opened now.
                Err(_) if incoming.is_empty() => return Ok((filled > 0).then_some(filled)),
                // An error is remembered and comes again, after what was opened before it has been taken.
                Err(_) => match incoming.feed(&mut connection) {
                    Err(error) if filled == 0 => return Err(error),
                    Err(_) => return Ok(Some(filled)),
                    Ok(()) => {}
                },
            }
        }
    }

    /// Sends everything; `send` sends records. The bytes are followed by no others' before all of them are out.
    pub(super) fn send_all(&self, bytes: &[u8], send: impl Fn(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut records = self.outgoing.lock();
        for piece in bytes.chunks(OUTGOING_BYTES_MAX) {
            {
                let mut connection = self.connection.lock();
                connection.writer().write_all(piece)?;
                while connection.wants_write() {
                    connection.write_tls(&mut *records)?;
                }
            }
            let sent = send(&records);
            records.clear();
            sent?;
        }
        Ok(())
    }

    /// Tells the peer that nothing more comes, if that can be done without waiting: a record that is half out forbids it.
    pub(super) fn say_goodbye(&self, socket: &RawSocket) {
        self.send_now(socket, |connection| connection.send_close_notify());
    }

    fn send_now(&self, socket: &RawSocket, prepare: impl FnOnce(&mut ServerConnection)) {
        let Some(mut records) = self.outgoing.try_lock() else {
            return;
        };
        let mut connection = self.connection.lock();
        prepare(&mut connection);
        let taken = take_records(&mut connection, &mut records);
        drop(connection);
        if taken.is_ok() {
            socket.send_now(&records);
        }
        records.clear();
    }
}

fn take_records(connection: &mut ServerConnection, records: &mut Vec<u8>) -> Result<()> {
    while connection.wants_write() {
        connection.write_tls(records).map_err(|error| handshake_failed(&error.to_string()))?;
    }
    Ok(())
}

fn handshake_failed(reason: &str) -> EngineError {
    EngineError::new("TLS_HANDSHAKE_FAILED", libc::EPROTO, format!("the TLS handshake failed: {reason}"))
}
