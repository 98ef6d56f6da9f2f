//! Tests that a guest with many lives cannot make rvmm log without a limit.

use std::collections::BTreeMap;
use std::time::Instant;

use log::{Log, Metadata, Record as Line};

use super::*;
use crate::config::Transport;
use crate::util::ratelimit::{BURST, PERIOD};
use crate::vcpu::Stop;

/// Counts log lines by their text, without digits.
struct Counter(Mutex<BTreeMap<String, u32>>);

static COUNTER: Counter = Counter(Mutex::new(BTreeMap::new()));

impl Log for Counter {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }
    fn log(&self, line: &Line) {
        let text = line
            .args()
            .to_string()
            .replace(|c: char| c.is_ascii_digit(), "");
        // Remove the number of suppressed lines, so that the text is the same.
        let text = text.split(" (").next().unwrap_or_default();
        let text = format!("{}: {text}", line.target());
        *lock(&self.0).entry(text).or_default() += 1;
    }
    fn flush(&self) {}
}

/// A store of 32 bits.
fn store(gpa: u64, value: u32) -> VmExit {
    let mut data = [0; 8];
    data[..4].copy_from_slice(&value.to_le_bytes());
    VmExit::MmioWrite { gpa, len: 4, data }
}

/// All unusual accesses of one life: registers that do not exist, and a driver that sets up a
/// device wrongly, again and again.
fn misbehave() -> Vec<VmExit> {
    let mut exits = Vec::new();
    for number in 0..20 {
        exits.push(VmExit::Csr {
            number: 0x100 + number,
        });
        exits.push(VmExit::MmioRead { gpa: 0x50, len: 4 });
        exits.push(store(0x60, 1));
        // Status, features 32 and up (VIRTIO_F_VERSION_1), queue 0 ready with a ring outside RAM,
        // or no queue at all, status (VIRTIO 1.2, section 4.2.2).
        let ready = (number % 2).try_into().unwrap();
        for (offset, value) in [
            (0x70, 0),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x44, ready),
            (0x70, 15),
        ] {
            exits.push(store(layout::VIRTIO_MMIO.start + offset, value));
        }
    }
    exits
}

/// Each kind of line stays within its limit, however often the guest is reset.
#[test]
fn a_guest_that_resets_for_ever_logs_no_more_than_one_that_does_not() {
    log::set_logger(&COUNTER).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let record = Record {
        life: misbehave(),
        resets: 200.into(),
        ..Record::default()
    };
    let image = file("lives-disk", &[0; 8192]);
    let config = VmConfig {
        disk: vec![format!("{},id=lives", image.display()).parse().unwrap()],
        transport: Transport::Mmio,
        ..VmConfig::default()
    };
    let began = Instant::now();
    let (_, _, machine) = build_as("lives", record, config);
    let how = Run {
        console: &ConsoleConfig::None,
        timeout: None,
        reboot: true,
        stats_from: Some(began),
        control: None,
        paused: false,
        clock: Clock::Stop,
        tracer: None,
        gdb: None,
    };
    std::fs::remove_file(image).unwrap();
    let (outcome, _) = machine.unwrap().run(&how).unwrap();
    assert_eq!(outcome, Outcome::Guest(Stop::PowerOff));
    let periods = began.elapsed().as_secs() / PERIOD.as_secs() + 2;
    let most = u64::from(BURST) * periods;
    let lines = lock(&COUNTER.0).clone();
    // Kinds of lines whose limits no other test of this process uses up.
    for text in [
        "lives needs a reset",
        "lives: its driver is ready",
        "CSR",
        "the guest runs",
    ] {
        let logged = lines.keys().any(|line| line.contains(text));
        assert!(logged, "{text}: {lines:#?}");
    }
    let parts = [
        "bus",
        "vcpu",
        "virtio::transport::core",
        "virtio::device",
        "machine",
        "irqchip",
        "devices",
    ];
    for (line, count) in lines {
        let is_ours = parts
            .iter()
            .any(|part| line.starts_with(&format!("rvmm::{part}")));
        assert!(
            !is_ours || u64::from(count) <= most,
            "{count} times {line:?}"
        );
    }
}
