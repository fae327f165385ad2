//! A connection to a cluster, and what can be asked of one pool of it. Everything goes through `Completion`s, so that many requests
//! are in flight where there are many; each ends within the time of the options, however the cluster is.
use super::library::{
    CMPXATTR_EQ, CMPXATTR_GT, CMPXATTR_GTE, CONNECTION_COUNT, CREATE_EXCLUSIVE, CREATE_IDEMPOTENT, ENDING_COUNT, FULL_FORCE, FULL_TRY,
    Handle, Library, library,
};
use crate::{IoError, IoErrorCode, Result};
use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt::{self, Write};
use std::path::PathBuf;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Where a pool lies in a cluster, and how it is reached.
#[derive(Debug, Clone)]
pub struct RadosOptions {
    /// `ceph.conf`; `None`: where Ceph's own programs look for it.
    pub conf: Option<PathBuf>,
    /// Key of the user; `None`: what the conf says.
    pub keyring: Option<PathBuf>,
    /// `admin` for `client.admin`.
    pub user: String,
    /// The RADOS pool.
    pub pool: String,
    /// The namespace in it: several pools of ours can share one of Ceph's.
    pub namespace: String,
    /// A request that was not answered for this long fails.
    pub request_timeout: Duration,
    /// As long is waited for a monitor, and for the pool's first answer.
    pub connect_timeout: Duration,
    /// Whether a pool that is not there is made.
    pub create: bool,
}

/// Requests that one call has under way at once (I8).
const IN_FLIGHT_MAX: usize = 64;

/// Requests of one connection to a cluster that nobody waits for, and their bytes (I8). The library would hold up who begins more; its
/// bound is taken away, and they are refused before. Those that are waited for are bounded by the threads that wait.
const BEGUN_COUNT_MAX: usize = 1024;
const BEGUN_BYTES_MAX: usize = 100 << 20;

/// Shortest and longest pause between two looks at whether a request is done.
const POLL_INTERVAL_MIN: Duration = Duration::from_micros(50);
const POLL_INTERVAL_MAX: Duration = Duration::from_millis(20);

/// Keys that one request asks an index for: the cluster's own bound.
const INDEX_PAGE_KEYS: u64 = 1024;

/// The name of an object, with a NUL at the end and no memory of its own.
#[derive(Clone, Copy)]
pub(super) struct Name {
    bytes: [u8; 96],
    length: usize,
}

impl Name {
    /// # Panics
    /// If the name is longer than 95 bytes.
    pub(super) fn new(text: fmt::Arguments<'_>) -> Name {
        let mut name = Name { bytes: [0; 96], length: 0 };
        name.write_fmt(text).expect("the names of our objects are short");
        name
    }

    fn as_ptr(&self) -> *const c_char {
        self.bytes.as_ptr().cast()
    }
}

impl Write for Name {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        if end >= self.bytes.len() {
            return Err(fmt::Error);
        }
        self.bytes[self.length..end].copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.bytes[..self.length]))
    }
}

/// What was begun and not told yet.
#[derive(Default)]
struct BegunTotal {
    count: AtomicUsize,
    bytes: AtomicUsize,
}

impl BegunTotal {
    /// Whether a request of so many bytes may be begun now.
    fn has_room(&self, length_bytes: u64) -> bool {
        self.count.load(Ordering::Relaxed) < BEGUN_COUNT_MAX
            && self.bytes.load(Ordering::Relaxed).saturating_add(length_bytes as usize) <= BEGUN_BYTES_MAX
    }
}

/// Whoever is to be told the end of a request, counted among what was begun while it lives.
struct Counted<T> {
    told: Box<T>,
    bytes: usize,
    total: Arc<BegunTotal>,
}

impl<T> Counted<T> {
    fn new(told: Box<T>, bytes: usize, total: &Arc<BegunTotal>) -> Counted<T> {
        total.count.fetch_add(1, Ordering::Relaxed);
        total.bytes.fetch_add(bytes, Ordering::Relaxed);
        Counted { told, bytes, total: Arc::clone(total) }
    }

    fn take(self) -> Box<T> {
        self.total.count.fetch_sub(1, Ordering::Relaxed);
        self.total.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.told
    }
}

/// One pool of a cluster, open until it is dropped.
pub(super) struct Cluster {
    library: &'static Library,
    cluster: Handle,
    io: Handle,
    /// The same pool, for what is to be done, or to fail at once, where it is full: locks.
    full_io: Handle,
    /// The pool has not answered for so long that nobody who manages waits for it (`watch.rs`).
    pub(super) is_silent: AtomicBool,
    begun: Arc<BegunTotal>,
    /// Objects of layers with a write of which it is not known whether it is over (`layer.rs`).
    pub(super) doubtful_count: AtomicUsize,
    pub(super) options: RadosOptions,
}

