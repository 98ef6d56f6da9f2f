//! The guest-physical memory map. It is the one of QEMU's `virt` machine, so that guests built for
//! that machine run. Only the generation ID is not in that map.
//!
//! ```text
//! 0x0010_0000  sifive_test         0x1000_1000  virtio-mmio, eight slots
//! 0x0010_1000  goldfish RTC        0x2800_0000  IMSIC, one page a hart
//! 0x0010_2000  generation ID       0x3000_0000  PCIe ECAM, one bus
//! 0x0c00_0000  PLIC                0x4000_0000  PCIe memory window
//! 0x0d00_0000  APLIC               0x8000_0000  RAM
//! 0x1000_0000  UART
//! ```

use std::ops::Range;

use vm_memory::GuestAddress;

use crate::devices::{goldfish_rtc, sifive_test, uart16550, vmgenid};
use crate::irqchip::{aia, plic};
use crate::pci::host;
use crate::virtio::transport::mmio;

/// The sifive_test device, with which a guest powers off or resets the machine.
pub const SIFIVE_TEST: Range<u64> = range(0x0010_0000, sifive_test::SIZE);
/// The goldfish RTC.
pub(crate) const RTC: Range<u64> = range(0x0010_1000, goldfish_rtc::SIZE);
/// The generation ID.
pub(crate) const VMGENID: Range<u64> = range(0x0010_2000, vmgenid::SIZE);
/// The APLIC's supervisor domain.
pub const APLIC: Range<u64> = range(0x0d00_0000, aia::APLIC_SIZE);
/// The PLIC.
pub const PLIC: Range<u64> = range(0x0c00_0000, plic::SIZE);
/// The UART.
pub const UART: Range<u64> = range(0x1000_0000, uart16550::SIZE);
/// The IMSIC pages, for up to `MAX_HARTS` harts.
pub const IMSIC: Range<u64> = range(0x2800_0000, MAX_HARTS as u64 * aia::IMSIC_SIZE);
/// The addresses of the AIA's parts.
pub(crate) const AIA: aia::Placement = aia::Placement {
    aplic: GuestAddress(APLIC.start),
    imsic: GuestAddress(IMSIC.start),
};
/// The slots of virtio-mmio devices. Their wired interrupts begin at [`VIRTIO_MMIO_IRQ`].
pub(crate) const VIRTIO_MMIO: Range<u64> =
    range(0x1000_1000, VIRTIO_MMIO_SLOTS as u64 * mmio::SIZE);
/// The number of virtio-mmio slots.
pub(crate) const VIRTIO_MMIO_SLOTS: u32 = 8;
/// PCI configuration space.
pub(crate) const PCI_ECAM: Range<u64> = range(0x3000_0000, host::ECAM_SIZE);
/// The window for PCI BARs.
pub(crate) const PCI_WINDOW: Range<u64> = range(0x4000_0000, 0x4000_0000);
/// The start of guest RAM.
pub const RAM_BASE: u64 = 0x8000_0000;

/// The most harts that the map has room for, as on QEMU's virt machine.
pub(crate) const MAX_HARTS: u32 = 512;

/// The wired interrupt of the first virtio-mmio slot. Those of the other slots follow.
pub(crate) const VIRTIO_MMIO_IRQ: u32 = 1;
/// The UART's wired interrupt.
pub const UART_IRQ: u32 = 10;
/// The RTC's wired interrupt.
pub(crate) const RTC_IRQ: u32 = 11;
/// The generation ID's wired interrupt. QEMU's virt machine does not use this source.
pub(crate) const VMGENID_IRQ: u32 = 12;

/// The first of PCI's four wired interrupts, on a controller with `sources` sources: 32 as on
/// QEMU's virt machine, or 20 if the controller has fewer than 35 sources.
pub(crate) const fn pci_irq(sources: u32) -> u32 {
    if sources >= 35 { 32 } else { 20 }
}

/// The path of the UART's node in the device tree.
pub(crate) const UART_PATH: &str = "/soc/serial@10000000";

/// The name of the device whose registers are at the guest-physical address `gpa`.
pub fn owner(gpa: u64) -> Option<&'static str> {
    let owners = [
        (APLIC, "APLIC"),
        (PLIC, "PLIC"),
        (UART, "UART"),
        (RTC, "RTC"),
        (VMGENID, "generation ID"),
        (SIFIVE_TEST, "sifive_test"),
        (IMSIC, "IMSIC"),
        (VIRTIO_MMIO, "virtio-mmio"),
        (PCI_ECAM, "PCI configuration"),
        (PCI_WINDOW, "PCI"),
    ];
    let owner = owners.into_iter().find(|(range, _)| range.contains(&gpa));
    owner.map(|(_, name)| name)
}

const fn range(start: u64, size: u64) -> Range<u64> {
    start..start + size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        let mut ranges = [
            SIFIVE_TEST,
            RTC,
            VMGENID,
            PLIC,
            APLIC,
            UART,
            VIRTIO_MMIO,
            PCI_ECAM,
            PCI_WINDOW,
            IMSIC,
            RAM_BASE..u64::MAX,
        ];
        ranges.sort_by_key(|range| range.start);
        for pair in ranges.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
        let imsic_size = IMSIC.end - IMSIC.start;
        assert_eq!(IMSIC.start % imsic_size.next_power_of_two(), 0);
        assert!(UART_PATH.ends_with(&format!("@{:x}", UART.start)));
        const { assert!(VMGENID_IRQ <= aia::SOURCES_LOSSY) };
        for sources in [aia::SOURCES, aia::SOURCES_LOSSY, plic::SOURCES] {
            assert!(pci_irq(sources) + 3 <= sources);
        }
    }
}
