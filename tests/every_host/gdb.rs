//! `--gdb`: breakpoints, steps, and what GDB reads and writes.
#![cfg(target_arch = "riscv64")]

use std::collections::BTreeSet;
use std::fs::File;

use rvmm::report::symbols::Symbols;

use crate::common::ctl::Ctl;
use crate::common::files::{TempDir, guest_elf};
use crate::common::freezing::{CMDLINE, Freezer, kill};
use crate::common::gdb::{Gdb, hex, stop_of};
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, Shell, TERMINATED, Vm};

/// The numbers of signals that GDB knows.
const SIGINT: u8 = 2;
const SIGTRAP: u8 = 5;
const SIGSEGV: u8 = 11;

/// The number of sp, and of the CSRs sepc, scause and satp.
const SP: usize = 2;
const SEPC: usize = 65 + 0x141;
const SCAUSE: usize = 65 + 0x142;
const SATP: usize = 65 + 0x180;

const EBREAK: [u8; 2] = [0x02, 0x90];

/// A guest that waits for GDB at its first instruction, and GDB.
struct Session {
    vm: Vm,
    gdb: Gdb,
    symbols: Symbols,
    scratch: TempDir,
}

impl Session {
    fn of(name: &str, flags: &[&str]) -> Self {
        let scratch = TempDir::new();
        let at = format!("unix:{},wait", scratch.path().join("gdb").display());
        let vm = Rvmm::guest(name).args(["--gdb", &at]).args(flags);
        let vm = vm.arg("--ctl").arg(scratch.path().join("ctl")).spawn();
        vm.wait_for_log("the guest waits for GDB: target remote ");
        let file = File::open(guest_elf(name)).expect("the guest's ELF file");
        Session {
            gdb: Gdb::connect(&scratch.path().join("gdb")),
            vm,
            symbols: Symbols::read(file).expect("the guest's symbols"),
            scratch,
        }
    }

    fn address(&self, symbol: &str) -> u64 {
        let address = self.symbols.address(symbol);
        address.unwrap_or_else(|| panic!("the guest has no {symbol}"))
    }

    /// Lets the guest run to a breakpoint at `address`, and removes it. Returns the hart.
    #[track_caller]
    fn run_to(&mut self, address: u64) -> usize {
        self.gdb.breakpoint(address, true);
        self.gdb.go();
        let hart = self.stops(SIGTRAP);
        self.gdb.choose(hart);
        assert_eq!(self.gdb.pc(), address);
        self.gdb.breakpoint(address, false);
        hart
    }

    /// Waits until the guest stops with this signal. Returns the hart.
    #[track_caller]
    fn stops(&mut self, signal: u8) -> usize {
        let reply = self.gdb.reply();
        let (was, hart) = stop_of(&reply);
        assert_eq!(was, signal, "{reply}");
        hart
    }

    /// Lets the guest run to its end, and checks that it was not disturbed.
    #[track_caller]
    fn ends(mut self, lines: &[&str]) {
        self.gdb.go();
        assert_eq!(self.gdb.reply(), "W00");
        self.vm.finish().assert_console(POWERED_OFF, lines);
    }
}

/// Ends `team.S`, which runs without GDB.
#[track_caller]
fn team_ends(mut vm: Vm) {
    vm.send("x");
    let end = vm.finish();
    end.assert_console(POWERED_OFF, &["started", "typed"]);
}

/// Every step moves the guest by one instruction: the pcs of a round are those of the one before,
/// except where the code branches on the number of the round, and the result is right.
#[test]
fn a_loop_with_a_trap_is_stepped_through() {
    let mut session = Session::of("stepping", &[]);
    let (begin, end) = (session.address("begin"), session.address("end"));
    let (handler, triple) = (session.address("handler"), session.address("triple"));
    session.run_to(begin);
    let code = session.gdb.memory(begin, 2).expect("the code");
    assert_ne!(code, EBREAK);
    let mut rounds: Vec<Vec<u64>> = Vec::new();
    while rounds.len() < 8 {
        let pc = session.gdb.pc();
        if pc == begin {
            rounds.push(Vec::new());
        }
        let round = rounds.last_mut().expect("a round");
        round.push(pc);
        assert!(round.len() < 100, "{round:x?}");
        session.gdb.step(0);
    }
    rounds.pop();
    // Even and odd rounds.
    for (index, round) in rounds.iter().enumerate() {
        assert_eq!(round, &rounds[index % 2], "round {index}");
        for place in [handler, triple] {
            assert!(round.contains(&place), "{place:x} in {round:x?}");
        }
        // A sequence of LR and SC is one step, and all else is one instruction.
        let distinct: BTreeSet<_> = round.iter().collect();
        assert!(distinct.len() > 25, "{round:x?}");
    }
    assert_ne!(rounds[0], rounds[1]);
    session.run_to(end);
    session.ends(&["stepping", "sum 12100"]);
}