thread_local! {
    /// This thread carries out a call that manages.
    static IS_MANAGING: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, no request of this thread is waited for once the pool is silent: it is cancelled then, as if it had timed out.
pub(super) struct Managing(());

impl Managing {
    pub(super) fn begin() -> Managing {
        IS_MANAGING.set(true);
        Managing(())
    }
}

impl Drop for Managing {
    fn drop(&mut self) {
        IS_MANAGING.set(false);
    }
}

// SAFETY: librados may be called from any thread at any time with one connection and one pool of it.
unsafe impl Send for Cluster {}
// SAFETY: as above.
unsafe impl Sync for Cluster {}

impl Drop for Cluster {
    /// Off this thread, which may be the event loop's: it waits for threads of the library.
    fn drop(&mut self) {
        struct Handles(Handle, [Handle; 2], &'static Library);
        // SAFETY: they move to the thread, nobody else has them any more.
        unsafe impl Send for Handles {}
        let handles = Handles(self.cluster, [self.io, self.full_io], self.library);
        let end = move || {
            let Handles(cluster, pools, library) = { handles };
            // SAFETY: all are open or null, and every completion was waited for: it borrows or owns the cluster.
            unsafe {
                for io in pools.into_iter().filter(|io| !io.is_null()) {
                    (library.ioctx_destroy)(io);
                }
                (library.shutdown)(cluster);
            }
            CONNECTION_COUNT.fetch_sub(1, Ordering::SeqCst);
            ENDING_COUNT.fetch_sub(1, Ordering::SeqCst);
        };
        ENDING_COUNT.fetch_add(1, Ordering::SeqCst);
        if std::thread::Builder::new().name("atoll-rados-end".to_owned()).spawn(end).is_err() {
            // The connection stays until the process ends.
            ENDING_COUNT.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Cluster {
    /// Connects. `Unavailable`, `Denied` or `NotFound` (the pool), each with what to do about it.
    pub(super) fn connect(options: RadosOptions) -> Result<Arc<Cluster>> {
        let library = library()?;
        let user = c_string("user", &format!("client.{}", options.user))?;
        let pool = c_string("pool", &options.pool)?;
        let namespace = c_string("namespace", &options.namespace)?;
        let mut cluster = null_mut();
        // SAFETY: all strings end with a NUL and live longer than the call; `cluster` is filled with a handle on success.
        let code = unsafe { (library.create2)(&raw mut cluster, c"ceph".as_ptr(), user.as_ptr(), 0) };
        if code < 0 {
            return Err(IoError::from_errno("connect", format!("user {}", options.user), 0, -code));
        }
        // From here on dropping it ends the connection.
        CONNECTION_COUNT.fetch_add(1, Ordering::SeqCst);
        let mut this = Cluster {
            library,
            cluster,
            io: null_mut(),
            full_io: null_mut(),
            is_silent: AtomicBool::new(false),
            begun: Arc::default(),
            doubtful_count: AtomicUsize::new(0),
            options,
        };
        this.configure()?;
        // SAFETY: the handle is open and was configured.
        let code = unsafe { (library.connect)(cluster) };
        if code < 0 {
            return Err(this.connect_error(-code));
        }
        for is_for_full in [false, true] {
            let mut io = null_mut();
            // SAFETY: connected; the name ends with a NUL; `io` is filled with a handle on success.
            let code = unsafe { (library.ioctx_create)(cluster, pool.as_ptr(), &raw mut io) };
            if code < 0 {
                return Err(this.pool_error(-code));
            }
            // SAFETY: the pool is open; the name is copied.
            unsafe { (library.ioctx_set_namespace)(io, namespace.as_ptr()) };
            if is_for_full {
                // SAFETY: as above.
                unsafe { (library.set_pool_full_try)(io) };
                this.full_io = io;
            } else {
                this.io = io;
            }
        }
        Ok(Arc::new(this))
    }

    fn configure(&self) -> Result<()> {
        let conf = self.options.conf.as_ref().map(|path| c_string("conf", &path.to_string_lossy())).transpose()?;
        // SAFETY: null, or a string that lives longer than the call.
        let code = unsafe { (self.library.conf_read_file)(self.cluster, conf.as_ref().map_or(null(), |path| path.as_ptr())) };
        if code < 0 {
            let path = self.options.conf.as_ref().map_or_else(|| "/etc/ceph/ceph.conf".to_owned(), |path| path.display().to_string());
            let message = match -code {
                libc::ENOENT => "there is no such file: option conf= names the ceph.conf of the cluster".to_owned(),
                libc::EACCES => "the daemon may not read this file".to_owned(),
                errno => format!("it cannot be read as a ceph.conf ({})", std::io::Error::from_raw_os_error(errno)),
            };
            return Err(IoError::new(IoErrorCode::Unavailable, "configure", path, 0, message));
        }
        let connect_seconds = self.options.connect_timeout.as_secs().max(1);
        let request_seconds = self.options.request_timeout.as_secs().max(1);
        let mut settings = vec![
            ("client_mount_timeout", connect_seconds.to_string()),
            ("rados_mon_op_timeout", connect_seconds.to_string()),
            ("rados_osd_op_timeout", request_seconds.to_string()),
            // What goes wrong is said by our own errors.
            ("log_to_stderr", "false".to_owned()),
            ("err_to_stderr", "false".to_owned()),
        ];
        // Whoever begins a request waits for no other one: what is under way is bounded by `may_begin`.
        settings.extend(["objecter_inflight_ops", "objecter_inflight_op_bytes"].map(|name| (name, "0".to_owned())));
        // Nor does the library gather what it would log if it crashed: that costs each request a tenth of its time.
        settings.extend(["debug_objecter", "debug_rados", "debug_ms"].map(|name| (name, "0/0".to_owned())));
        if request_seconds <= 20 {
            // A client whose requests time out before it asks for a new map of the cluster would never get one.
            settings.push(("objecter_timeout", (request_seconds / 2).max(1).to_string()));
            settings.push(("objecter_tick_interval", "0.5".to_owned()));
        }
        if let Some(keyring) = &self.options.keyring {
            settings.push(("keyring", keyring.display().to_string()));
        }
        for (name, value) in settings {
            let (name, value) = (c_string("setting", name)?, c_string("setting", &value)?);
            // SAFETY: both strings live longer than the call.
            let code = unsafe { (self.library.conf_set)(self.cluster, name.as_ptr(), value.as_ptr()) };
            if code < 0 {
                return Err(IoError::from_errno("configure", name.to_string_lossy(), 0, -code));
            }
        }
        Ok(())
    }

    fn connect_error(&self, errno: i32) -> IoError {
        let RadosOptions { user, connect_timeout, .. } = &self.options;
        let (code, message) = match errno {
            libc::ETIMEDOUT => {
                let seconds = connect_timeout.as_secs();
                (
                    IoErrorCode::Unavailable,
                    format!("no monitor answered within {seconds} s: is the cluster up, and are its addresses right?"),
                )
            }
            libc::EACCES | libc::EPERM => (
                IoErrorCode::Denied,
                format!("the cluster does not know client.{user} with this key: compare `ceph auth get client.{user}`"),
            ),
            libc::ENOENT => (
                IoErrorCode::Denied,
                format!("no key of client.{user} was found: option keyring=, or `keyring` in the conf, names the file that has it"),
            ),
            libc::EINVAL => (IoErrorCode::Unavailable, "the conf names no monitors (mon host)".to_owned()),
            other => (IoErrorCode::Unavailable, std::io::Error::from_raw_os_error(other).to_string()),
        };
        IoError { errno, ..IoError::new(code, "connect", "the cluster", 0, message) }
    }

    fn pool_error(&self, errno: i32) -> IoError {
        let RadosOptions { user, pool, .. } = &self.options;
        let (code, message) = match errno {
            libc::ENOENT => {
                (IoErrorCode::NotFound, format!("the cluster has no pool of this name: `ceph osd pool create {pool}`, or another pool="))
            }
            libc::EACCES | libc::EPERM => (IoErrorCode::Denied, denied_message(user, pool)),
            other => return self.error("open-pool", format_args!("pool {pool}"), 0, other),
        };
        IoError { errno, ..IoError::new(code, "open-pool", format!("pool {pool}"), 0, message) }
    }

    /// The failure of a request.
    #[cold]
    pub(super) fn error(&self, operation: &'static str, object: impl fmt::Display, offset_bytes: u64, errno: i32) -> IoError {
        let RadosOptions { user, pool, request_timeout, .. } = &self.options;
        let object = object.to_string();
        let special = |code, message| IoError { errno, ..IoError::new(code, operation, object.clone(), offset_bytes, message) };
        match errno {
            libc::ETIMEDOUT if self.is_silent.load(Ordering::Relaxed) => special(IoErrorCode::Unavailable, silent_message(pool)),
            libc::ETIMEDOUT => special(
                IoErrorCode::Unavailable,
                format!("the cluster did not answer within {} s: `ceph -s` says what it lacks", request_timeout.as_secs()),
            ),
            // To the engine this errno would mean that the device was closed.
            libc::ESHUTDOWN => IoError {
                errno: libc::EIO,
                ..special(
                    IoErrorCode::Unavailable,
                    "the cluster shut this client out (it is on the blocklist): another daemon has taken the pool over".to_owned(),
                )
            },
            libc::EPERM | libc::EACCES => special(IoErrorCode::Denied, denied_message(user, pool)),
            libc::ENOSPC | libc::EDQUOT => special(
                IoErrorCode::NoSpace,
                format!(
                    "pool {pool} is full, by its quota or by the full ratio of the cluster (`ceph health detail` says which): \
                     delete something and reclaim, or add OSDs"
                ),
            ),
            libc::EOPNOTSUPP => special(
                IoErrorCode::Unavailable,
                format!("pool {pool} cannot do this: it must be a replicated pool (an erasure-coded one keeps no indexes)"),
            ),
            other => IoError::from_errno(operation, object, offset_bytes, other),
        }
    }

    /// Names this connection: no other has the number while the cluster lives.
    pub(super) fn instance_id(&self) -> u64 {
        // SAFETY: connected.
        unsafe { (self.library.get_instance_id)(self.cluster) }
    }

    /// A request's beginning: `submit` gets the pool and the completion that it is to end.
    fn start(&self, submit: impl FnOnce(Handle, Handle) -> c_int) -> Completion<'_> {
        let mut raw = null_mut();
        // SAFETY: without callbacks; `raw` is filled with a handle.
        let code = unsafe { (self.library.aio_create_completion2)(null_mut(), null_mut(), &raw mut raw) };
        if code < 0 {
            return Completion { cluster: self, raw: null_mut(), refused: code };
        }
        let refused = submit(self.io, raw);
        Completion { cluster: self, raw, refused: refused.min(0) }
    }

    /// As `start`, for who is told the end instead of waiting for it. An error is the errno of a request that was not begun: its end is
    /// told to nobody, and it comes back.
    fn begin<T: Ended>(
        &self,
        told: Box<T>,
        bytes: usize,
        submit: impl FnOnce(Handle, Handle) -> c_int,
    ) -> std::result::Result<(), (i32, Box<T>)> {
        let mut raw = null_mut();
        let told = Box::into_raw(Box::new(Counted::new(told, bytes, &self.begun)));
        // SAFETY: whoever is told belongs to the completion from here on, and comes back out of it once: in the callback, or below.
        let code = unsafe { (self.library.aio_create_completion2)(told.cast(), call_back::<T> as *mut c_void, &raw mut raw) };
        if code < 0 {
            // SAFETY: there is no completion that could have it.
            return Err((-code, unsafe { Box::from_raw(told) }.take()));
        }
        // From here on the callback may have it.
        let code = submit(self.io, raw);
        if code < 0 {
            // SAFETY: what was refused calls nobody back; the completion is ours.
            return Err((-code, unsafe {
                (self.library.aio_release)(raw);
                Box::from_raw(told).take()
            }));
        }
        Ok(())
    }

    /// Whether a request of so many bytes may be begun now. Parts of those that were, and requests that come at the same moment, may
    /// go a little past the bound.
    pub(super) fn may_begin(&self, length_bytes: u64) -> bool {
        self.begun.has_room(length_bytes)
    }

    /// Reads into the room of who is told, which stays where it is until then. The answer is the bytes read: fewer at the object's end.
    pub(super) fn begin_read<T: Ended>(
        &self,
        name: &Name,
        offset_bytes: u64,
        mut told: Box<T>,
        room: impl FnOnce(&mut T) -> &mut [u8],
    ) -> std::result::Result<(), (i32, Box<T>)> {
        let room = room(&mut told);
        let (start, length) = (room.as_mut_ptr(), room.len());
        // SAFETY: the name is copied; the room lives where it is until its owner is told, and nobody else touches it.
        self.begin(told, length, |io, completion| unsafe {
            (self.library.aio_read)(io, name.as_ptr(), completion, start.cast(), length, offset_bytes)
        })
    }

    /// Writes; the data is copied before the return.
    pub(super) fn begin_write<T: Ended>(
        &self,
        name: &Name,
        offset_bytes: u64,
        data: &[u8],
        told: Box<T>,
    ) -> std::result::Result<(), (i32, Box<T>)> {
        // SAFETY: the library copies the name and the data.
        self.begin(told, data.len(), |io, completion| unsafe {
            (self.library.aio_write)(io, name.as_ptr(), completion, data.as_ptr().cast(), data.len(), offset_bytes)
        })
    }

    /// Carries out a change, of so many bytes: all of it or nothing.
    pub(super) fn begin_change<T: Ended>(
        &self,
        name: &Name,
        change: Change,
        bytes: usize,
        told: Box<T>,
    ) -> std::result::Result<(), (i32, Box<T>)> {
        // SAFETY: as for `start_change`.
        self.begin(told, bytes, |io, completion| unsafe {
            (self.library.aio_write_op_operate)(change.raw, io, completion, name.as_ptr(), null_mut(), 0)
        })
    }

    /// Asks whether an object is there: 0 or `ENOENT`.
    pub(super) fn begin_stat<T: Ended>(&self, name: &Name, told: Box<T>) -> std::result::Result<(), (i32, Box<T>)> {
        // SAFETY: the name is copied; the library passes over places that are null.
        self.begin(told, 0, |io, completion| unsafe { (self.library.aio_stat)(io, name.as_ptr(), completion, null_mut(), null_mut()) })
    }

    /// Reads into `buffer`, which must live and stay untouched until the completion is done. The answer is the bytes read: fewer at
    /// the object's end.
    ///
    /// # Safety
    /// The buffer is the caller's until the completion was waited for or dropped.
    pub(super) unsafe fn start_read(&self, name: &Name, offset_bytes: u64, buffer: *mut u8, length: usize) -> Completion<'_> {
        // SAFETY: the name is copied; the buffer is the caller's promise.
        self.start(|io, completion| unsafe { (self.library.aio_read)(io, name.as_ptr(), completion, buffer.cast(), length, offset_bytes) })
    }

    /// Writes; the data is copied before the return.
    pub(super) fn start_write(&self, name: &Name, offset_bytes: u64, data: &[u8]) -> Completion<'_> {
        // SAFETY: the library copies the name and the data.
        self.start(|io, completion| unsafe {
            (self.library.aio_write)(io, name.as_ptr(), completion, data.as_ptr().cast(), data.len(), offset_bytes)
        })
    }

    /// Also on a full pool.
    pub(super) fn start_remove(&self, name: &Name) -> Completion<'_> {
        let mut change = self.change();
        change.remove();
        change.even_if_full();
        self.start_change(name, change)
    }

    /// Carries out a change: all of it or nothing.
    pub(super) fn start_change(&self, name: &Name, change: Change) -> Completion<'_> {
        // SAFETY: the name is copied; what the operation refers to was copied into it when it was built, and the parts are moved out
        // of it here, so that it may be released before the answer.
        self.start(|io, completion| unsafe {
            (self.library.aio_write_op_operate)(change.raw, io, completion, name.as_ptr(), null_mut(), change.flags)
        })
    }

    pub(super) fn change(&self) -> Change {
        // SAFETY: takes nothing.
        Change { library: self.library, raw: unsafe { (self.library.create_write_op)() }, flags: 0 }
    }

    /// As `start_change`, and waits.
    pub(super) fn apply(&self, operation: &'static str, name: &Name, change: Change) -> Result<()> {
        match self.start_change(name, change).wait() {
            code if code < 0 => Err(self.error(operation, name, 0, -code)),
            _ => Ok(()),
        }
    }

    /// Waits for a completion no longer than for a connection: a pool without OSDs would answer only when the request times out.
    pub(super) fn wait_shortly(&self, completion: Completion<'_>) -> c_int {
        let started_at = Instant::now();
        completion.wait_unless(|| started_at.elapsed() > self.options.connect_timeout)
    }

    /// The object's length, `None` if there is none.
    pub(super) fn stat(&self, name: &Name) -> Result<Option<u64>> {
        let mut length_bytes = 0;
        let mut changed_at = 0;
        // SAFETY: both places live until the wait below is over.
        let code = self
            .start(|io, completion| unsafe {
                (self.library.aio_stat)(io, name.as_ptr(), completion, &raw mut length_bytes, &raw mut changed_at)
            })
            .wait();
        match -code {
            0 => Ok(Some(length_bytes)),
            libc::ENOENT => Ok(None),
            errno => Err(self.error("stat", name, 0, errno)),
        }
    }

    /// The whole object, `None` if there is none.
    pub(super) fn read_whole(&self, name: &Name, length_bytes_max: u64) -> Result<Option<Vec<u8>>> {
        let Some(length_bytes) = self.stat(name)? else { return Ok(None) };
        if length_bytes > length_bytes_max {
            return Err(IoError::from_errno("read", name.to_string(), length_bytes_max, libc::EFBIG));
        }
        const PIECE_BYTES: usize = 4 << 20;
        let mut bytes = vec![0; length_bytes as usize];
        let mut cut_at = bytes.len();
        let pieces: Vec<(usize, *mut u8, usize)> = bytes
            .chunks_mut(PIECE_BYTES)
            .enumerate()
            .map(|(index, piece)| (index * PIECE_BYTES, piece.as_mut_ptr(), piece.len()))
            .collect();
        self.run_all(
            pieces,
            // SAFETY: the pieces do not overlap, and `bytes` lives until all are done.
            |(offset, start, length)| Ok(unsafe { self.start_read(name, *offset as u64, *start, *length) }),
            |(offset, _, length), code| match code {
                code if code < 0 => Err(self.error("read", name, offset as u64, -code)),
                count => {
                    if (count as usize) < length {
                        cut_at = cut_at.min(offset + count as usize);
                    }
                    Ok(())
                }
            },
        )?;
        bytes.truncate(cut_at);
        Ok(Some(bytes))
    }

    /// An attribute into `buffer`: its length, or a negative errno.
    ///
    /// # Safety
    /// The buffer is the caller's until the completion was waited for or dropped.
    pub(super) unsafe fn start_attribute(&self, name: &Name, attribute: &CStr, buffer: *mut u8, length: usize) -> Completion<'_> {
        // SAFETY: the names are copied; the buffer is the caller's promise.
        self.start(|io, completion| unsafe {
            (self.library.aio_getxattr)(io, name.as_ptr(), completion, attribute.as_ptr(), buffer.cast(), length)
        })
    }

    /// A short attribute of an object: its bytes, or the errno.
    pub(super) fn attribute(&self, name: &Name, attribute: &CStr) -> std::result::Result<Vec<u8>, i32> {
        let mut buffer = vec![0; 256];
        // SAFETY: the buffer lives until the wait is over.
        let code = unsafe { self.start_attribute(name, attribute, buffer.as_mut_ptr(), buffer.len()) }.wait();
        if code < 0 {
            return Err(-code);
        }
        buffer.truncate(code as usize);
        Ok(buffer)
    }

    /// Runs `start` on every item, a bounded number of them at a time, and `finish` on each answer, in order. After the first failure
    /// nothing is started any more; it is returned when `finish` was called for everything that was.
    pub(super) fn run_all<'a, T>(
        &'a self,
        items: impl IntoIterator<Item = T>,
        mut start: impl FnMut(&mut T) -> Result<Completion<'a>>,
        mut finish: impl FnMut(T, c_int) -> Result<()>,
    ) -> Result<()> {
        // The completion first: it is waited for before what it fills goes.
        let mut running: VecDeque<(Completion<'a>, T)> = VecDeque::new();
        let mut end_one = |running: &mut VecDeque<(Completion<'a>, T)>| match running.pop_front() {
            Some((completion, item)) => finish(item, completion.wait()),
            None => Ok(()),
        };
        let mut outcome = Ok(());
        for mut item in items {
            if running.len() == IN_FLIGHT_MAX {
                outcome = end_one(&mut running);
            }
            if outcome.is_ok() {
                match start(&mut item) {
                    Ok(completion) => running.push_back((completion, item)),
                    Err(error) => outcome = Err(error),
                }
            }
            if outcome.is_err() {
                break;
            }
        }
        while !running.is_empty() {
            outcome = outcome.and(end_one(&mut running));
        }
        outcome
    }

    /// The keys of an index object, ascending; none if there is no such object.
    pub(super) fn index_keys(&self, name: &Name) -> Result<Vec<String>> {
        self.index_keys_from(name, "")
    }

    /// Those that begin with `prefix`.
    pub(super) fn index_keys_from(&self, name: &Name, prefix: &str) -> Result<Vec<String>> {
        let mut keys: Vec<String> = Vec::new();
        loop {
            let after = c_string("key", keys.last().map_or(prefix, String::as_str))?;
            let (mut iterator, mut has_more, mut status) = (null_mut(), 0, 0);
            // SAFETY: takes nothing.
            let raw = unsafe { (self.library.create_read_op)() };
            // SAFETY: the places live until the operation is done; the text is copied.
            unsafe {
                (self.library.read_op_omap_get_keys2)(
                    raw,
                    after.as_ptr(),
                    INDEX_PAGE_KEYS,
                    &raw mut iterator,
                    &raw mut has_more,
                    &raw mut status,
                );
            }
            // SAFETY: the operation lives until the wait is over.
            let code =
                self.start(|io, completion| unsafe { (self.library.aio_read_op_operate)(raw, io, completion, name.as_ptr(), 0) }).wait();
            if code >= 0 && !iterator.is_null() {
                loop {
                    let (mut key, mut value) = (null_mut(), null_mut());
                    let (mut key_length, mut value_length) = (0, 0);
                    // SAFETY: the iterator is open; what comes out lives as long.
                    let next = unsafe {
                        (self.library.omap_get_next2)(iterator, &raw mut key, &raw mut value, &raw mut key_length, &raw mut value_length)
                    };
                    if next < 0 || key.is_null() {
                        break;
                    }
                    // SAFETY: a key of `key_length` bytes, copied at once.
                    let bytes = unsafe { std::slice::from_raw_parts(key.cast::<u8>(), key_length) };
                    keys.push(String::from_utf8_lossy(bytes).into_owned());
                }
            }
            // SAFETY: both are ours, and nobody uses them any more.
            unsafe {
                if !iterator.is_null() {
                    (self.library.omap_get_end)(iterator);
                }
                (self.library.release_read_op)(raw);
            }
            match -code {
                errno if errno <= 0 => {}
                libc::ENOENT => return Ok(Vec::new()),
                errno => return Err(self.error("list", name, 0, errno)),
            }
            let is_past = keys.last().is_some_and(|key| !key.starts_with(prefix));
            if has_more == 0 || is_past {
                keys.retain(|key| key.starts_with(prefix));
                return Ok(keys);
            }
        }
    }

    /// Adds keys to an index object, which is made if there is none.
    pub(super) fn add_to_index(&self, name: &Name, keys: &[String]) -> Result<()> {
        let mut change = self.change();
        change.set_keys(keys);
        self.apply("index", name, change)
    }

    /// As `add_to_index`; fails at once if that is not possible because the pool is full.
    pub(super) fn add_to_index_now(&self, name: &Name, keys: &[String]) -> Result<()> {
        let mut change = self.change();
        change.set_keys(keys);
        change.even_if_full();
        self.apply("index", name, change)
    }

    pub(super) fn remove_from_index(&self, name: &Name, keys: &[String]) -> Result<()> {
        let mut change = self.change();
        change.assert_exists();
        change.remove_keys(keys);
        change.even_if_full();
        match self.start_change(name, change).wait() {
            code if code < 0 && -code != libc::ENOENT => Err(self.error("index", name, 0, -code)),
            _ => Ok(()),
        }
    }

    /// Takes the exclusive lock `lock` of an object, for as long as the lock is not broken: errno `EBUSY` if somebody has it.
    pub(super) fn lock(&self, name: &Name, lock: &CStr, cookie: &CStr) -> std::result::Result<(), i32> {
        // SAFETY: all strings live longer than the call; without a duration it does not run out.
        let code = unsafe {
            (self.library.lock_exclusive)(
                self.full_io,
                name.as_ptr(),
                lock.as_ptr(),
                cookie.as_ptr(),
                c"a pool of Atoll is open".as_ptr(),
                null_mut(),
                0,
            )
        };
        if code < 0 { Err(-code) } else { Ok(()) }
    }

    /// Whether this connection has the lock: an errno if not, `ESHUTDOWN` if it was shut out. Answered by the OSD that breaks and gives
    /// this lock, so that whoever broke it did so before or after.
    pub(super) fn assert_locked(&self, name: &Name, lock: &CStr, cookie: &CStr) -> std::result::Result<(), i32> {
        // As Ceph's class of locks reads it: version 1, compatible with 1, length | name, kind (1: exclusive), cookie, tag.
        let mut fields = Vec::new();
        let add_text = |fields: &mut Vec<u8>, text: &[u8]| {
            fields.extend((text.len() as u32).to_le_bytes());
            fields.extend(text);
        };
        add_text(&mut fields, lock.to_bytes());
        fields.push(1);
        add_text(&mut fields, cookie.to_bytes());
        add_text(&mut fields, b"");
        let mut question = vec![1, 1];
        question.extend((fields.len() as u32).to_le_bytes());
        question.extend(fields);
        let code = self
            .start(|io, completion| unsafe {
                // SAFETY: the names and the question are copied; nothing is answered but a code.
                (self.library.aio_exec)(
                    io,
                    name.as_ptr(),
                    completion,
                    c"lock".as_ptr(),
                    c"assert_locked".as_ptr(),
                    question.as_ptr().cast(),
                    question.len(),
                    null_mut(),
                    0,
                )
            })
            .wait();
        if code < 0 { Err(-code) } else { Ok(()) }
    }

    /// After an errno the lock may be held all the same.
    pub(super) fn unlock(&self, name: &Name, lock: &CStr, cookie: &CStr) -> std::result::Result<(), i32> {
        // SAFETY: all strings live longer than the call.
        let code = unsafe { (self.library.unlock)(self.full_io, name.as_ptr(), lock.as_ptr(), cookie.as_ptr()) };
        if code < 0 { Err(-code) } else { Ok(()) }
    }

    /// Who holds a lock; `None`: nobody.
    pub(super) fn locker(&self, name: &Name, lock: &CStr) -> Result<Option<Locker>> {
        let mut texts: [Vec<u8>; 4] = std::array::from_fn(|_| vec![0; 8192]);
        let mut lengths: [usize; 4] = [8192; 4];
        let mut exclusive = 0;
        let [tag, client, cookie, address] = &mut texts;
        let [tag_length, client_length, cookie_length, address_length] = &mut lengths;
        // SAFETY: each place has as many bytes as is said and lives longer than the call.
        let count = unsafe {
            (self.library.list_lockers)(
                self.full_io,
                name.as_ptr(),
                lock.as_ptr(),
                &raw mut exclusive,
                tag.as_mut_ptr().cast(),
                tag_length,
                client.as_mut_ptr().cast(),
                client_length,
                cookie.as_mut_ptr().cast(),
                cookie_length,
                address.as_mut_ptr().cast(),
                address_length,
            )
        };
        if count < 0 {
            let errno = -(count as i32);
            return if errno == libc::ENOENT { Ok(None) } else { Err(self.error("lock", name, 0, errno)) };
        }
        if count == 0 {
            return Ok(None);
        }
        let [_, client, cookie, address] = texts.map(|text| first_text(&text));
        Ok(Some(Locker { client, cookie, address }))
    }

    /// Whether this connection is the holder.
    pub(super) fn is_holder(&self, locker: &Locker) -> bool {
        locker.client == format!("client.{}", self.instance_id())
    }

    /// Shuts a client out of the cluster for so many seconds, waits until no OSD takes anything of it any more, and breaks its lock.
    pub(super) fn fence(&self, name: &Name, lock: &CStr, locker: &Locker, seconds: u32) -> Result<()> {
        let address = c_string("lock", &locker.address)?;
        // SAFETY: the text lives longer than the call, which does not change it.
        let code = unsafe { (self.library.blocklist_add)(self.cluster, address.as_ptr().cast_mut(), seconds) };
        if code < 0 {
            return Err(self.error("fence", format!("client {} at {}", locker.client, locker.address), 0, -code));
        }
        // SAFETY: connected. From here on our requests carry a map that has the entry, and an OSD that gets one has the map first.
        let code = unsafe { (self.library.wait_for_latest_osdmap)(self.cluster) };
        if code < 0 {
            return Err(self.error("fence", "the map of the cluster", 0, -code));
        }
        self.break_lock(name, lock, locker)
    }

    /// Takes the lock away from its holder, who is shut out, or is this connection.
    pub(super) fn break_lock(&self, name: &Name, lock: &CStr, locker: &Locker) -> Result<()> {
        let (client, cookie) = (c_string("lock", &locker.client)?, c_string("lock", &locker.cookie)?);
        // SAFETY: all strings live longer than the call.
        let code = unsafe { (self.library.break_lock)(self.full_io, name.as_ptr(), lock.as_ptr(), client.as_ptr(), cookie.as_ptr()) };
        match -code {
            errno if errno <= 0 || errno == libc::ENOENT => Ok(()),
            errno => Err(self.error("fence", name, 0, errno)),
        }
    }

    /// Whether this user may shut others out, found out by shutting nobody out for a second. `Denied` with what it lacks.
    pub(super) fn check_may_fence(&self) -> Result<()> {
        let RadosOptions { user, pool, .. } = &self.options;
        // SAFETY: the text lives longer than the call, which does not change it. No client has this address.
        match -unsafe { (self.library.blocklist_add)(self.cluster, c"0.0.0.0:0/1".as_ptr().cast_mut(), 1) } {
            errno if errno <= 0 => Ok(()),
            errno @ (libc::EPERM | libc::EACCES) => {
                let message = format!("client.{user} may not shut out a daemon that is gone (osd blocklist): {}", caps_advice(user, pool));
                Err(IoError { errno, ..IoError::new(IoErrorCode::Denied, "fence", "nobody", 0, message) })
            }
            errno => Err(self.error("fence", "nobody", 0, errno)),
        }
    }

    /// What a monitor answers to a command; `None` if it may not be asked or does not know.
    pub(super) fn ask_monitor(&self, command: &str) -> Result<Option<String>> {
        let command = c_string("command", command)?;
        let commands = [command.as_ptr()];
        let (mut text, mut status) = (null_mut(), null_mut());
        let (mut text_length, mut status_length) = (0, 0);
        // SAFETY: the command lives longer than the call; the answer is copied and given back below.
        let code = unsafe {
            (self.library.mon_command)(
                self.cluster,
                commands.as_ptr(),
                1,
                c"".as_ptr(),
                0,
                &raw mut text,
                &raw mut text_length,
                &raw mut status,
                &raw mut status_length,
            )
        };
        let answer = if text.is_null() {
            String::new()
        } else {
            // SAFETY: as many bytes as the library says, copied at once.
            String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(text.cast::<u8>(), text_length) }).into_owned()
        };
        for buffer in [text, status].into_iter().filter(|buffer| !buffer.is_null()) {
            // SAFETY: it came from the library and is given back once.
            unsafe { (self.library.buffer_free)(buffer) };
        }
        match -code {
            errno if errno <= 0 => Ok(Some(answer)),
            libc::EACCES | libc::EPERM | libc::EINVAL => Ok(None),
            libc::ETIMEDOUT => {
                let seconds = self.options.connect_timeout.as_secs().max(1);
                let message = format!("no monitor answered within {seconds} s: is the network to them cut, or are they down?");
                Err(IoError { errno: libc::ETIMEDOUT, ..IoError::new(IoErrorCode::Unavailable, "ask", "the monitors", 0, message) })
            }
            errno => Err(self.error("ask", "the monitors", 0, errno)),
        }
    }
}

