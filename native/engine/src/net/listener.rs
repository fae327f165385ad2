//! Listening sockets.
use super::{Connection, Socket};
use crate::{EngineError, Result};
use parking_lot::Mutex;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Connections of one engine at a time (I8); more are closed as soon as they are accepted.
pub const CONNECTION_COUNT_MAX: usize = 1024;

/// Connections that the kernel may hold for a listener that nobody has accepted yet.
const BACKLOG_DEFAULT: u32 = 128;

/// Pause after an accept that failed for want of descriptors or memory: the connection stays queued meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where a listener listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP address, with the port that was really taken.
    Tcp(SocketAddr),
}

/// How many connections live; shared by all listeners of an engine.
#[derive(Clone, Default)]
pub(crate) struct ConnectionCount(Arc<AtomicUsize>);

/// One of the places of `ConnectionCount`, given back on drop.
pub(crate) struct ConnectionPlace(Arc<AtomicUsize>);

impl ConnectionCount {
    /// Takes a place if one is free.
    pub(crate) fn enter(&self) -> Option<ConnectionPlace> {
        let taken = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| (count < CONNECTION_COUNT_MAX).then_some(count + 1));
        taken.ok().map(|_| ConnectionPlace(self.0.clone()))
    }
    /// Connections at this moment.
    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A listening socket. `accept` is called by one thread at a time, `close` by any.
pub struct Listener {
    fd: OwnedFd,
    /// Readable once the listener is closed; wakes `accept`.
    wake: OwnedFd,
    closed: AtomicBool,
    endpoint: Endpoint,
    /// Device and inode of the socket file that we made: a later owner's file of the same path is not ours to remove.
    socket_file: Mutex<Option<(u64, u64)>>,
    connections: ConnectionCount,
}

