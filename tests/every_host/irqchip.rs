//! The host's interrupt controllers, and how rvmm works around their bugs.
#![cfg(target_arch = "riscv64")]

use std::fs;

use crate::common::host::{self, Kind};
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm};

/// Sources in the device tree, on a host with the lossy emulated IMSIC file and on others.
const SOURCES_LOSSY: u32 = 30;
const SOURCES: u32 = 63;

/// Checks the bug itself, without rvmm, and then the workaround: the tree offers so few wired
/// sources that these and the IPIs need at most 31 identities. `-v` says why.
#[test]
fn a_lossy_imsic_is_found_and_spared() {
    if host::kind() == Kind::NoAia {
        let end = tree().0;
        assert!(end.log.contains("PLIC"), "a host without AIA has no IMSIC");
        return;
    }
    let kept = host::imsic_enables_kept((1 << 5) | (1 << 40));
    let lossy = match kept {
        0x20 => true,
        0x100_0000_0020 => false,
        other => panic!("of identities 5 and 40 the host enabled {other:#x}"),
    };
    let (end, tree) = tree();
    let sources = cell_of(&tree, b"riscv,num-sources\0");
    assert_eq!(sources, if lossy { SOURCES_LOSSY } else { SOURCES });
    assert_eq!(end.log.contains("loses the upper half"), lossy);
}

/// The device tree of an ordinary machine, and the run that wrote it.
fn tree() -> (crate::common::Outcome, Vec<u8>) {
    let path = std::env::temp_dir().join(format!("rvmm-irqchip-{}", std::process::id()));
    let end = Rvmm::guest("shutdown").arg("--dump-dtb").arg(&path).run();
    assert_eq!(end.status.code(), Some(POWERED_OFF), "{}", end.log);
    let tree = fs::read(&path).expect("the device tree");
    fs::remove_file(&path).expect("remove it");
    (end, tree)
}

/// The cell of the only property with this name (Devicetree Specification 0.4, chapter 5).
fn cell_of(tree: &[u8], name: &[u8]) -> u32 {
    let word = |at: usize| u32::from_be_bytes(tree[at..at + 4].try_into().expect("4 bytes"));
    let (structs, strings) = (word(8) as usize, word(12) as usize);
    let offset = tree[strings..]
        .windows(name.len())
        .position(|text| text == name);
    let offset = u32::try_from(offset.expect("the property's name")).expect("an offset");
    let property = (structs..strings)
        .step_by(4)
        .find(|at| word(*at) == 3 && word(at + 4) == 4 && word(at + 8) == offset);
    word(property.expect("the property") + 12)
}

/// The wires of the in-kernel AIA rise and fall. Each rising edge is one interrupt. After the guest
/// ends a level interrupt, it comes again if the level is still high, and not if it is low.
#[test]
fn wires_are_edges_and_levels() {
    let rvmm = Rvmm::guest("aplic").args(["--irqchip", "aia"]);
    if host::kind() == Kind::NoAia {
        rvmm.run().assert_refused(HOST_FAILED, &["no AIA"]);
        return;
    }
    rvmm.run().assert_console(
        POWERED_OFF,
        &[
            "edge: rise=3 then=0 fall=0 rise=3",
            "level: rise=3 then=0 retrigger=3 fall=0 rise=3",
        ],
    );
}
