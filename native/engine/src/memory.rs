//! How the process keeps memory that it has freed.
//!
//! The C library gives a freed buffer back to the system only if it was mapped on its own. Left to itself it learns from every
//! large buffer that is freed to take the next one of that size from an arena, of which there are several for each processor, and
//! there one small neighbour that lives on keeps it for good. Buffers of requests are large, of many sizes, and die on many
//! threads: a client that asks for all sizes made the process grow by a hundred megabytes and more, and it stayed that large.

/// Allocations of at least this are mapped on their own, so that they are gone when they are freed. What the data path keeps and
/// reuses is smaller, or is kept.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES_MIN: libc::c_int = 256 << 10;

/// The free end of an arena is given back when it is longer than this.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const FREE_END_BYTES_MAX: libc::c_int = 1 << 20;

/// Makes freed large buffers go back to the system, in the whole process and from now on. Idempotent. Does nothing where the C
/// library is not the GNU one.
pub fn give_freed_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes two integers and the allocator's own lock; it may be called at any time. A failure changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
        libc::mallopt(libc::M_TRIM_THRESHOLD, FREE_END_BYTES_MAX);
    }
}
