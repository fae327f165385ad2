//! Random decisions from a seed, the same on every machine and in every run.

/// SplitMix64: small, fast, good enough to choose which write a power cut tears.
#[derive(Clone)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    /// A generator for `seed` and `stream`; other streams of one seed are unrelated.
    pub(crate) fn new(seed: u64, stream: u64) -> Random {
        let mut random = Random { state: seed };
        random.state = random.next() ^ stream;
        random.next();
        random
    }

    /// 64 random bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `bound`, which must not be 0. The bias of the remainder does not matter here.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True with probability `of_256` / 256.
    pub(crate) fn chance(&mut self, of_256: u16) -> bool {
        self.next() & 0xff < u64::from(of_256)
    }
}
