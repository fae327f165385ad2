//! A connected stream socket: whole reads and writes, deadlines, and shutting it down under a reader.
use crate::{EngineError, Result};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Kernel buffers asked for in each direction: a batch of replies fits, so that a sender seldom sleeps half-way.
const SOCKET_BUFFER_BYTES: libc::c_int = 2 << 20;

/// A connected stream socket (Unix or TCP). Blocking; any thread may write, one thread reads.
pub(crate) struct Socket {
    fd: OwnedFd,
    peer: String,
}

impl Socket {
    /// Takes a connected socket over and sets it up: large buffers, and no delay on TCP.
    pub(crate) fn new(fd: OwnedFd, peer: String, is_tcp: bool) -> Socket {
        let socket = Socket { fd, peer };
        // Best effort all three: the privileged form goes beyond the system's limit, the plain one up to it.
        for (forced, plain) in [(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF), (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF)] {
            if !socket.set_option(libc::SOL_SOCKET, forced, SOCKET_BUFFER_BYTES) {
                socket.set_option(libc::SOL_SOCKET, plain, SOCKET_BUFFER_BYTES);
            }
        }
        if is_tcp {
            socket.set_option(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
            socket.set_option(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        }
        socket
    }

    fn set_option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> bool {
        let length = std::mem::size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: `value` outlives the call and `length` is its size.
        unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, name, (&raw const value).cast(), length) == 0 }
    }

    /// Who is at the other end, for logs.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Reads what is there, at least one byte; 0: end of file.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            // SAFETY: the pointer and length are those of one exclusive slice.
            let count = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if count >= 0 {
                return Ok(count as usize);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
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
            if let Some(deadline) = deadline {
                self.wait_readable(deadline)?;
            }
            match self.receive(&mut buffer[filled..]).map_err(|error| connection_lost(&error))? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    fn wait_readable(&self, deadline: Instant) -> Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(EngineError::new("READ_TIMEOUT", libc::ETIMEDOUT, "the peer sent nothing in time"));
            }
            let timeout_ms = left.min(Duration::from_secs(3600)).as_millis().max(1) as libc::c_int;
            let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
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

    /// Sends everything. A peer that has gone is an error, never a signal.
    pub(crate) fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // SAFETY: the pointer and length are those of one slice.
            let count = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
            if count >= 0 {
                bytes = &bytes[count as usize..];
                continue;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Ends both directions: whoever reads or writes comes back at once, the peer sees the end.
    pub(crate) fn shutdown(&self) {
        // SAFETY: a plain call on a descriptor that we own. Failure (not connected any more) is what was wanted.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// Ends the receiving direction: what has arrived can still be read, then comes end of file; replies still go out.
    pub(crate) fn shutdown_receive(&self) {
        // SAFETY: as above.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RD) };
    }
}

/// The error of a broken connection.
pub(crate) fn connection_lost(error: &io::Error) -> EngineError {
    EngineError::new("CONNECTION_CLOSED", libc::EPIPE, format!("the connection broke: {error}"))
        .with("errno", error.raw_os_error().unwrap_or(0))
}
