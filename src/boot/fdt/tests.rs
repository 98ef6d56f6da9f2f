use std::fmt::Write;

use super::*;

/// A device with one property.
struct Lamp;

impl Device for Lamp {
    fn id(&self) -> &str {
        "lamp"
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let node = fdt.begin_node("lamp@1000")?;
        fdt.property_array_u64("reg", &[0x1000, 0x10])?;
        fdt.end_node(node)
    }
}

fn facts() -> HartFacts {
    HartFacts {
        extensions: vec!["i", "m", "a", "c", "zicbom", "zicboz", "sstc"],
        satp_mode: 10,
        timebase: 10_000_000,
        cbom_block: Some(64),
        cboz_block: Some(64),
        cbop_block: None,
    }
}

fn blob(harts: u32) -> Vec<u8> {
    blob_with(harts, "console=ttyS0 quiet")
}

fn blob_with(harts: u32, cmdline: &str) -> Vec<u8> {
    build(&Machine {
        cmdline,
        stdout_path: "/soc/serial@10000000",
        initrd: Some(&(0x87f0_0000..0x87ff_1234)),
        rng_seed: [0xa5; RNG_SEED_SIZE],
        ram_base: 0x8000_0000,
        ram_size: ByteSize::mib(128),
        hart: &facts(),
        harts,
        devices: &[&Lamp],
    })
    .unwrap()
}

#[test]
fn the_tree_as_text() {
    let seed = " a5a5a5a5".repeat(RNG_SEED_SIZE / 4);
    assert_eq!(text_of(&blob(1)), GOLDEN.replace(" SEED", &seed));
}

#[test]
fn its_own_tree_is_known() {
    let ours = blob(1);
    assert!(is_ours(&ours));
    let name = ours
        .windows(5)
        .position(|bytes| bytes == b"rvmm\0")
        .unwrap();
    let mut other = ours.clone();
    other[name] = b'x';
    for other in [
        &other[..],
        &ours[..ours.len() - 1],
        &ours[1..],
        &ours[..40],
        b"",
    ] {
        assert!(!is_ours(other));
    }
}

#[test]
fn harts_and_command_line_add_less_than_their_room() {
    let room = crate::boot::placement::fdt_room;
    for harts in [1, 2, 512] {
        assert!((blob(harts).len() as u64) < room(harts, 19));
        let longest = "x".repeat(crate::config::cmdline::MAX);
        let blob = blob_with(harts, &longest);
        assert!((blob.len() as u64) < room(harts, longest.len()));
        // Linux maps 2 MiB (MAX_FDT_SIZE in `arch/riscv/include/asm/fixmap.h`).
        assert!(room(harts, longest.len()) < 2 << 20);
    }
}

#[test]
fn a_command_line_with_a_nul_byte_is_refused() {
    let machine = Machine {
        cmdline: "a\0b",
        stdout_path: "",
        initrd: None,
        rng_seed: [0; RNG_SEED_SIZE],
        ram_base: 0,
        ram_size: ByteSize(0),
        hart: &facts(),
        harts: 1,
        devices: &[],
    };
    assert!(build(&machine).is_err());
}

const GOLDEN: &str = r#"{
  #address-cells = 00000002
  #size-cells = 00000002
  compatible = "riscv-virtio"
  model = "rvmm"
  chosen {
    bootargs = "console=ttyS0 quiet"
    stdout-path = "/soc/serial@10000000"
    linux,initrd-start = 00000000 87f00000
    linux,initrd-end = 00000000 87ff1234
    rng-seed = SEED
  }
  memory@80000000 {
    device_type = "memory"
    reg = 00000000 80000000 00000000 08000000
  }
  cpus {
    #address-cells = 00000001
    #size-cells = 00000000
    timebase-frequency = 00989680
    cpu@0 {
      device_type = "cpu"
      compatible = "riscv"
      reg = 00000000
      status = "okay"
      riscv,isa = "rv64imac_zicbom_zicboz_sstc"
      riscv,isa-base = "rv64i"
      riscv,isa-extensions = "i" "m" "a" "c" "zicbom" "zicboz" "sstc"
      mmu-type = "riscv,sv57"
      riscv,cbom-block-size = 00000040
      riscv,cboz-block-size = 00000040
      interrupt-controller {
        compatible = "riscv,cpu-intc"
        interrupt-controller
        #interrupt-cells = 00000001
        #address-cells = 00000000
        phandle = 00000001
      }
    }
  }
  soc {
    #address-cells = 00000002
    #size-cells = 00000002
    compatible = "simple-bus"
    ranges
    lamp@1000 {
      reg = 00000000 00001000 00000000 00000010
    }
  }
}
"#;

/// Formats a blob as indented text: strings in quotes, everything else as cells.
fn text_of(blob: &[u8]) -> String {
    let cell = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
    assert_eq!(cell(0), 0xd00d_feed);
    assert_eq!(cell(4), blob.len());
    let (mut at, strings) = (cell(8), cell(12));
    let name_at = |at: usize| {
        let end = blob[at..].iter().position(|b| *b == 0).unwrap();
        std::str::from_utf8(&blob[at..at + end]).unwrap()
    };
    let (mut text, mut depth) = (String::new(), 0);
    loop {
        let token = cell(at);
        at += 4;
        let indent = "  ".repeat(depth - usize::from(token == 2));
        match token {
            1 => {
                let name = name_at(at);
                let open = if name.is_empty() { "{" } else { " {" };
                writeln!(text, "{indent}{name}{open}").unwrap();
                at += (name.len() + 1).next_multiple_of(4);
                depth += 1;
            }
            2 => {
                writeln!(text, "{indent}}}").unwrap();
                depth -= 1;
            }
            3 => {
                let (length, name) = (cell(at), name_at(strings + cell(at + 4)));
                let value = &blob[at + 8..at + 8 + length];
                writeln!(text, "{indent}{name}{}", value_text(value)).unwrap();
                at += 8 + length.next_multiple_of(4);
            }
            9 => return text,
            other => panic!("token {other}"),
        }
    }
}

fn value_text(value: &[u8]) -> String {
    let Some((0, body)) = value.split_last() else {
        return if value.is_empty() {
            String::new()
        } else {
            cells(value)
        };
    };
    let printable = |b: &u8| b.is_ascii_graphic() || *b == b' ';
    if body
        .split(|b| *b == 0)
        .all(|s| !s.is_empty() && s.iter().all(printable))
    {
        let strings = body.split(|b| *b == 0).map(|s| String::from_utf8_lossy(s));
        return format!(" = \"{}\"", strings.collect::<Vec<_>>().join("\" \""));
    }
    cells(value)
}

fn cells(value: &[u8]) -> String {
    let mut text = String::from(" =");
    for cell in value.chunks(4) {
        text.push(' ');
        for byte in cell {
            write!(text, "{byte:02x}").unwrap();
        }
    }
    text
}
