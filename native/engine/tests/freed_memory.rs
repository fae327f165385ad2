//! Freed memory goes back to the system. In a process of its own: other tests would free theirs meanwhile.
#![cfg(all(target_os = "linux", target_env = "gnu"))]
use atoll_engine::give_freed_memory_back;
use std::hint::black_box;

/// Bytes that the allocator holds and nobody uses.
fn unused_bytes() -> usize {
    // SAFETY: the call only reads the allocator's own numbers.
    unsafe { libc::mallinfo2() }.fordblks
}

#[test]
fn large_buffers_of_all_sizes_that_are_freed_beside_small_ones_that_live_on_leave_nothing_behind() {
    give_freed_memory_back();
    let before = unused_bytes();
    let mut small = Vec::new();
    for _ in 0..4 {
        // Largest first: freeing it is what would teach the allocator to keep all that follow.
        for megabytes in (1..=16).rev() {
            let large = black_box(vec![1u8; megabytes << 20]);
            small.push(black_box(vec![1u8; 3000]));
            drop(large);
        }
    }
    assert!(unused_bytes() < before + (4 << 20), "{} bytes are kept, {before} before", unused_bytes());
}