/// A step over a range ends at the first instruction outside.
#[test]
fn a_range_is_stepped_through() {
    let mut session = Session::of("stepping", &[]);
    let (begin, end) = (session.address("begin"), session.address("end"));
    let triple = session.address("triple");
    session.run_to(begin);
    let range = format!("vCont;r{begin:x},{end:x}:1");
    session.gdb.send(&range);
    session.stops(SIGTRAP);
    assert_eq!(session.gdb.pc(), triple, "the first call leaves the range");
    session.ends(&["stepping", "sum 12100"]);
}

/// A breakpoint is at a virtual address: the same code at another address does not stop there. It
/// may be set before the address is mapped.
#[test]
fn a_breakpoint_is_at_a_virtual_address() {
    let mut session = Session::of("aliases", &[]);
    let worker = session.address("worker");
    let alias = worker.wrapping_sub(0x40_0000_0000);
    assert_eq!(session.gdb.register(SATP), 0);
    assert_eq!(session.gdb.memory(alias, 2), None, "it is not mapped yet");
    session.gdb.breakpoint(alias, true);
    for _ in 0..3 {
        session.gdb.go();
        assert_eq!(session.stops(SIGTRAP), 0);
        assert_eq!(session.gdb.pc(), alias);
        let code = session.gdb.memory(alias, 2).expect("the code");
        assert_ne!(code, EBREAK, "memory has the guest's code");
        assert_eq!(session.gdb.memory(worker, 2), Some(code));
        // As GDB does: away from the breakpoint without it.
        session.gdb.breakpoint(alias, false);
        session.gdb.step(0);
        session.gdb.breakpoint(alias, true);
    }
    assert_ne!(session.gdb.register(SATP), 0);
    // Physical addresses.
    assert_eq!(
        session.gdb.monitor("physical on"),
        "addresses are guest-physical now\n"
    );
    assert_eq!(session.gdb.memory(alias, 2), None);
    assert!(session.gdb.memory(worker, 2).is_some());
    session.gdb.monitor("physical off");
    session.gdb.breakpoint(alias, false);
    session.vm.send("x");
    session.ends(&["paging is on", "typed"]);
}

#[test]
fn the_guests_own_breakpoints_are_its_own() {
    let mut session = Session::of("ownbreak", &[]);
    // Stepped into its handler.
    let (short, long) = (session.address("short"), session.address("long"));
    session.run_to(short);
    session.gdb.step(0);
    assert_eq!(session.gdb.register(SEPC), short);
    assert_eq!(session.gdb.register(SCAUSE), 3);
    // One of GDB's at the guest's own is GDB's first.
    session.run_to(long);
    session.ends(&["after the short one", "after the long one"]);
}

#[test]
fn all_harts_are_threads() {
    let mut session = Session::of("team", &["--cpus", "4"]);
    assert_eq!(session.gdb.ask("qfThreadInfo"), "m01,02,03,04");
    assert_eq!(session.gdb.ask("qsThreadInfo"), "l");
    let (main, count) = (session.address("main"), session.address("count"));
    assert_eq!(session.run_to(main), 0);
    let info = session.gdb.monitor("info machine");
    assert!(info.contains("hart 3: stopped"), "{info}");
    let hart = session.run_to(count);
    assert_ne!(hart, 0);
    // The hart that counts steps alone.
    let counts = session.address("counts");
    let word = |gdb: &mut Gdb, hart: usize| gdb.memory(counts + 8 * hart as u64, 8);
    let others: Vec<_> = (1..4).filter(|other| *other != hart).collect();
    let before: Vec<_> = others
        .iter()
        .map(|other| word(&mut session.gdb, *other))
        .collect();
    let mine = word(&mut session.gdb, hart);
    for _ in 0..20 {
        session.gdb.step(hart);
    }
    let after: Vec<_> = others
        .iter()
        .map(|other| word(&mut session.gdb, *other))
        .collect();
    assert_eq!(before, after);
    assert_ne!(word(&mut session.gdb, hart), mine);
    // Ctrl-C while all run; each hart can be read.
    session.gdb.go();
    session.vm.wait_for("started");
    session.gdb.interrupt();
    session.stops(SIGINT);
    for hart in 0..4 {
        session.gdb.choose(hart);
        let pc = session.gdb.pc();
        assert!(pc >= 0x8020_0000, "hart {hart} at {pc:x}");
    }
    let mut ctl = Ctl::connect(&session.scratch.path().join("ctl"));
    let refused = ctl.ask("resume").to_string();
    assert!(refused.contains("GDB has stopped the guest"), "{refused}");
    // Without GDB the guest goes on.
    session.gdb.ok("D");
    session.gdb.wait_for_end();
    team_ends(session.vm);
}