/// Who holds a lock.
pub(super) struct Locker {
    client: String,
    pub(super) cookie: String,
    address: String,
}

pub(super) fn silent_message(pool: &str) -> String {
    format!("pool {pool} does not answer at present: it is tried again all the time, and `ceph -s` says what it lacks")
}

fn denied_message(user: &str, pool: &str) -> String {
    format!("client.{user} may not do this in pool {pool}: {}", caps_advice(user, pool))
}

fn caps_advice(user: &str, pool: &str) -> String {
    format!("`ceph auth caps client.{user} mon 'profile rbd' osd 'allow rwx pool={pool}'`")
}

fn first_text(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

pub(super) fn c_string(what: &'static str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| IoError::from_errno("configure", format!("{what} {text:?}"), 0, libc::EINVAL))
}

/// Who is told the end of a request that was begun.
pub(super) trait Ended: Send + 'static {
    /// `code`: a negative errno, or what the request answers. On a thread of the library, which carries out nothing else meanwhile.
    fn ended(self: Box<Self>, code: c_int);
}

extern "C" fn call_back<T: Ended>(completion: Handle, told: *mut c_void) {
    // Set before the first request can be begun: the library is loaded.
    let Ok(library) = library() else { return };
    // SAFETY: the completion is alive while it calls back, and nobody else refers to it.
    let code = unsafe {
        let code = (library.aio_get_return_value)(completion);
        (library.aio_release)(completion);
        code
    };
    // SAFETY: `begin` gave it to this completion, which calls back once.
    let told = unsafe { Box::from_raw(told.cast::<Counted<T>>()) }.take();
    // What is above catches its panics; none may reach the library.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| told.ended(code)));
}

