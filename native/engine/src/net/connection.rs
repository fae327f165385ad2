//! One client. Its thread runs the commands that the negotiation sends and then serves the device.
use super::Socket;
use super::listener::ConnectionPlace;
use super::socket::connection_lost;
use super::tls::{TlsConfig, TlsPeer};
use crate::nbd::{self, NbdOptions, ServeControl, ServeEnd, ServeEndReason};
use crate::thread::spawn_named;
use crate::{Device, EngineError, Result};
use parking_lot::{Condvar, Mutex};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Longest single read of the negotiation (I8). The largest option that a client may send is smaller.
pub const CONNECTION_READ_BYTES_MAX: usize = 64 << 10;

/// Commands that may wait for the connection's thread.
const COMMAND_QUEUE_MAX: usize = 16;

/// Called once with the result of a command, on the connection's thread. A command that is dropped (the thread ended, or
/// panicked, before it got there) is answered `CONNECTION_CLOSED`: whoever waits hears something in any case.
struct Done<T>(Option<Box<dyn FnOnce(Result<T>) + Send>>);

impl<T> Done<T> {
    fn new(callback: impl FnOnce(Result<T>) + Send + 'static) -> Done<T> {
        Done(Some(Box::new(callback)))
    }
    fn call(mut self, result: Result<T>) {
        if let Some(callback) = self.0.take() {
            callback(result);
        }
    }
}

impl<T> Drop for Done<T> {
    fn drop(&mut self) {
        if let Some(callback) = self.0.take() {
            callback(Err(EngineError::new("CONNECTION_CLOSED", libc::EPIPE, "the connection is closed")));
        }
    }
}

enum Command {
    Read { length_bytes: usize, timeout: Option<Duration>, done: Done<Option<Vec<u8>>> },
    Write { bytes: Vec<u8>, done: Done<()> },
    StartTls { config: Arc<TlsConfig>, timeout: Duration, done: Done<TlsPeer> },
    ServeNbd { device: Arc<Device>, options: NbdOptions, done: Done<ServeEnd> },
}

/// What there is only while the connection lives. Its thread has one handle.
struct Link {
    socket: Arc<Socket>,
    control: Arc<ServeControl>,
}

struct Shared {
    peer: String,
    /// Gone when the thread has ended: a handle that somebody forgets keeps no descriptor.
    link: Mutex<Option<Arc<Link>>>,
    ended: Mutex<Ended>,
    ended_changed: Condvar,
}

#[derive(Default)]
struct Ended {
    is_over: bool,
    listeners: Vec<Box<dyn FnOnce() + Send>>,
}

/// A connection. Dropping it closes it.
pub struct Connection {
    shared: Arc<Shared>,
    /// Taken by `close`, which ends the thread when it has done what is queued.
    commands: Mutex<Option<SyncSender<Command>>>,
}

impl Connection {
    pub(super) fn start(socket: Socket, place: ConnectionPlace) -> Result<Arc<Connection>> {
        let peer = socket.peer().to_owned();
        let link = Arc::new(Link { socket: Arc::new(socket), control: Arc::default() });
        let shared = Arc::new(Shared {
            peer,
            link: Mutex::new(Some(link.clone())),
            ended: Mutex::new(Ended::default()),
            ended_changed: Condvar::new(),
        });
        let (sender, receiver) = sync_channel(COMMAND_QUEUE_MAX);
        let on_thread = shared.clone();
        spawn_named("atoll-client", move || {
            // What is left of a panic here is this connection's alone: the socket is shut down and the place given back.
            let _ = catch_unwind(AssertUnwindSafe(|| run(&link, &receiver)));
            drop(receiver);
            link.socket.shutdown();
            *on_thread.link.lock() = None;
            drop(link);
            drop(place);
            on_thread.end();
        })?;
        Ok(Arc::new(Connection { shared, commands: Mutex::new(Some(sender)) }))
    }

    /// Who is at the other end, for logs and listings.
    pub fn peer(&self) -> &str {
        &self.shared.peer
    }

    /// Reads exactly `length_bytes` and calls `done` with them, with `None` at end of file (also in the middle), or with
    /// `READ_TIMEOUT` or `CONNECTION_CLOSED`. `done` runs on the connection's thread and must not block.
    pub fn read(&self, length_bytes: usize, timeout: Option<Duration>, done: impl FnOnce(Result<Option<Vec<u8>>>) + Send + 'static) {
        if length_bytes > CONNECTION_READ_BYTES_MAX {
            let message = format!("a read of {length_bytes} bytes is longer than {CONNECTION_READ_BYTES_MAX}");
            return done(Err(EngineError::new("ARGUMENT_INVALID", libc::EINVAL, message)
                .with("lengthBytes", length_bytes)
                .with("lengthBytesMax", CONNECTION_READ_BYTES_MAX)));
        }
        self.send(Command::Read { length_bytes, timeout, done: Done::new(done) });
    }

    /// Sends all bytes, then calls `done` (on the connection's thread; it must not block).
    pub fn write(&self, bytes: Vec<u8>, done: impl FnOnce(Result<()>) + Send + 'static) {
        self.send(Command::Write { bytes, done: Done::new(done) });
    }

