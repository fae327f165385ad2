//! The data plane: open devices (map + layers + journal) and the native connections that serve them.
//!
//! It moves bytes and decides nothing: which layers exist, which map is durable and who may write is told from above.
mod control;
mod copy;
mod device;
mod engine;
mod error;
mod fill;
mod latency;
mod memory;
mod nbd;
mod net;
mod thread;
mod throttle;

pub use control::{CONTROL_QUEUE_MAX, ControlPool, Lanes};
pub use copy::{CopyReport, copy_in, copy_out};
pub use device::{
    BatchLogPlace, BlockStatus, Checkpoint, Device, DeviceEvent, DeviceLatencies, DeviceLimits, DeviceSpec, DeviceStats, LayerSpec,
    OpenReport, Served, StatusExtent, SwapReport,
};
pub use engine::{Engine, EngineOptions, EngineStats};
pub use error::{EngineError, Result};
pub use fill::{FillReport, FillSpec, fill_piece};
pub use latency::{LATENCY_BUCKET_COUNT, Latency, LatencyCounts, latency_bucket_end};
pub use memory::give_freed_memory_back;
pub use nbd::{
    META_CONTEXT_COUNT_MAX, MetaContext, MetaContextKind, NBD_REQUEST_BYTES_MAX, NbdOptions, ReadPath, ReplyForm, ServeEnd, ServeEndReason,
};
pub use net::{CONNECTION_COUNT_MAX, CONNECTION_READ_BYTES_MAX, Connection, Endpoint, Listener, TlsConfig, TlsPeer};
pub use thread::spawn_named;
pub use throttle::{Admission, Throttle, ThrottleLimits};