/// A request under way. Dropping it waits for its end, so that nothing it fills goes before.
pub(super) struct Completion<'a> {
    cluster: &'a Cluster,
    raw: Handle,
    /// A negative errno: it was never begun.
    refused: c_int,
}

impl Completion<'_> {
    /// Waits for the end: a negative errno, or what the request answers.
    pub(super) fn wait(self) -> c_int {
        if self.refused < 0 {
            return self.refused;
        }
        if IS_MANAGING.get() {
            let cluster = self.cluster;
            return self.wait_unless(|| cluster.is_silent.load(Ordering::Relaxed));
        }
        self.wait_to_the_end()
    }

    /// As `wait`; `ETIMEDOUT` as soon as `is_enough` says so.
    fn wait_unless(self, is_enough: impl Fn() -> bool) -> c_int {
        let mut pause = POLL_INTERVAL_MIN;
        // SAFETY: the completion is alive.
        while self.refused == 0 && unsafe { (self.cluster.library.aio_is_complete)(self.raw) } == 0 {
            if is_enough() {
                // SAFETY: the request is of this pool. A request that is cancelled is complete; one that just got its answer too.
                unsafe { (self.cluster.library.aio_cancel)(self.cluster.io, self.raw) };
                return -libc::ETIMEDOUT;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(POLL_INTERVAL_MAX);
        }
        self.wait_to_the_end()
    }

    fn wait_to_the_end(self) -> c_int {
        if self.refused < 0 {
            return self.refused;
        }
        // SAFETY: the completion is ours until it is dropped.
        unsafe {
            (self.cluster.library.aio_wait_for_complete)(self.raw);
            (self.cluster.library.aio_get_return_value)(self.raw)
        }
    }
}

