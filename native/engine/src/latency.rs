//! How long things took, as histograms: recording takes no lock and allocates nothing, two additions for each.
//!
//! Buckets: one below 1024 ns, then four of equal width for each power of two up to 2^37 ns (137 s); what is longer counts in
//! the last one. So a quantile is known to a fifth or better.
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const FIRST_OCTAVE: u32 = 10;
const OCTAVE_COUNT: u32 = 27;
const BUCKETS_PER_OCTAVE: u32 = 4;
/// Buckets of a histogram.
pub const LATENCY_BUCKET_COUNT: usize = (1 + OCTAVE_COUNT * BUCKETS_PER_OCTAVE) as usize;

/// Durations by how long they were.
pub struct Latency {
    buckets: [AtomicU64; LATENCY_BUCKET_COUNT],
    sum_nanoseconds: AtomicU64,
}

/// What a histogram holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatencyCounts {
    /// By bucket, without the empty ones at the end.
    pub counts: Vec<u64>,
    /// Of all durations.
    pub sum_nanoseconds: u64,
}

impl Default for Latency {
    fn default() -> Latency {
        Latency { buckets: [const { AtomicU64::new(0) }; LATENCY_BUCKET_COUNT], sum_nanoseconds: AtomicU64::new(0) }
    }
}

impl Latency {
    /// Counts one.
    #[inline]
    pub fn record(&self, duration: Duration) {
        // 2^64 ns are 584 years.
        let nanoseconds = duration.as_nanos() as u64;
        self.buckets[bucket_of(nanoseconds)].fetch_add(1, Ordering::Relaxed);
        self.sum_nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// What was counted so far; what is counted meanwhile may be in it or not.
    pub fn counts(&self) -> LatencyCounts {
        let mut counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        counts.truncate(counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1));
        LatencyCounts { counts, sum_nanoseconds: self.sum_nanoseconds.load(Ordering::Relaxed) }
    }
}

#[inline]
fn bucket_of(nanoseconds: u64) -> usize {
    if nanoseconds < 1 << FIRST_OCTAVE {
        return 0;
    }
    let octave = nanoseconds.ilog2();
    let quarter = (nanoseconds >> (octave - 2)) & 3;
    let index = 1 + u64::from((octave - FIRST_OCTAVE) * BUCKETS_PER_OCTAVE) + quarter;
    (index as usize).min(LATENCY_BUCKET_COUNT - 1)
}

/// The durations of a bucket are shorter than this many nanoseconds (those of the last one may be longer).
pub fn latency_bucket_end(index: usize) -> u64 {
    match (index as u64).checked_sub(1) {
        None => 1 << FIRST_OCTAVE,
        Some(rest) => {
            let octave = u64::from(FIRST_OCTAVE) + rest / u64::from(BUCKETS_PER_OCTAVE);
            let quarter = rest % u64::from(BUCKETS_PER_OCTAVE);
            (4 + quarter + 1) << (octave - 2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_in_the_bucket_that_ends_behind_it() {
        let mut start = 0;
        for index in 0..LATENCY_BUCKET_COUNT {
            let end = latency_bucket_end(index);
            assert!(end > start, "bucket {index}");
            assert_eq!(bucket_of(start), index);
            assert_eq!(bucket_of(end - 1), index);
            start = end;
        }
        assert_eq!(start, 1 << 37);
        assert_eq!(bucket_of(u64::MAX), LATENCY_BUCKET_COUNT - 1);
    }

    #[test]
    fn what_was_recorded_is_counted_and_summed() {
        let latency = Latency::default();
        assert_eq!(latency.counts(), LatencyCounts { counts: Vec::new(), sum_nanoseconds: 0 });
        for microseconds in [0, 1, 1, 3] {
            latency.record(Duration::from_nanos(microseconds * 1024));
        }
        let LatencyCounts { counts, sum_nanoseconds } = latency.counts();
        assert_eq!(sum_nanoseconds, 5 * 1024);
        assert_eq!(counts.iter().sum::<u64>(), 4);
        assert_eq!((counts[0], counts[1]), (1, 2));
        assert_eq!(counts.len(), bucket_of(3 * 1024) + 1);
    }
}
