//! The debugger against an emulator's log, and with GDB itself.
#![cfg(target_arch = "riscv64")]

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rvmm::report::symbols::Symbols;

use crate::common::files::{TempDir, guest_elf};
use crate::common::gdb::Gdb;
use crate::common::programs::Programs;
use crate::common::{POWERED_OFF, Rvmm, Shell};

/// A variable that scripts/test sets.
fn given(name: &str) -> PathBuf {
    let value = env::var_os(name);
    value
        .unwrap_or_else(|| panic!("{name} is not set: run scripts/test --all"))
        .into()
}

fn flags(socket: &Path) -> [String; 2] {
    ["--gdb".into(), format!("unix:{},wait", socket.display())]
}

/// The same guest in QEMU's emulation, without KVM and rvmm, executes the same instructions.
#[test]
fn steps_are_what_an_emulator_logs() {
    const STEPS: usize = 1000;
    let log = fs::read_to_string(given("RVMM_TEST_PCS")).expect("the emulator's log");
    let pcs = log
        .lines()
        .map(|line| u64::from_str_radix(line, 16).expect("a pc"));
    let symbols = Symbols::read(File::open(guest_elf("stepping")).expect("the guest"));
    let symbols = symbols.expect("the guest's symbols");
    let address = |name| symbols.address(name).expect("a symbol");
    let (begin, handler) = (address("begin"), address("handler"));
    // A sequence of LR and SC is one step.
    let inside = address("sequence") + 1..address("sequence_end");
    let pcs: Vec<u64> = pcs
        .skip_while(|pc| *pc != begin)
        .filter(|pc| !inside.contains(pc))
        .take(STEPS)
        .collect();
    assert_eq!(pcs.len(), STEPS);
    assert!(pcs.contains(&handler), "a trap and back");

    let scratch = TempDir::new();
    let socket = scratch.path().join("gdb");
    let vm = Rvmm::guest("stepping").args(flags(&socket)).spawn();
    vm.wait_for_log("the guest waits for GDB");
    let mut gdb = Gdb::connect(&socket);
    gdb.breakpoint(begin, true);
    gdb.go();
    gdb.reply();
    gdb.breakpoint(begin, false);
    for (step, expected) in pcs.iter().enumerate() {
        assert_eq!(gdb.pc(), *expected, "step {step}");
        gdb.step(0);
    }
    gdb.go();
    assert_eq!(gdb.reply(), "W00");
    vm.finish()
        .assert_console(POWERED_OFF, &["stepping", "sum 12100"]);
}

/// A disk with GDB and its packages, which stays mounted.
fn packages() -> &'static Programs {
    static ROOT: OnceLock<Programs> = OnceLock::new();
    ROOT.get_or_init(|| Programs::of(given("RVMM_TEST_GDB").as_ref()))
}

/// Runs GDB with these commands on `elf`. Calls `ready` when GDB has printed `READY`. Returns its
/// output.
fn gdb(elf: &Path, commands: &str, ready: impl FnOnce()) -> String {
    let usr = packages().usr();
    let script = TempDir::new();
    let script = script.file("commands", commands);
    let program = packages().command("gdb-multiarch");
    // Warnings are a part of the output.
    let mut child = Command::new("sh")
        .args(["-c", "exec \"$@\" 2>&1", "gdb"])
        .arg(program.get_program())
        .args(program.get_args())
        .arg("--data-directory")
        .arg(usr.join("share/gdb"))
        .args(["-nx", "-batch", "-x"])
        .arg(&script)
        .arg(elf)
        .env("PYTHONHOME", &usr)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run GDB");
    let mut ready = Some(ready);
    let mut output = String::new();
    for line in BufReader::new(child.stdout.take().expect("its output")).lines() {
        let line = line.expect("a line");
        if line.contains("READY") {
            if let Some(ready) = ready.take() {
                ready();
            }
        }
        output += &line;
        output.push('\n');
    }
    let status = child.wait().expect("wait for GDB");
    assert!(status.success(), "{status}: {output}");
    output
}

