//! Small helpers that every other module may use.

pub mod bytesize;
pub mod cputime;
pub mod filelock;
pub mod half;
pub mod hex;
pub mod icache;
pub mod line;
pub mod outfile;
pub mod output;
pub mod poll;
pub mod random;
pub mod ratelimit;
pub mod signal;
pub mod socket;
pub mod stderr;
pub mod sync;
pub mod text;
pub mod thread;

pub use bytesize::ByteSize;
pub use half::Half;
pub use hex::Hex;
pub use line::{in_json, on_one_line};
pub use ratelimit::RateLimit;
pub(crate) use ratelimit::{guest_debug, guest_info, guest_log, guest_warn};