impl Drop for Completion<'_> {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        // SAFETY: ours, and not used afterwards. Waiting again for what is complete returns at once.
        unsafe {
            if self.refused == 0 {
                (self.cluster.library.aio_wait_for_complete)(self.raw);
            }
            (self.cluster.library.aio_release)(self.raw);
        }
    }
}

/// A change of one object under construction: all of its parts happen, in order, or none.
pub(super) struct Change {
    library: &'static Library,
    raw: Handle,
    flags: c_int,
}

impl Drop for Change {
    fn drop(&mut self) {
        // SAFETY: ours, and not used afterwards; a change that was started has copies of its parts.
        unsafe { (self.library.release_write_op)(self.raw) };
    }
}

// All texts and data are copied when they are added.
impl Change {
    /// Where the pool is full it fails at once if it takes more space, instead of waiting until there is some.
    pub(super) fn even_if_full(&mut self) {
        self.flags |= FULL_TRY;
    }

    /// It is carried out where the pool is full, too: for the little that has to be written before something can be deleted.
    pub(super) fn beyond_full(&mut self) {
        self.flags |= FULL_FORCE;
    }

    pub(super) fn remove(&mut self) {
        // SAFETY: the operation is ours.
        unsafe { (self.library.write_op_remove)(self.raw) };
    }