#[test]
fn registers_and_memory_can_be_written() {
    let mut session = Session::of("stepping", &[]);
    let (begin, end) = (session.address("begin"), session.address("end"));
    session.run_to(end);
    // s2 is the sum.
    let sum = session.gdb.register(18);
    session
        .gdb
        .ok(&format!("P12={}", hex(&(sum + 1).to_le_bytes())));
    assert_eq!(session.gdb.register(18), sum + 1);
    let sp = session.gdb.register(SP);
    let stack = session.gdb.memory(sp, 16).expect("the stack");
    session.gdb.ok(&format!("M{sp:x},10:{}", hex(&[0x5a; 16])));
    assert_eq!(session.gdb.memory(sp, 16), Some(vec![0x5a; 16]));
    session.gdb.ok(&format!("M{sp:x},10:{}", hex(&stack)));
    // What cannot be: a watchpoint, memory that is not there, registers that are not there.
    let refused = session.gdb.ask(&format!("Z2,{begin:x},8"));
    assert!(refused.is_empty() || refused.starts_with('E'), "{refused}");
    assert_eq!(session.gdb.memory(0x10, 4), None);
    let refused = session.gdb.ask("pffff");
    assert!(refused.is_empty() || refused.starts_with('E'), "{refused}");
    session.ends(&["stepping", "sum 12101"]);
}

/// A guest that cannot go on is stopped, and can be reset.
#[test]
fn a_crash_is_a_signal_and_a_reset_begins_again() {
    let mut session = Session::of("amouart", &[]);
    let main = session.address("main");
    session.gdb.go();
    assert_eq!(session.stops(SIGSEGV), 0);
    session
        .vm
        .wait_for_log("hint: atomic and vector instructions work on RAM only");
    let told = session.gdb.monitor("report");
    assert!(told.contains("standard error"), "{told}");
    session.vm.wait_for_log_times("  called from:", 2);
    session.gdb.monitor("reset");
    assert_eq!(session.gdb.pc(), 0x8020_0000);
    session.run_to(main);
    session.vm.wait_for_times("amo\n", 1);
    session.gdb.send("k");
    session.gdb.wait_for_end();
    session.vm.finish().assert_status(0);
}

/// Linux with two harts, while it works.
#[test]
fn a_breakpoint_in_linux() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("gdb");
    let at = format!("unix:{}", socket.display());
    let vm = Rvmm::virtio("console=ttyS0 quiet rvmm.action=sh").args(["--cpus", "2", "--gdb", &at]);
    let mut shell = Shell::of(vm);
    let address = shell.ok("sed -n 's/ T __riscv_sys_newuname$//p' /proc/kallsyms");
    let address = u64::from_str_radix(address.trim(), 16).expect("the address of a system call");
    let mut gdb = Gdb::connect(&socket);
    gdb.breakpoint(address, true);
    gdb.go();
    shell.vm.send("uname -r\n");
    let (signal, hart) = stop_of(&gdb.reply());
    assert_eq!(signal, SIGTRAP);
    gdb.choose(hart);
    assert_eq!(gdb.pc(), address);
    gdb.breakpoint(address, false);
    for _ in 0..50 {
        gdb.step(hart);
    }
    gdb.ok("D");
    gdb.wait_for_end();
    shell.answered(1);
    shell.ok("true");
    shell.power_off();
}

/// GDB may go without a word; SIGTERM ends a guest that GDB has stopped.
#[test]
fn the_guest_does_not_depend_on_gdb() {
    let mut session = Session::of("echo", &[]);
    drop(session.gdb);
    session.vm.send("hello\n");
    session.vm.wait_for("hello");
    let gdb = Gdb::connect(&session.scratch.path().join("gdb"));
    session.vm.terminate();
    session.vm.finish().assert_status(TERMINATED);
    gdb.wait_for_end();
}

