//! librados, opened when the first pool on Ceph is, so that nothing else needs it. What stands here are facts of its C interface
//! (version 16 on, soname `librados.so.2`), declared by hand.
use crate::{IoError, IoErrorCode, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Opaque handles: a connection, a pool of it, a completion, an operation, an iterator.
pub(super) type Handle = *mut c_void;

const FILE: &CStr = c"librados.so.2";

/// `rados_cmpxattr`: equal.
pub(super) const CMPXATTR_EQ: u8 = 1;
/// `rados_cmpxattr`: what is given is not less than what is there, byte by byte; nothing there is less than anything.
pub(super) const CMPXATTR_GTE: u8 = 4;
/// `rados_cmpxattr`: what is given is greater.
pub(super) const CMPXATTR_GT: u8 = 3;
/// `rados_write_op_create`: an object that is there is an error.
pub(super) const CREATE_EXCLUSIVE: c_int = 1;
/// An object that is there is as good.
pub(super) const CREATE_IDEMPOTENT: c_int = 0;

/// Flag of an operation: on a full pool it is tried all the same, and fails if it would take more space.
pub(super) const FULL_TRY: c_int = 64;
/// Flag of an operation: it is carried out on a full pool, too.
pub(super) const FULL_FORCE: c_int = 128;

macro_rules! library {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions, without their prefix `rados_`.
        pub(super) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// Renamed in version 16.
            pub(super) blocklist_add: unsafe extern "C" fn(Handle, *mut c_char, u32) -> c_int,
        }

        impl Library {
            /// Loads the library from `file`. It is never unloaded: its threads outlive the last connection.
            fn load(file: &CStr) -> std::result::Result<Library, String> {
                // SAFETY: the name is a string that ends with a NUL. librados has no constructor that needs more than that.
                let library = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
                if library.is_null() {
                    return Err(last_error());
                }
                let blocklist_add = symbol(library, "rados_blocklist_add").or_else(|_| symbol(library, "rados_blacklist_add"))?;
                Ok(Library {
                    $($name: {
                        let found = symbol(library, concat!("rados_", stringify!($name)))?;
                        // SAFETY: the symbol of this name has been this function since version 16 of the interface; the file name
                        // carries the version of the binary interface.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(found) }
                    },)*
                    // SAFETY: as above; both names have one type.
                    blocklist_add: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Handle, *mut c_char, u32) -> c_int>(blocklist_add)
                    },
                })
            }
        }
    };
}

library! {
    create2(*mut Handle, *const c_char, *const c_char, u64) -> c_int;
    conf_read_file(Handle, *const c_char) -> c_int;
    conf_set(Handle, *const c_char, *const c_char) -> c_int;
    connect(Handle) -> c_int;
    shutdown(Handle);
    get_instance_id(Handle) -> u64;
    wait_for_latest_osdmap(Handle) -> c_int;
    mon_command(Handle, *const *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize, *mut *mut c_char, *mut usize) -> c_int;
    buffer_free(*mut c_char);
    ioctx_create(Handle, *const c_char, *mut Handle) -> c_int;
    ioctx_destroy(Handle);
    ioctx_set_namespace(Handle, *const c_char);
    set_pool_full_try(Handle);
    aio_create_completion2(*mut c_void, *mut c_void, *mut Handle) -> c_int;
    aio_wait_for_complete(Handle) -> c_int;
    aio_is_complete(Handle) -> c_int;
    aio_cancel(Handle, Handle) -> c_int;
    aio_get_return_value(Handle) -> c_int;
    aio_release(Handle);
    aio_read(Handle, *const c_char, Handle, *mut c_char, usize, u64) -> c_int;
    aio_write(Handle, *const c_char, Handle, *const c_char, usize, u64) -> c_int;
    aio_stat(Handle, *const c_char, Handle, *mut u64, *mut libc::time_t) -> c_int;
    aio_exec(Handle, *const c_char, Handle, *const c_char, *const c_char, *const c_char, usize, *mut c_char, usize) -> c_int;
    aio_getxattr(Handle, *const c_char, Handle, *const c_char, *mut c_char, usize) -> c_int;
    create_write_op() -> Handle;
    release_write_op(Handle);
    aio_write_op_operate(Handle, Handle, Handle, *const c_char, *mut libc::time_t, c_int) -> c_int;
    write_op_assert_exists(Handle);
    write_op_create(Handle, c_int, *const c_char);
    write_op_cmpxattr(Handle, *const c_char, u8, *const c_char, usize);
    write_op_setxattr(Handle, *const c_char, *const c_char, usize);
    write_op_write(Handle, *const c_char, usize, u64);
    write_op_write_full(Handle, *const c_char, usize);
    write_op_truncate(Handle, u64);
    write_op_remove(Handle);
    write_op_zero(Handle, u64, u64);
    write_op_omap_set2(Handle, *const *const c_char, *const *const c_char, *const usize, *const usize, usize);
    write_op_omap_rm_keys2(Handle, *const *const c_char, *const usize, usize);
    create_read_op() -> Handle;
    release_read_op(Handle);
    read_op_omap_get_keys2(Handle, *const c_char, u64, *mut Handle, *mut u8, *mut c_int);
    aio_read_op_operate(Handle, Handle, Handle, *const c_char, c_int) -> c_int;
    omap_get_next2(Handle, *mut *mut c_char, *mut *mut c_char, *mut usize, *mut usize) -> c_int;
    omap_get_end(Handle);
    lock_exclusive(Handle, *const c_char, *const c_char, *const c_char, *const c_char, *mut libc::timeval, u8) -> c_int;
    unlock(Handle, *const c_char, *const c_char, *const c_char) -> c_int;
    list_lockers(Handle, *const c_char, *const c_char, *mut c_int, *mut c_char, *mut usize, *mut c_char, *mut usize, *mut c_char, *mut usize, *mut c_char, *mut usize) -> isize;
    break_lock(Handle, *const c_char, *const c_char, *const c_char, *const c_char) -> c_int;
}

