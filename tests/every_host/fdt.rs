//! The device tree that `--dump-dtb` writes.
#![cfg(target_arch = "riscv64")]

use std::collections::BTreeMap;
use std::fs;

use crate::common::files::{self, TempDir};
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, host};

const RAM: u64 = 0x8000_0000;

/// The properties of a tree by path, `/node/property`.
type Tree = BTreeMap<String, Vec<u8>>;

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// A property of one or two cells, as a number.
fn number(value: &[u8]) -> u64 {
    value
        .chunks(4)
        .fold(0, |sum, cell| (sum << 32) | u64::from(be32(cell, 0)))
}

fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|&b| b == 0)
        .expect("a text that ends in NUL");
    String::from_utf8(bytes[..end].to_vec()).expect("UTF-8")
}

/// Parses a flattened tree (Devicetree specification 0.4, chapter 5). Panics if it is malformed.
fn parse(dtb: &[u8]) -> Tree {
    assert_eq!(be32(dtb, 0), 0xd00d_feed, "magic");
    assert_eq!(
        be32(dtb, 4) as usize,
        dtb.len(),
        "totalsize and the file's length"
    );
    let (structs, strings) = (be32(dtb, 8) as usize, be32(dtb, 12) as usize);
    assert_eq!(be32(dtb, 20), 17, "version");
    let (mut tree, mut path, mut at) = (Tree::new(), Vec::new(), structs);
    loop {
        let token = be32(dtb, at);
        at += 4;
        match token {
            1 => {
                let name = text(&dtb[at..]);
                at += (name.len() + 1).next_multiple_of(4);
                path.push(name);
            }
            2 => drop(path.pop().expect("an open node")),
            3 => {
                let (len, name) = (be32(dtb, at) as usize, be32(dtb, at + 4) as usize);
                let key = format!("{}/{}", path.join("/"), text(&dtb[strings + name..]));
                assert_eq!(
                    tree.insert(key.clone(), dtb[at + 8..at + 8 + len].to_vec()),
                    None,
                    "{key} twice"
                );
                at += 8 + len.next_multiple_of(4);
            }
            4 => {}
            9 => break,
            other => panic!("token {other}"),
        }
    }
    assert!(path.is_empty(), "nodes left open");
    assert_eq!(
        at,
        structs + be32(dtb, 36) as usize,
        "size of the structure block"
    );
    tree
}

/// The tree of a VM with these flags.
fn dump(args: &[&str]) -> Tree {
    let dir = TempDir::new();
    let dtb = dir.path().join("dtb");
    // If the guest ran, it would end with status 121.
    let rvmm = Rvmm::guest("failure")
        .args(args)
        .arg("--dump-dtb")
        .arg(&dtb);
    rvmm.run().assert_console(POWERED_OFF, &[]);
    parse(&fs::read(&dtb).expect("read the tree"))
}

#[test]
fn says_what_the_machine_is() {
    let tree = dump(&["--cmdline", "console=ttyS0 one=1", "--mem", "192M"]);
    let string = |key: &str| text(tree.get(key).unwrap_or_else(|| panic!("no {key}")));
    let value = |key: &str| {
        tree.get(key)
            .unwrap_or_else(|| panic!("no {key}"))
            .as_slice()
    };

    assert_eq!(string("/memory@80000000/device_type"), "memory");
    let reg = value("/memory@80000000/reg");
    assert_eq!((number(&reg[..8]), number(&reg[8..])), (RAM, 192 << 20));

    assert_eq!(string("/chosen/bootargs"), "console=ttyS0 one=1");
    assert!(
        string("/chosen/stdout-path").starts_with("/"),
        "stdout-path names a node"
    );
    assert!(
        value("/chosen/rng-seed").len() >= 32,
        "rng-seed has 256 bits"
    );
    assert!(
        !tree.contains_key("/chosen/linux,initrd-start"),
        "there is no initrd"
    );

    assert!(number(value("/cpus/timebase-frequency")) > 0);
    assert_eq!(string("/cpus/cpu@0/device_type"), "cpu");
    assert_eq!(number(value("/cpus/cpu@0/reg")), 0);
    assert!(string("/cpus/cpu@0/riscv,isa").starts_with("rv64ima"));
    assert_eq!(string("/cpus/cpu@0/riscv,isa-base"), "rv64i");
    let extensions =
        String::from_utf8(value("/cpus/cpu@0/riscv,isa-extensions").to_vec()).expect("UTF-8");
    let extensions: Vec<&str> = extensions.split_terminator('\0').collect();
    for extension in ["i", "m", "a", "c", "zicsr", "zifencei"] {
        assert!(
            extensions.contains(&extension),
            "{extensions:?} has no {extension}"
        );
    }
    assert!(!extensions.contains(&"h"), "a guest has no H extension");
    let aia = host::kind() != host::Kind::NoAia;
    assert_eq!(extensions.contains(&"ssaia"), aia, "ssaia and the host");
    assert!(string("/cpus/cpu@0/mmu-type").starts_with("riscv,sv"));

    let uart = tree
        .iter()
        .find(|(key, value)| key.ends_with("/compatible") && text(value) == "ns16550a")
        .map(|(key, _)| key.trim_end_matches("compatible").to_owned())
        .expect("a node for the UART");
    assert_eq!(number(&value(&format!("{uart}reg"))[..8]), 0x1000_0000);
    // The controller's phandle, the source, its trigger.
    let interrupt = value(&format!("{uart}interrupts-extended"));
    assert_eq!(number(&interrupt[4..8]), 10);
}

/// The initrd begins at the first 2 MiB boundary behind the kernel, whose size is in its header.
#[test]
fn says_where_the_initrd_is() {
    let dir = TempDir::new();
    let initrd = dir.file("initrd", vec![0x55; 12345]);
    let tree = dump(&["--initrd", initrd.to_str().expect("UTF-8")]);
    let (start, end) = (
        number(&tree["/chosen/linux,initrd-start"]),
        number(&tree["/chosen/linux,initrd-end"]),
    );
    assert_eq!(end - start, 12345);
    let guest = fs::read(files::guest("failure")).expect("the guest");
    let image_size = u64::from_le_bytes(guest[16..24].try_into().expect("8 bytes"));
    let kernel_end = RAM + (2 << 20) + image_size;
    assert_eq!(start, kernel_end.next_multiple_of(2 << 20));
}

/// The tree has a fixed order, and nothing changes between runs but the seed.
#[test]
fn is_the_same_each_time() {
    let mut first = dump(&[]);
    let mut second = dump(&[]);
    let (one, other) = (
        first.remove("/chosen/rng-seed"),
        second.remove("/chosen/rng-seed"),
    );
    assert_ne!(one, other, "a seed is fresh");
    assert_eq!(first, second);
}

#[test]
fn cannot_be_written() {
    let dir = TempDir::new();
    let dtb = dir.path().join("missing/dtb");
    let rvmm = Rvmm::new()
        .arg("--kernel")
        .arg(files::guest("shutdown"))
        .arg("--dump-dtb")
        .arg(&dtb);
    let name = dtb.to_str().expect("UTF-8");
    rvmm.run()
        .assert_one_line(HOST_FAILED, &[name, "No such file or directory"]);
    assert_eq!(
        fs::read_dir(dir.path())
            .expect("read the directory")
            .count(),
        0,
        "nothing is left behind"
    );
}
