//! The rvmm library.