fn symbol(library: *mut c_void, name: &str) -> std::result::Result<*mut c_void, String> {
    let name = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: `library` is open, the name ends with a NUL.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() { Err(last_error()) } else { Ok(found) }
}

fn last_error() -> String {
    // SAFETY: returns null or a string that lives until this thread calls dlopen and the like again.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: not null, and copied at once.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn missing(why: &str) -> IoError {
    let message = format!("Ceph's client library cannot be loaded ({why}): install the package librados2, version 16 or newer");
    IoError::new(IoErrorCode::Unavailable, "load-library", "librados.so.2", 0, message)
}

/// The library. `Unavailable`, with the package that is missing. What failed once is tried again.
pub(super) fn library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    if let Some(library) = LIBRARY.get() {
        return Ok(library);
    }
    let loaded = Library::load(FILE).map_err(|why| missing(&why))?;
    keep_freed_memory();
    Ok(LIBRARY.get_or_init(|| {
        // SAFETY: a function of this type, with an argument that it ignores. Registered after the library was loaded, it runs before
        // what the library has registered.
        unsafe { on_exit(end_before_the_library, std::ptr::null_mut()) };
        loaded
    }))
}

/// The library puts each message into memory that it takes and frees. Memory of this size and less is kept for the next one: fresh
/// pages cost more than the bytes that come into them (a third of the time of reads of 1 MiB).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES_MAX: libc::c_int = 2 << 20;

/// So much of the free end of an arena is kept.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const FREE_END_BYTES_MAX: libc::c_int = 16 << 20;

fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes two integers and the allocator's own lock; it may be called at any time. A failure changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES_MAX);
        libc::mallopt(libc::M_TRIM_THRESHOLD, FREE_END_BYTES_MAX);
    }
}

/// Connections that there are, and those of them that are about to end.
pub(super) static CONNECTION_COUNT: AtomicUsize = AtomicUsize::new(0);
pub(super) static ENDING_COUNT: AtomicUsize = AtomicUsize::new(0);

/// How long the end of the process waits for connections that are about to end.
const EXIT_WAIT_MAX: Duration = Duration::from_secs(2);

unsafe extern "C" {
    /// glibc, and so declared by hand: as `atexit`, with the exit code.
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// Destructors of the library at the end of the process pull the ground from under its threads. So with a connection still open the
/// process ends here: nothing of ours waits to be written at this point.
extern "C" fn end_before_the_library(exit_code: c_int, _argument: *mut c_void) {
    let started_at = Instant::now();
    let all_end = || matches!(CONNECTION_COUNT.load(Ordering::SeqCst), count if count > 0 && count == ENDING_COUNT.load(Ordering::SeqCst));
    while all_end() && started_at.elapsed() < EXIT_WAIT_MAX {
        std::thread::sleep(Duration::from_millis(1));
    }
    if CONNECTION_COUNT.load(Ordering::SeqCst) > 0 {
        // SAFETY: ends the process, and runs nothing of it.
        unsafe { libc::_exit(exit_code) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_or_is_another_one_is_one_clear_error() {
        let error = Library::load(c"librados-of-nobody.so.2").err().map(|why| missing(&why)).unwrap();
        assert_eq!(error.code, IoErrorCode::Unavailable);
        assert!(error.message.contains("librados-of-nobody.so.2") && error.message.contains("install the package librados2"), "{error}");
        assert!(Library::load(c"libc.so.6").err().unwrap().contains("rados_"));
    }
}