    /// Fails with `ENOENT` if the object is not there.
    pub(super) fn assert_exists(&mut self) {
        // SAFETY: the operation is ours.
        unsafe { (self.library.write_op_assert_exists)(self.raw) };
    }

    /// `exclusive`: fails with `EEXIST` if the object is there.
    pub(super) fn create(&mut self, exclusive: bool) {
        let how = if exclusive { CREATE_EXCLUSIVE } else { CREATE_IDEMPOTENT };
        // SAFETY: the operation is ours; no category is given.
        unsafe { (self.library.write_op_create)(self.raw, how, null()) };
    }

    fn compare_attribute(&mut self, attribute: &CStr, how: u8, value: &[u8]) {
        // SAFETY: the operation is ours; texts are copied.
        unsafe { (self.library.write_op_cmpxattr)(self.raw, attribute.as_ptr(), how, value.as_ptr().cast(), value.len()) };
    }

    /// Fails with `ECANCELED` if the attribute is not this.
    pub(super) fn assert_attribute(&mut self, attribute: &CStr, value: &[u8]) {
        self.compare_attribute(attribute, CMPXATTR_EQ, value);
    }

    /// Fails with `ECANCELED` if the attribute is greater than this, compared as text.
    pub(super) fn assert_attribute_at_most(&mut self, attribute: &CStr, value: &[u8]) {
        self.compare_attribute(attribute, CMPXATTR_GTE, value);
    }