#[track_caller]
fn has(output: &str, parts: &[&str]) {
    let mut rest = output;
    for part in parts {
        let Some(at) = rest.find(part) else {
            panic!("{part:?} is missing, or not in this order, in:\n{output}");
        };
        rest = &rest[at + part.len()..];
    }
}

/// A guest in C: frames, finish, locals, steps by lines, and a watchpoint, which cannot be.
#[test]
fn gdb_follows_a_guest_in_c() {
    for cpus in ["1", "4"] {
        let scratch = TempDir::new();
        let socket = scratch.path().join("gdb");
        let vm = Rvmm::guest("calls")
            .args(flags(&socket))
            .args(["--cpus", cpus])
            .spawn();
        vm.wait_for_log("the guest waits for GDB");
        let commands = format!(
            "target remote {}\n\
             break square\n\
             continue\n\
             backtrace\n\
             print number\n\
             finish\n\
             next\n\
             info locals\n\
             stepi 100\n\
             info registers satp sstatus\n\
             monitor info machine\n\
             info threads\n\
             delete\n\
             tbreak done\n\
             continue\n\
             print last\n\
             detach\n",
            socket.display()
        );
        let output = gdb(&guest_elf("calls"), &commands, || ());
        has(
            &output,
            &[
                "Breakpoint 1, square (number=",
                "#0  square (number=",
                "#1 ",
                "in add (sum=0, number=",
                "#2 ",
                "in sum_of_squares (count=10)",
                "#3 ",
                "in main ()",
                "$1 = 1",
                "add (sum=0, number=",
                "Value returned is $2 = 1",
                "sum = 1",
                "satp           0x0",
                "hart 0: at 0x802",
                "hart 0, started",
                "done ()",
                "$3 = {number = 10, square = 100}",
                "detached",
            ],
        );
        if cpus == "4" {
            has(&output, &["hart 3: stopped", "hart 3, stopped"]);
        }
        vm.finish().assert_console(POWERED_OFF, &["total 385"]);
    }
}

#[test]
fn gdb_says_that_there_are_no_watchpoints() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("gdb");
    let vm = Rvmm::guest("calls").args(flags(&socket)).spawn();
    vm.wait_for_log("the guest waits for GDB");
    let commands = format!(
        "target remote {}\n\
         watch last\n\
         python\n\
         try:\n    gdb.execute('continue')\n\
         except gdb.error as error:\n    print('refused:', error)\n\
         end\n\
         delete\n\
         detach\n",
        socket.display()
    );
    let output = gdb(&guest_elf("calls"), &commands, || ());
    has(
        &output,
        &["Could not insert hardware watchpoint 1.", "refused: "],
    );
    vm.wait_for_log("KVM on RISC-V has no watchpoints");
    vm.finish().assert_console(POWERED_OFF, &["total 385"]);
}

/// Debian's kernel, with the symbols of its own /proc/kallsyms.
#[test]
fn gdb_breaks_in_linux() {
    let scratch = TempDir::new();
    let symbols = scratch.file("linux.elf", elf_of(&crate::common::kallsyms(&scratch)));
    for cpus in ["1", "4"] {
        let socket = scratch.path().join(format!("gdb-{cpus}"));
        let at = format!("unix:{}", socket.display());
        let vm = Rvmm::virtio("console=ttyS0 quiet rvmm.action=sh");
        let mut shell = Shell::of(vm.args(["--cpus", cpus, "--gdb", &at]));
        let commands = format!(
            "target remote {}\n\
             break __riscv_sys_newuname\n\
             echo READY\\n\n\
             continue\n\
             backtrace 3\n\
             info registers pc sepc scause\n\
             info threads\n\
             thread {cpus}\n\
             info registers pc tp\n\
             x/2i $pc\n\
             thread 1\n\
             stepi\n\
             delete\n\
             detach\n",
            socket.display()
        );
        let vm = &mut shell.vm;
        let output = gdb(&symbols, &commands, || vm.send("uname -r\n"));
        has(
            &output,
            &[
                "Breakpoint 1,",
                "in __riscv_sys_newuname ()",
                "#0 ",
                "__riscv_sys_newuname ()",
                "<__riscv_sys_newuname",
                "scause         0x8",
                "hart 0, started",
                "[Switching to thread",
                "=> 0xffffffff",
                "detached",
            ],
        );
        shell.answered(1);
        shell.ok("true");
        shell.power_off();
    }
}

