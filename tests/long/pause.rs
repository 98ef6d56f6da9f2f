//! Pauses by the thousand, under load.
#![cfg(target_arch = "riscv64")]

use crate::common::pausing::nothing_is_lost;

#[test]
fn nothing_is_lost_in_a_thousand_pauses() {
    nothing_is_lost(1000, &[]);
}

#[test]
fn nothing_is_lost_over_mmio() {
    nothing_is_lost(200, &["--transport", "mmio"]);
}