    /// Fails with `ECANCELED` unless the attribute is less than this, compared as text.
    pub(super) fn assert_attribute_less(&mut self, attribute: &CStr, value: &[u8]) {
        self.compare_attribute(attribute, CMPXATTR_GT, value);
    }

    pub(super) fn set_attribute(&mut self, attribute: &CStr, value: &[u8]) {
        // SAFETY: the operation is ours; texts are copied.
        unsafe { (self.library.write_op_setxattr)(self.raw, attribute.as_ptr(), value.as_ptr().cast(), value.len()) };
    }

    pub(super) fn write(&mut self, offset_bytes: u64, data: &[u8]) {
        // SAFETY: the operation is ours; the data is copied.
        unsafe { (self.library.write_op_write)(self.raw, data.as_ptr().cast(), data.len(), offset_bytes) };
    }

    pub(super) fn write_full(&mut self, data: &[u8]) {
        // SAFETY: the operation is ours; the data is copied.
        unsafe { (self.library.write_op_write_full)(self.raw, data.as_ptr().cast(), data.len()) };
    }

    pub(super) fn truncate(&mut self, length_bytes: u64) {
        // SAFETY: the operation is ours.
        unsafe { (self.library.write_op_truncate)(self.raw, length_bytes) };
    }

    /// Zeros the range; at the object's end this makes the object shorter.
    pub(super) fn zero(&mut self, offset_bytes: u64, length_bytes: u64) {
        // SAFETY: the operation is ours.
        unsafe { (self.library.write_op_zero)(self.raw, offset_bytes, length_bytes) };
    }

