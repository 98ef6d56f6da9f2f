//! What `rvmm info` reports is true.
#![cfg(target_arch = "riscv64")]

use crate::common::host::{self, Kind};
use crate::common::{Outcome, POWERED_OFF, Rvmm};
use serde_json::Value;

fn info(args: &[&str]) -> Outcome {
    let end = Rvmm::new().arg("info").args(args).run();
    end.assert_status(0);
    assert_eq!(end.log, "", "nothing on standard error");
    end
}

fn json() -> Value {
    serde_json::from_str(&info(&["--json"]).console).expect("JSON")
}

#[track_caller]
fn bug(info: &Value, name: &str) -> Value {
    let bugs = info["bugs"].as_array().expect("bugs");
    let found = bugs.iter().find(|bug| bug["name"] == name);
    found.expect("the bug is listed").clone()
}

/// The probe's result for illegal instructions matches what happens to a guest that runs one.
#[test]
fn it_knows_where_illegal_instructions_go() {
    let lost = bug(&json(), "lost-illegal")["present"].as_bool();
    let end = Rvmm::guest("illegal").run();
    let traps = end.console.contains("csr write: trap cause=2\n");
    assert_eq!(lost, Some(!traps), "{}", end.console);
}

#[test]
fn it_knows_the_host() {
    let info = json();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the release");
    assert_eq!(info["kernel"], release.trim());
    match host::kind() {
        Kind::NoAia => assert_eq!(info["aia"], Value::Null),
        kind => {
            assert_eq!(info["aia"]["guest_files"], kind == Kind::Aia);
            let kept = host::imsic_enables_kept(1 << 40);
            assert_eq!(bug(&info, "imsic-upper-half")["present"], kept == 0);
        }
    }
    assert!(info["max_vcpus"].as_u64() >= Some(8));
    assert_eq!(info["kvm"]["ONE_REG"], 1);
    assert!(info["hart"]["timebase"].as_u64() > Some(0));
}

#[test]
fn the_text_has_the_same() {
    let end = info(&[]);
    for part in [
        "G-stage",
        "Legacy SBI",
        "Huge pages",
        "imsic-upper-half",
        "IRQFD",
    ] {
        assert!(end.console.contains(part), "{part}");
    }
}

/// An extension that can be switched off is off then. One that cannot is refused, and the message
/// says what to do instead.
#[test]
fn extensions_go_as_it_says() {
    let info = json();
    let extensions = info["hart"]["extensions"].as_array().expect("extensions");
    let find = |can: bool| {
        // f and d depend on each other and Linux needs them. Any other letter will do.
        let named =
            |e: &&Value| e["can_be_off"] == can && e["name"].as_str().is_some_and(|n| n.len() > 2);
        let found = extensions.iter().find(named).expect("one of each");
        found["name"].as_str().expect("a name").to_owned()
    };
    let (goes, stays) = (find(true), find(false));
    let isa = |cpu: &str| {
        let dir = crate::common::files::TempDir::new();
        let dtb = dir.path().join("dtb");
        let end = Rvmm::guest("shutdown")
            .args(["--cpu", cpu, "--dump-dtb"])
            .arg(&dtb)
            .run();
        end.assert_status(POWERED_OFF);
        let bytes = std::fs::read(&dtb).expect("the tree");
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let with = |name: &str| format!("_{name}");
    assert!(!isa(&format!("{goes}=off")).contains(&with(&goes)));
    assert!(!isa(&format!("{stays}=hidden")).contains(&with(&stays)));
    let end = Rvmm::guest("shutdown")
        .args(["--cpu", &format!("{stays}=off")])
        .run();
    end.assert_status(crate::common::HOST_FAILED);
    assert!(end.log.contains(&format!("{stays}=hidden")), "{}", end.log);
    let end = Rvmm::guest("shutdown").args(["--cpu", "zzz=off"]).run();
    assert!(end.log.contains("no such ISA extension"), "{}", end.log);
}

/// The guest prints through DBCN. With DBCN off it cannot print, and reports a failure.
#[test]
fn sbi_extensions_go() {
    let end = Rvmm::guest("idle")
        .args(["--sbi", "dbcn=off", "--timeout", "30s"])
        .run();
    end.assert_status(crate::common::GUEST_FAILED);
    assert_eq!(end.console, "");
    let end = Rvmm::guest("shutdown").args(["--sbi", "base=off"]).run();
    assert!(end.log.contains("no such SBI extension"), "{}", end.log);
}

#[test]
fn ids_are_the_guests() {
    let args = [
        "--cpu",
        "mvendorid=0x489,marchid=0x8000000000000007,mimpid=0x20181004",
    ];
    let end = Rvmm::guest("ids").args(args).run();
    end.assert_console(
        POWERED_OFF,
        &["mvendorid=489 marchid=8000000000000007 mimpid=20181004"],
    );
}
