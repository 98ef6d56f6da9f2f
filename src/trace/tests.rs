//! Traces that are written and read again.

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use serde_json::Value;

use super::read::{Filter, ReadError, print};
use super::*;
use crate::hypervisor::{SbiCall, SbiRet};

/// A file that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("rvmm-trace-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.0).unwrap()
    }

    fn printed(&self, filter: &Filter) -> String {
        let mut out = Vec::new();
        print(self.text().as_bytes(), filter, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn place(gpa: u64) -> Option<&'static str> {
    (gpa == 0x1000_0005).then_some("UART")
}

fn recorder(file: &Scratch, limit: u64) -> Recorder {
    Recorder::start(File::create(&file.0).unwrap(), ByteSize(limit), place).unwrap()
}

fn exit(hart: u32, micros: u64, exit: VmExit, entry: VmEntry) -> Event {
    Event {
        track: Track::Vcpu(hart),
        at: Instant::now(),
        time: Duration::from_micros(micros),
        what: What::Exit(exit, Some(entry)),
    }
}

fn read_uart(micros: u64) -> Event {
    let read = VmExit::MmioRead {
        gpa: 0x1000_0005,
        len: 1,
    };
    exit(0, micros, read, VmEntry::MmioRead(0x60))
}

fn events() -> Vec<Event> {
    let call = VmExit::Sbi(SbiCall {
        extension: 0x4442_434e,
        function: 0,
        args: [5, 0x8020_0000, 0, 0, 0, 0],
    });
    let answer = VmEntry::Sbi(SbiRet { error: 0, value: 5 });
    let request = Event {
        track: Track::Queue("disk0".into(), 1),
        at: Instant::now(),
        time: Duration::from_micros(2500),
        what: What::Request {
            act: "read",
            offset: 4096,
            bytes: 512,
            status: "ok",
        },
    };
    vec![
        read_uart(3),
        exit(1, 7, call, answer),
        request,
        read_uart(5),
    ]
}

#[test]
fn a_trace_is_json_and_text() {
    let file = Scratch::new("both");
    let recorder = recorder(&file, 1 << 20);
    events()
        .into_iter()
        .for_each(|event| recorder.tracer().record(event));
    assert_eq!(recorder.finish().unwrap(), 0);
    assert!(is_trace(file.text().as_bytes()));
    // As Perfetto reads it.
    let json: Value = serde_json::from_str(&file.text()).unwrap();
    let spans = json
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["ph"] == "X");
    let names: Vec<_> = spans.map(|event| event["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "MMIO read UART",
            "SBI DBCN 0",
            "request read",
            "MMIO read UART"
        ]
    );

    let text = file.printed(&Filter::default());
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0]
            .ends_with("vcpu-0       3.0 us  MMIO read UART address=0x10000005 bytes=1 value=0x60"),
        "{text}"
    );
    assert!(
        lines[1].contains("vcpu-1       7.0 us  SBI DBCN 0 args=0x5,0x80200000,0x0"),
        "{text}"
    );
    assert!(
        lines[2].contains("disk0.1      2.5 ms  request read bytes=512 offset=4096 status=ok"),
        "{text}"
    );
    let row = lines
        .iter()
        .find(|line| line.starts_with("MMIO read UART"))
        .unwrap();
    let words: Vec<&str> = row.split_whitespace().skip(3).collect();
    assert_eq!(words, ["2", "8.0", "us", "4.0", "us", "5.0", "us"]);
}

#[test]
fn a_filter_selects() {
    let file = Scratch::new("filter");
    let recorder = recorder(&file, 1 << 20);
    events()
        .into_iter()
        .for_each(|event| recorder.tracer().record(event));
    recorder.finish().unwrap();
    let events = |filter: Filter| {
        let text = file.printed(&filter);
        let events = text.lines().take_while(|line| !line.is_empty());
        events.map(str::to_owned).collect::<Vec<_>>()
    };
    let of_kind = Filter {
        kind: Some("mmio".into()),
        ..Filter::default()
    };
    assert_eq!(events(of_kind).len(), 2);
    let of_vcpu = Filter {
        vcpu: Some(1),
        ..Filter::default()
    };
    assert_eq!(events(of_vcpu).len(), 1);
    let slowest = Filter {
        slowest: Some(2),
        ..Filter::default()
    };
    let slowest = events(slowest);
    assert!(slowest[0].contains("request read") && slowest[1].contains("SBI DBCN"));
    let summary = Filter {
        summary: true,
        ..Filter::default()
    };
    assert!(events(summary)[0].starts_with("events"));
}

#[test]
fn what_does_not_fit_is_counted() {
    const EVENTS: u64 = 1000;
    let file = Scratch::new("limit");
    let recorder = recorder(&file, 4096);
    for _ in 0..EVENTS {
        recorder.tracer().record(read_uart(1));
    }
    let dropped = recorder.finish().unwrap();
    let mut length = 0;
    File::open(&file.0)
        .unwrap()
        .read_to_end(&mut Vec::new())
        .map(|read| length = read)
        .unwrap();
    assert!(length <= 4096, "{length}");
    let json: Value = serde_json::from_str(&file.text()).unwrap();
    let written = json
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["ph"] == "X");
    assert_eq!(written.count() as u64 + dropped, EVENTS);
    let text = file.printed(&Filter::default());
    assert!(
        text.ends_with(&format!("{dropped} events were dropped\n")),
        "{text}"
    );
}

#[test]
fn a_damaged_file_is_refused() {
    let printed = |text: &str| {
        let mut out = Vec::new();
        let result = print(text.as_bytes(), &Filter::default(), &mut out);
        result.map(|()| String::from_utf8(out).unwrap())
    };
    assert!(matches!(printed(""), Err(ReadError::NoTrace)));
    assert!(matches!(printed("[]"), Err(ReadError::NoTrace)));
    let begin = format!("{BEGIN}\"ph\":\"M\",\"pid\":1}},\n");
    let text = printed(&format!("{begin}{{\"name\":\"MMI")).unwrap();
    assert!(
        text.ends_with("the trace has no end: rvmm was killed\n"),
        "{text}"
    );
    assert!(matches!(
        printed(&format!("{begin}nothing\n")),
        Err(ReadError::Line(3))
    ));
    let long = format!("{begin}{}\n", "x".repeat(100_000));
    assert!(matches!(printed(&long), Err(ReadError::Line(3))));
}