    fn set_keys(&mut self, keys: &[String]) {
        let starts: Vec<*const c_char> = keys.iter().map(|key| key.as_ptr().cast()).collect();
        let lengths: Vec<usize> = keys.iter().map(String::len).collect();
        let (values, value_lengths) = (vec![c"".as_ptr(); keys.len()], vec![0; keys.len()]);
        // SAFETY: as many texts and lengths as is said; all are copied.
        unsafe {
            (self.library.write_op_omap_set2)(
                self.raw,
                starts.as_ptr(),
                values.as_ptr(),
                lengths.as_ptr(),
                value_lengths.as_ptr(),
                keys.len(),
            );
        }
    }

    fn remove_keys(&mut self, keys: &[String]) {
        let starts: Vec<*const c_char> = keys.iter().map(|key| key.as_ptr().cast()).collect();
        let lengths: Vec<usize> = keys.iter().map(String::len).collect();
        // SAFETY: as many texts and lengths as is said; all are copied.
        unsafe { (self.library.write_op_omap_rm_keys2)(self.raw, starts.as_ptr(), lengths.as_ptr(), keys.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[test]
    fn what_is_under_way_is_bounded_by_its_count_and_by_its_bytes() {
        let total = Arc::<BegunTotal>::default();
        let many: Vec<_> = (0..BEGUN_COUNT_MAX).map(|_| Counted::new(Box::new(()), 0, &total)).collect();
        assert!(!total.has_room(0));
        many.into_iter().for_each(|one| drop(one.take()));
        let large = Counted::new(Box::new(()), BEGUN_BYTES_MAX - 4096, &total);
        assert!(total.has_room(4096) && !total.has_room(4097));
        large.take();
        assert!(total.has_room(BEGUN_BYTES_MAX as u64));
    }

    static CALLS: Mutex<Vec<&str>> = Mutex::new(Vec::new());

    extern "C" fn nothing(_: Handle) {}
    extern "C" fn blocklist_add(_: Handle, _: *mut c_char, _: u32) -> c_int {
        CALLS.lock().push("blocklist");
        0
    }
    extern "C" fn wait_for_latest_osdmap(_: Handle) -> c_int {
        CALLS.lock().push("wait for the map");
        0
    }
    extern "C" fn break_lock(_: Handle, _: *const c_char, _: *const c_char, _: *const c_char, _: *const c_char) -> c_int {
        CALLS.lock().push("break the lock");
        0
    }

    #[test]
    fn who_is_shut_out_is_on_the_blocklist_and_every_osd_knows_before_his_lock_is_broken() {
        // Without the library there is nothing to put other functions into.
        let Ok(real) = library() else { return };
        let recording = Library { shutdown: nothing, blocklist_add, wait_for_latest_osdmap, break_lock, ..*real };
        CONNECTION_COUNT.fetch_add(1, Ordering::SeqCst);
        let cluster = Cluster {
            library: Box::leak(Box::new(recording)),
            cluster: null_mut(),
            io: null_mut(),
            full_io: null_mut(),
            is_silent: AtomicBool::new(false),
            begun: Arc::default(),
            doubtful_count: AtomicUsize::new(0),
            options: RadosOptions {
                conf: None,
                keyring: None,
                user: "nobody".to_owned(),
                pool: "none".to_owned(),
                namespace: String::new(),
                request_timeout: Duration::from_secs(60),
                connect_timeout: Duration::from_secs(60),
                create: false,
            },
        };
        let locker = Locker { client: "client.1".to_owned(), cookie: "cookie".to_owned(), address: "v1:127.0.0.1:0/1".to_owned() };
        cluster.fence(&Name::new(format_args!("lock")), c"atoll", &locker, 1).unwrap();
        assert_eq!(*CALLS.lock(), ["blocklist", "wait for the map", "break the lock"]);
    }
}
