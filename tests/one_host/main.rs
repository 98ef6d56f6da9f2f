//! Cases that do not depend on the kind of host: `scripts/test` runs this binary on the first kind
//! only.

#[path = "../common/mod.rs"]
mod common;

mod disk;
mod net;
mod power;
mod snapshot;
mod terminal;
mod vhost;