#[test]
fn an_address_in_use_is_refused() {
    let scratch = TempDir::new();
    let file = scratch.file("gdb", "mine");
    let end = Rvmm::guest("echo")
        .arg("--gdb")
        .arg(format!("unix:{}", file.display()))
        .run();
    end.assert_status(HOST_FAILED);
    let why = format!("Failed to listen on GDB's socket {file:?}: a file is there");
    assert!(end.log.contains(&why), "{}", end.log);
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("its address").port();
    let end = Rvmm::guest("echo").arg("--gdb").arg(port.to_string()).run();
    end.assert_status(HOST_FAILED);
    assert!(
        end.log
            .contains(&format!("Failed to listen for GDB on port {port}")),
        "{}",
        end.log
    );
}

/// What no GDB says, or not at this moment, harms nothing.
#[test]
fn a_client_may_say_anything() {
    const A0: usize = 10;
    let mut session = Session::of("team", &["--cpus", "4"]);
    let main = session.address("main");
    // The guest is stopped already.
    session.gdb.interrupt();
    session.run_to(main);
    session.gdb.go();
    session.vm.wait_for("started");
    session.gdb.interrupt();
    session.stops(SIGINT);
    // A hart runs alone; other wishes come too late.
    session.gdb.send("vCont;c:4");
    session.gdb.send("vCont;c");
    session.gdb.send("vCont;s:1");
    session.gdb.interrupt();
    assert_eq!(session.stops(SIGINT), 3);
    // A thread that there is not.
    session.gdb.send("vCont;s:ff");
    session.gdb.interrupt();
    session.stops(SIGINT);
    for hart in 1..4 {
        session.gdb.choose(hart);
        assert_eq!(session.gdb.register(A0), hart as u64, "each hart is itself");
    }
    // More memory than a reply may have.
    session.gdb.send("m80000000,7fffffff");
    session.gdb.wait_for_end();
    session.vm.wait_for_log("Failed to talk to GDB");
    let gdb = Gdb::connect(&session.scratch.path().join("gdb"));
    drop(gdb);
    team_ends(session.vm);
}

/// A machine may be paused while its guest runs for GDB.
#[test]
fn a_pause_and_gdb() {
    let mut session = Session::of("team", &["--cpus", "4"]);
    let mut ctl = Ctl::connect(&session.scratch.path().join("ctl"));
    session.gdb.go();
    session.vm.wait_for("started");
    ctl.done("pause");
    assert_eq!(ctl.status()["state"], "paused");
    // GDB takes over.
    session.gdb.interrupt();
    session.stops(SIGINT);
    let refused = ctl.ask("pause").to_string();
    assert!(refused.contains("GDB has stopped the guest"), "{refused}");
    session.gdb.go();
    // The two sockets have no order: rvmm may handle the pause first, and refuse it.
    while ctl.ask("pause") != "done" {}
    // GDB goes, and the machine stays paused.
    session.gdb.ok("D");
    session.gdb.wait_for_end();
    assert_eq!(ctl.status()["state"], "paused");
    ctl.done("resume");
    team_ends(session.vm);
}

/// GDB stops a guest whose time is frozen: one that is restored, and one that is paused.
#[test]
fn the_guests_time_never_goes_back() {
    let freezer = Freezer::new();
    let gdb_at = freezer.path("gdb");
    let mut guest = Shell::of(Rvmm::virtio(CMDLINE).args(freezer.ctl("ctl")));
    let frozen = uptime(&mut guest);
    freezer.freeze("ctl", "snap", &[]);
    kill(guest.vm);

    let at = format!("unix:{},wait", gdb_at.display());
    let rvmm = freezer.thaw("snap").args(["--gdb", &at]);
    let vm = rvmm.args(freezer.ctl("restored")).spawn();
    vm.wait_for_log("the guest waits for GDB: target remote ");
    let mut gdb = Gdb::connect(&gdb_at);
    gdb.go();
    let mut guest = Shell::restored(vm);
    guest.ok("sleep 1");
    let restored = uptime(&mut guest);
    assert!(restored >= frozen + 1.0, "{frozen}, {restored}");

    let mut ctl = Ctl::connect(&freezer.path("restored"));
    ctl.done("pause");
    gdb.interrupt();
    assert_eq!(stop_of(&gdb.reply()).0, SIGINT);
    gdb.go();
    guest.ok("sleep 1");
    let before = uptime(&mut guest);
    ctl.done("pause");
    ctl.done("resume");
    let after = uptime(&mut guest);
    assert!(
        after >= before && before >= restored + 1.0,
        "{restored}, {before}, {after}"
    );
    guest.power_off();
}

/// In seconds.
fn uptime(guest: &mut Shell) -> f64 {
    let text = guest.ok("cut -d' ' -f1 /proc/uptime");
    text.trim().parse().expect("a number")
}
