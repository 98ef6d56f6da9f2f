//! The UART, the real-time clock, the test finisher and the generation ID, and the console behind
//! the UART. Virtio devices are in `virtio`, interrupt controllers in `irqchip`, and the PCI bridge
//! is in `pci`.

pub mod console;
pub mod goldfish_rtc;
pub mod sifive_test;
pub mod uart16550;
pub mod vmgenid;
