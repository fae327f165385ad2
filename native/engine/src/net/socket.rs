//! A connected stream socket, plain or with TLS: whole reads and writes, deadlines, and shutting it down under a reader.
use super::patience::Patience;
use super::tls::{TlsConfig, TlsPeer, TlsSession};
use crate::{EngineError, Result};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Kernel buffers asked for in each direction: a batch of replies fits, so that a sender seldom sleeps half-way.
const SOCKET_BUFFER_BYTES: libc::c_int = 2 << 20;

/// A TCP peer that says nothing is asked after this long whether it is still there (seconds) …
const KEEPALIVE_IDLE_SECONDS: libc::c_int = 60;
/// … then this often …
const KEEPALIVE_INTERVAL_SECONDS: libc::c_int = 15;
/// … and given up after as many questions without an answer.
const KEEPALIVE_COUNT: libc::c_int = 4;

/// A connected stream socket (Unix or TCP). Blocking; any thread may write, one thread reads.
///
/// Once `start_tls` has succeeded all that is read and written goes through TLS; until then, and on sockets that never do,
/// nothing stands between the caller and the system call.
pub(crate) struct Socket {
    raw: RawSocket,
    peer: String,
    tls: OnceLock<Box<TlsSession>>,
}

impl Socket {
    /// Takes a connected socket over and sets it up: large buffers; on TCP no delay, and a look now and then whether the peer lives.
    pub(crate) fn new(fd: OwnedFd, peer: String, is_tcp: bool) -> Socket {
        let raw = RawSocket { fd };
        // Best effort all of them: the privileged form goes beyond the system's limit, the plain one up to it.
        for (forced, plain) in [(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF), (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF)] {
            if !raw.set_option(libc::SOL_SOCKET, forced, SOCKET_BUFFER_BYTES) {
                raw.set_option(libc::SOL_SOCKET, plain, SOCKET_BUFFER_BYTES);
            }
        }
        if is_tcp {
            raw.set_option(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
            raw.set_option(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
            raw.set_option(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS);
            raw.set_option(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS);
            raw.set_option(libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_COUNT);
        }
        Socket { raw, peer, tls: OnceLock::new() }
    }

    /// Who is at the other end, for logs.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Shakes hands as the server, within `timeout`. Called by the reading thread, while nobody writes. After a failure the
    /// socket is of no use.
    pub(crate) fn start_tls(&self, config: &TlsConfig, timeout: Duration) -> Result<TlsPeer> {
        if self.tls.get().is_some() {
            return Err(EngineError::new("ARGUMENT_INVALID", libc::EINVAL, "the connection speaks TLS already"));
        }
        let (session, peer) = TlsSession::accept(&self.raw, config, Instant::now() + timeout)?;
        // Nobody else sets it: there is one reading thread.
        let _ = self.tls.set(Box::new(session));
        Ok(peer)
    }

    /// Reads what is there, at least one byte; 0: end of file.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.tls.get() {
            None => self.raw.receive(buffer, 0),
            Some(tls) => tls.receive_until(&self.raw, buffer, None).map_err(io::Error::other),
        }
    }

    /// As `receive`, by a reader that may look for bytes before it sleeps. Through TLS it sleeps at once.
    pub(crate) fn receive_patiently(&self, buffer: &mut [u8], patience: &mut Patience) -> io::Result<usize> {
        if self.tls.get().is_some() {
            return self.receive(buffer);
        }
        patience.receive(|may_sleep| self.raw.receive(buffer, if may_sleep { 0 } else { libc::MSG_DONTWAIT }))
    }

    /// Fills the buffer. The number is smaller than its length only at end of file.
    pub(crate) fn receive_all(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.receive(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    /// As `receive_all`, but `READ_TIMEOUT` when `deadline` passes first; what was read until then is lost.
    pub(crate) fn receive_all_until(&self, buffer: &mut [u8], deadline: Option<Instant>) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = &mut buffer[filled..];
            let count = match self.tls.get() {
                None => self.raw.receive_until(rest, deadline)?,
                Some(tls) => tls.receive_until(&self.raw, rest, deadline)?,
            };
            if count == 0 {
                break;
            }
            filled += count;
        }
        Ok(filled)
    }