impl Listener {
    /// Listens on a Unix socket of this mode (and group). A socket file that nobody listens on is replaced; one that
    /// somebody does is `ADDRESS_IN_USE`; anything else of that name is left alone (`LISTEN_FAILED`).
    pub(crate) fn unix(
        path: &Path,
        mode: u32,
        group_id: Option<u32>,
        backlog: Option<u32>,
        connections: ConnectionCount,
    ) -> Result<Listener> {
        let failed = |error: io::Error| listen_failed(&path.display().to_string(), &error);
        remove_stale_socket(path)?;
        let fd = unix_socket().map_err(failed)?;
        bind_unix(&fd, path).map_err(failed)?;
        let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
        let listener = Listener {
            wake: event_fd().map_err(failed)?,
            fd,
            closed: AtomicBool::new(false),
            endpoint: Endpoint::Unix(path.to_owned()),
            socket_file: Mutex::new(Some((metadata.dev(), metadata.ino()))),
            connections,
        };
        // Rights are set before `listen`: until then nobody can connect, whatever the umask left.
        if let Some(group) = group_id {
            std::os::unix::fs::lchown(path, None, Some(group)).map_err(failed)?;
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o777)).map_err(failed)?;
        listener.start(backlog).map_err(failed)?;
        Ok(listener)
    }

    /// Listens on a TCP address; port 0 picks a free one.
    pub(crate) fn tcp(host: &str, port: u16, connections: ConnectionCount) -> Result<Listener> {
        let name = format!("{host}:{port}");
        let failed = |error: io::Error| listen_failed(&name, &error);
        let socket = TcpListener::bind((host, port)).map_err(failed)?;
        let endpoint = Endpoint::Tcp(socket.local_addr().map_err(failed)?);
        let wake = event_fd().map_err(failed)?;
        let closed = AtomicBool::new(false);
        Ok(Listener { fd: socket.into(), wake, closed, endpoint, socket_file: Mutex::new(None), connections })
    }

    fn start(&self, backlog: Option<u32>) -> io::Result<()> {
        let backlog = backlog.unwrap_or(BACKLOG_DEFAULT).clamp(1, 4096) as libc::c_int;
        // SAFETY: a plain call on a descriptor that we own.
        check(unsafe { libc::listen(self.fd.as_raw_fd(), backlog) }).map(|_| ())
    }

    /// Where it listens.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether `close` was called.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Waits for the next connection; `None` once the listener is closed. Never fails for what a peer did.
    pub fn accept(&self) -> Result<Option<Arc<Connection>>> {
        loop {
            if !self.wait_acceptable()? {
                return Ok(None);
            }
            // SAFETY: null address and length are allowed: the peer is asked for separately.
            let raw = unsafe { libc::accept4(self.fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
            if raw < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => self.pause(),
                    Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP) => {
                        return Err(listen_failed(&self.describe(), &error));
                    }
                    // The peer went away between its connect and our accept, or the like.
                    _ => {}
                }
                continue;
            }
            // SAFETY: accept4 gave us this descriptor; nobody else has it.
            let fd = unsafe { OwnedFd::from_raw_fd(raw) };
            let Some(place) = self.connections.enter() else {
                continue;
            };
            let (peer, is_tcp) = match self.endpoint {
                Endpoint::Unix(_) => (unix_peer(&fd), false),
                Endpoint::Tcp(_) => (tcp_peer(&fd), true),
            };
            match Connection::start(Socket::new(fd, peer, is_tcp), place) {
                Ok(connection) => return Ok(Some(connection)),
                // No thread to be had: this client is turned away, the listener goes on.
                Err(_) => self.pause(),
            }
        }
    }

    fn describe(&self) -> String {
        match &self.endpoint {
            Endpoint::Unix(path) => path.display().to_string(),
            Endpoint::Tcp(address) => address.to_string(),
        }
    }

    /// Waits until there is something to accept. False: closed.
    fn wait_acceptable(&self) -> Result<bool> {
        loop {
            if self.is_closed() {
                return Ok(false);
            }
            let mut polls = [self.fd.as_raw_fd(), self.wake.as_raw_fd()].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
            // SAFETY: an array of two pollfds, exclusively borrowed.
            let ready = unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
            if ready < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(listen_failed(&self.describe(), &error));
                }
            } else if polls[0].revents != 0 && !self.is_closed() {
                return Ok(true);
            }
        }
    }

    /// Waits a little, or until closed.
    fn pause(&self) {
        let mut poll = libc::pollfd { fd: self.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, exclusively borrowed.
        unsafe { libc::poll(&mut poll, 1, ACCEPT_PAUSE.as_millis() as libc::c_int) };
    }

    /// Stops listening: `accept` returns `None`, the socket file is removed. Connections live on. Idempotent.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        if let (Endpoint::Unix(path), Some(ours)) = (&self.endpoint, self.socket_file.lock().take())
            && std::fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == ours)
        {
            // Best effort: a file that stays is recognised as stale by the next listener.
            let _ = std::fs::remove_file(path);
        }
        // SAFETY: plain calls on descriptors that we own; the value written is 8 bytes, as an eventfd wants.
        unsafe {
            libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR);
            let one = 1u64;
            libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is fresh and ours.
    check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn unix_socket() -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is fresh and ours.
    check(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) }).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds without listening (std's listener does both at once, which would leave a moment with the wrong rights).
fn bind_unix(fd: &OwnedFd, path: &Path) -> io::Result<()> {
    // SAFETY: an all-zero sockaddr_un is a valid value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        let limit = address.sun_path.len() - 1;
        let message = format!("the path has {} bytes, a socket's may have 1 to {limit} and no zero byte", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    for (target, source) in address.sun_path.iter_mut().zip(bytes) {
        *target = *source as libc::c_char;
    }
    let length = std::mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address outlives the call and `length` is its size.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) }).map(|_| ())
}

/// Removes the socket file that a killed process left behind.
fn remove_stale_socket(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match UnixStream::connect(path) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => {
            std::fs::remove_file(path).map_err(|error| listen_failed(&path.display().to_string(), &error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(listen_failed(&path.display().to_string(), &io::Error::from_raw_os_error(libc::EADDRINUSE))),
    }
}

fn listen_failed(name: &str, error: &io::Error) -> EngineError {
    let code = if error.raw_os_error() == Some(libc::EADDRINUSE) { "ADDRESS_IN_USE" } else { "LISTEN_FAILED" };
    EngineError::new(code, libc::EIO, format!("cannot listen on {name}: {error}"))
        .with("address", name)
        .with("errno", error.raw_os_error().unwrap_or(0))
}

fn unix_peer(fd: &OwnedFd) -> String {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = std::mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both out-parameters outlive the call and `length` is the size of the first.
    let result = unsafe {
        let value = (&raw mut credentials).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, value, &mut length)
    };
    if result < 0 { "unix".to_owned() } else { format!("unix:pid={},uid={}", credentials.pid, credentials.uid) }
}

fn tcp_peer(fd: &OwnedFd) -> String {
    fd.try_clone().and_then(|fd| std::net::TcpStream::from(fd).peer_addr()).map_or_else(|_| "tcp".to_owned(), |address| address.to_string())
}