    /// Shakes hands as the server of a TLS connection, then calls `done` (on the connection's thread; it must not block) with what
    /// was settled, or with `TLS_HANDSHAKE_FAILED`, `READ_TIMEOUT` or `CONNECTION_CLOSED`; the connection is closed then. Reads and
    /// writes that follow go through TLS.
    pub fn start_tls(&self, config: Arc<TlsConfig>, timeout: Duration, done: impl FnOnce(Result<TlsPeer>) + Send + 'static) {
        self.send(Command::StartTls { config, timeout, done: Done::new(done) });
    }

    /// Serves the device on this connection until it ends, then calls `done`. Nothing can be read or written by
    /// commands afterwards. Never fails for what the client does: how it ended is in the result.
    pub fn serve_nbd(&self, device: Arc<Device>, options: NbdOptions, done: impl FnOnce(Result<ServeEnd>) + Send + 'static) {
        self.send(Command::ServeNbd { device, options, done: Done::new(done) });
    }

    fn send(&self, command: Command) {
        // A command that is not taken is dropped, and thereby answered, after the lock is released.
        let refused = match self.commands.lock().as_ref() {
            None => Some(TrySendError::Disconnected(command)),
            Some(sender) => sender.try_send(command).err(),
        };
        if let Some(TrySendError::Full(command)) = refused {
            let message = format!("{COMMAND_QUEUE_MAX} commands wait for the connection already");
            command.refuse(EngineError::new("CONNECTION_BUSY", libc::EBUSY, message));
        }
    }

    /// Stops taking requests: those in flight are finished, later ones are answered ESHUTDOWN, then the connection ends.
    /// A connection that does not serve yet ends as well. Returns at once; a client that does not take its answers holds the end
    /// up until `close`.
    pub fn drain(&self) {
        let Some(link) = self.link() else { return };
        if !link.control.drain() {
            return;
        }
        *self.commands.lock() = None;
        if link.control.is_serving() {
            let draining = link.clone();
            let waiting = spawn_named("atoll-drain", move || {
                draining.control.wait_quiet();
                draining.socket.shutdown_receive();
            });
            // Without a thread to wait on, who asks now finds the connection closed.
            if waiting.is_ok() {
                return;
            }
        }
        link.socket.shutdown_receive();
    }

    /// `None` when the connection has ended.
    fn link(&self) -> Option<Arc<Link>> {
        self.shared.link.lock().clone()
    }

    /// Ends the connection now: the socket is shut down, requests in flight run to their end without an answer.
    /// Returns at once; see `wait_ended`. Idempotent.
    pub fn close(&self) {
        if let Some(link) = self.link() {
            link.control.close();
            link.socket.shutdown();
        }
        *self.commands.lock() = None;
    }

    /// Calls `listener` when the connection has ended and nothing of it touches a device any more (at once if so already).
    pub fn on_ended(&self, listener: impl FnOnce() + Send + 'static) {
        let mut ended = self.shared.ended.lock();
        if !ended.is_over {
            ended.listeners.push(Box::new(listener));
            return;
        }
        drop(ended);
        listener();
    }

    /// Blocks until the connection has ended.
    pub fn wait_ended(&self) {
        let mut ended = self.shared.ended.lock();
        while !ended.is_over {
            self.shared.ended_changed.wait(&mut ended);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn end(&self) {
        let listeners = {
            let mut ended = self.ended.lock();
            ended.is_over = true;
            std::mem::take(&mut ended.listeners)
        };
        self.ended_changed.notify_all();
        for listener in listeners {
            // A listener that panics must not keep the others from hearing.
            let _ = catch_unwind(AssertUnwindSafe(listener));
        }
    }
}

impl Command {
    fn refuse(self, error: EngineError) {
        match self {
            Command::Read { done, .. } => done.call(Err(error)),
            Command::Write { done, .. } => done.call(Err(error)),
            Command::StartTls { done, .. } => done.call(Err(error)),
            Command::ServeNbd { done, .. } => done.call(Err(error)),
        }
    }
}

fn run(link: &Link, commands: &Receiver<Command>) {
    while let Ok(command) = commands.recv() {
        match command {
            Command::Read { length_bytes, timeout, done } => {
                let mut bytes = vec![0; length_bytes];
                let deadline = timeout.map(|timeout| Instant::now() + timeout);
                let result = link.socket.receive_all_until(&mut bytes, deadline);
                done.call(result.map(|count| (count == length_bytes).then_some(bytes)));
            }
            Command::Write { bytes, done } => {
                done.call(link.socket.send_all(&bytes).map_err(|error| connection_lost(&error)));
            }
            Command::StartTls { config, timeout, done } => {
                let result = link.socket.start_tls(&config, timeout);
                if result.is_err() {
                    // Half a handshake is out: nothing that follows could be understood.
                    link.socket.shutdown();
                }
                done.call(result);
            }
            Command::ServeNbd { device, options, done } => {
                let served = catch_unwind(AssertUnwindSafe(|| nbd::serve(&link.socket, &device, options, &link.control)));
                // The peer is told before anybody above, so that whoever waits for `done` finds the connection gone.
                link.socket.shutdown();
                drop(device);
                done.call(Ok(served.unwrap_or_else(|_| ServeEnd {
                    reason: ServeEndReason::Error,
                    message: "a request made the engine panic; the connection was ended".to_owned(),
                })));
                return;
            }
        }
    }
}