/// Functions as an ELF file has them.
struct Functions {
    names: Vec<u8>,
    symbols: Vec<u8>,
    addresses: Range<u64>,
}

/// Bytes of an entry in a symbol table.
const SYMBOL: u64 = 24;

/// The functions of a copy of /proc/kallsyms, without those of modules.
fn functions(kallsyms: &[u8]) -> Functions {
    let text = String::from_utf8_lossy(kallsyms);
    let functions = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let kind = words.next()?;
        let name = words.next().filter(|_| words.next().is_none())?;
        matches!(kind, "T" | "t" | "W" | "w").then_some((address, name))
    });
    // The first name and the first symbol are empty.
    let (mut names, mut symbols) = (vec![0], vec![0; 24]);
    let (mut low, mut high) = (u64::MAX, 0);
    for (address, name) in functions {
        (low, high) = (low.min(address), high.max(address + 4));
        let offset = u32::try_from(names.len()).expect("names of less than 4 GiB");
        symbols.extend(offset.to_le_bytes());
        // A global function of section 1.
        symbols.extend([0x12, 0, 1, 0]);
        symbols.extend(address.to_le_bytes());
        symbols.extend(0u64.to_le_bytes());
        names.extend(name.bytes().chain([0]));
    }
    Functions {
        names,
        symbols,
        addresses: low..high,
    }
}

/// An ELF file with the functions of a copy of /proc/kallsyms, and without their code ("ELF-64
/// Object File Format").
fn elf_of(kallsyms: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const NOBITS: u32 = 8;
    const SECTIONS: &[u8] = b"\0.text\0.symtab\0.strtab\0.shstrtab\0";
    let Functions {
        names,
        symbols,
        addresses,
    } = functions(kallsyms);
    let (symbols_length, names_length) = (symbols.len() as u64, names.len() as u64);
    let names_at = HEADER + symbols_length;
    let sections_at = names_at + names_length;
    let table_at = sections_at + SECTIONS.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    // An executable for RISC-V.
    elf.extend([2, 0, 243, 0, 1, 0, 0, 0]);
    elf.extend([0, 0, table_at].map(u64::to_le_bytes).concat());
    // The flags: the C extension, and doubles in registers.
    elf.extend(5u32.to_le_bytes());
    elf.extend([64, 56, 0, 64, 5, 4].map(u16::to_le_bytes).concat());
    elf.extend([&symbols, &names, SECTIONS].concat());
    let length = addresses.end - addresses.start;
    // Name, type, flags, address, offset, size, link, info, and the size of an entry.
    for (name, kind, words, link, info, entry) in [
        (0, 0, [0; 4], 0, 0, 0),
        (1, NOBITS, [6, addresses.start, HEADER, length], 0, 0, 0),
        (7, 2, [0, 0, HEADER, symbols_length], 3, 1, SYMBOL),
        (15, 3, [0, 0, names_at, names_length], 0, 0, 0),
        (23, 3, [0, 0, sections_at, SECTIONS.len() as u64], 0, 0, 0),
    ] {
        elf.extend([name, kind].map(u32::to_le_bytes).concat());
        elf.extend(words.map(u64::to_le_bytes).concat());
        elf.extend([link, info].map(u32::to_le_bytes).concat());
        elf.extend([1, entry].map(u64::to_le_bytes).concat());
    }
    elf
}