    /// Sends everything. A peer that has gone is an error, never a signal.
    pub(crate) fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self.tls.get() {
            None => self.raw.send_all(bytes),
            Some(tls) => tls.send_all(bytes, |records| self.raw.send_all(records)),
        }
    }

    /// As `send_all`, but nothing goes out after a wait, for the peer or for the turn to send, unless `may_go_on` allows it then; its
    /// error ends the sending.
    pub(crate) fn send_all_asking(&self, bytes: &[u8], may_go_on: impl Fn() -> io::Result<()>) -> io::Result<()> {
        match self.tls.get() {
            None => self.raw.send_all_asking(bytes, &may_go_on),
            Some(tls) => tls.send_all(bytes, |records| {
                may_go_on()?;
                self.raw.send_all_asking(records, &may_go_on)
            }),
        }
    }

    /// Sends what the kernel takes without a wait, which may be nothing. Through TLS that is never known, so nothing is sent.
    pub(crate) fn send_without_wait(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.tls.get().is_some() {
            return Ok(0);
        }
        match self.raw.send_some(bytes, libc::MSG_DONTWAIT) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
            sent => sent,
        }
    }

    /// Ends both directions: whoever reads or writes comes back at once, the peer sees the end. Does not wait for anything.
    pub(crate) fn shutdown(&self) {
        if let Some(tls) = self.tls.get() {
            tls.say_goodbye(&self.raw);
        }
        self.raw.shutdown(libc::SHUT_RDWR);
    }

    /// Ends the receiving direction: what has arrived can still be read, then comes end of file; replies still go out.
    pub(crate) fn shutdown_receive(&self) {
        self.raw.shutdown(libc::SHUT_RD);
    }
}

/// The socket itself: bytes as they are on the wire.
pub(super) struct RawSocket {
    fd: OwnedFd,
}

impl RawSocket {
    fn set_option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> bool {
        let length = std::mem::size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: `value` outlives the call and `length` is its size.
        unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, name, (&raw const value).cast(), length) == 0 }
    }

    /// Reads what is there, at least one byte; 0: end of file. `flags`: as for recv.
    fn receive(&self, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
        loop {
            // SAFETY: the pointer and length are those of one exclusive slice.
            let count = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
            if count >= 0 {
                return Ok(count as usize);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// As `receive`, but `READ_TIMEOUT` when nothing comes before `deadline`.
    pub(super) fn receive_until(&self, buffer: &mut [u8], deadline: Option<Instant>) -> Result<usize> {
        if let Some(deadline) = deadline {
            self.wait(libc::POLLIN, deadline)?;
        }
        self.receive(buffer, 0).map_err(|error| connection_lost(&error))
    }

    /// Waits for a direction to be ready, or for the connection to be broken.
    fn wait(&self, events: libc::c_short, deadline: Instant) -> Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = if events == libc::POLLIN { "the peer sent nothing in time" } else { "the peer took nothing in time" };
                return Err(EngineError::new("READ_TIMEOUT", libc::ETIMEDOUT, message));
            }
            let timeout_ms = left.min(Duration::from_secs(3600)).as_millis().max(1) as libc::c_int;
            let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 };
            // SAFETY: one pollfd, exclusively borrowed.
            let ready = unsafe { libc::poll(&mut poll, 1, timeout_ms) };
            if ready > 0 {
                return Ok(());
            }
            if ready < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(connection_lost(&error));
                }
            }
        }
    }

    /// Sends everything, waiting for the peer as long as it takes.
    pub(super) fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.send_some(bytes, 0) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// As `send_all`; after each wait for the peer, `may_go_on` is asked before anything more is sent.
    fn send_all_asking(&self, mut bytes: &[u8], may_go_on: &impl Fn() -> io::Result<()>) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.send_some(bytes, libc::MSG_DONTWAIT) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_sendable()?;
                    may_go_on()?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until the peer has taken something, or the connection is broken, however long that takes.
    fn wait_sendable(&self) -> io::Result<()> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, exclusively borrowed.
        if unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Sends everything before `deadline`, or fails with `READ_TIMEOUT`.
    pub(super) fn send_all_until(&self, mut bytes: &[u8], deadline: Instant) -> Result<()> {
        while !bytes.is_empty() {
            match self.send_some(bytes, libc::MSG_DONTWAIT) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(libc::POLLOUT, deadline)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(connection_lost(&error)),
            }
        }
        Ok(())
    }

    /// Sends what the kernel takes at once; the rest, and any failure, does not matter to the caller.
    pub(super) fn send_now(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            let _ = self.send_some(bytes, libc::MSG_DONTWAIT);
        }
    }

    fn send_some(&self, bytes: &[u8], flags: libc::c_int) -> io::Result<usize> {
        // SAFETY: the pointer and length are those of one slice.
        let count = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL | flags) };
        if count < 0 { Err(io::Error::last_os_error()) } else { Ok(count as usize) }
    }

    fn shutdown(&self, how: libc::c_int) {
        // SAFETY: a plain call on a descriptor that we own. Failure (not connected any more) is what was wanted.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), how) };
    }
}

/// The error of a broken connection.
pub(crate) fn connection_lost(error: &io::Error) -> EngineError {
    EngineError::new("CONNECTION_CLOSED", libc::EPIPE, format!("the connection broke: {error}"))
        .with("errno", error.raw_os_error().unwrap_or(0))
}
