//! TCP between the host and a guest over a tap, on every kind of host.
#![cfg(target_arch = "riscv64")]

use crate::common::net::tcp;

#[test]
fn tcp_over_pci() {
    tcp("pci", "", "1", false);
}

#[test]
fn tcp_over_mmio() {
    tcp("mmio", "", "1", false);
}

#[test]
fn tcp_by_vhost_over_pci() {
    tcp("pci", ",vhost=on", "1", false);
}

#[test]
fn tcp_by_vhost_over_mmio() {
    tcp("mmio", ",vhost", "1", false);
}
