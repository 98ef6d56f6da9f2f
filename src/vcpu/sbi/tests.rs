use super::*;
use crate::config::MemConfig;
use crate::devices::console::INPUT_CAPACITY;
use crate::memory;
use crate::util::ByteSize;

const BASE: u64 = 0x8000_0000;
const SIZE: u64 = 1 << 20;
const END: u64 = BASE + SIZE;

fn sbi() -> Sbi {
    let ram = memory::create(
        GuestAddress(BASE),
        MemConfig::new(ByteSize(SIZE)),
        memory::Backing::Private,
    )
    .unwrap();
    Sbi::new(ram, Arc::new(Console::default()))
}

impl Sbi {
    fn dbcn(&self, function: u64, args: [u64; 3]) -> (i64, u64) {
        let [a0, a1, a2] = args;
        let ret = self.call(SbiCall {
            extension: DBCN,
            function,
            args: [a0, a1, a2, 3, 4, 5],
        });
        (ret.error, ret.value)
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn output(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.console.close();
        self.console.take_output(&mut bytes);
        bytes
    }
}

fn legacy_call(extension: u64, a0: u64) -> SbiCall {
    SbiCall {
        extension,
        function: 77,
        args: [a0, 0x1111, 0, 0, 0, 0],
    }
}

#[test]
fn dbcn_writes_what_lies_in_ram() {
    let sbi = sbi();
    sbi.put(BASE + 5, b"hello");
    sbi.put(END - 3, b"end");
    assert_eq!(sbi.dbcn(DBCN_WRITE, [5, BASE + 5, 0]), (0, 5));
    assert_eq!(sbi.dbcn(DBCN_WRITE, [3, END - 3, 0]), (0, 3));
    assert_eq!(
        sbi.dbcn(DBCN_WRITE_BYTE, [u64::from(b'!') | 0xff00, 9, 9]),
        (0, 0)
    );
    assert_eq!(sbi.output(), b"helloend!");
}

#[test]
fn dbcn_checks_the_whole_range() {
    let sbi = sbi();
    sbi.console.type_input(b"secret");
    let hostile = [
        [1, 0, 0],
        [8, BASE - 1, 0],
        [1, BASE - 1, 0],
        [1, END, 0],
        [2, END - 1, 0],
        [SIZE + 1, BASE, 0],
        [u64::MAX, BASE, 0],
        [u64::MAX - BASE + 1, BASE, 0],
        [u64::MAX - BASE + 2, BASE, 0],
        [1, u64::MAX, 0],
        [1 << 63, 1 << 63, 0],
        [1, BASE, 1],
        [0, BASE, u64::MAX],
    ];
    for args in hostile {
        assert_eq!(sbi.dbcn(DBCN_WRITE, args), (INVALID_PARAM, 0), "{args:x?}");
        assert_eq!(sbi.dbcn(DBCN_READ, args), (INVALID_PARAM, 0), "{args:x?}");
    }
    assert_eq!(sbi.console.input_len(), 6);
    assert_eq!(sbi.output(), b"");
}

#[test]
fn an_empty_range_is_fine() {
    let sbi = sbi();
    assert_eq!(sbi.dbcn(DBCN_WRITE, [0, 0, 0]), (0, 0));
    assert_eq!(sbi.dbcn(DBCN_READ, [0, BASE, 0]), (0, 0));
}

#[test]
fn a_full_console_makes_writes_short() {
    let sbi = sbi();
    let room = OUTPUT_CAPACITY as u64;
    assert_eq!(sbi.dbcn(DBCN_WRITE, [room - 10, BASE, 0]), (0, room - 10));
    assert_eq!(sbi.dbcn(DBCN_WRITE, [SIZE, BASE, 0]), (0, 10));
    assert_eq!(sbi.dbcn(DBCN_WRITE, [1, BASE, 0]), (0, 0));
    assert_eq!(sbi.dbcn(DBCN_WRITE_BYTE, [0, 0, 0]), (FAILED, 0));
    assert_eq!(sbi.call(legacy_call(LEGACY_PUTCHAR, 0)).error, FAILED);
}

#[test]
fn dbcn_reads_what_was_typed() {
    let sbi = sbi();
    assert_eq!(sbi.dbcn(DBCN_READ, [10, BASE, 0]), (0, 0));
    let typed = vec![b'k'; INPUT_CAPACITY];
    sbi.console.type_input(&typed);
    assert_eq!(sbi.dbcn(DBCN_READ, [3, BASE, 0]), (0, 3));
    let rest = INPUT_CAPACITY as u64 - 3;
    assert_eq!(sbi.dbcn(DBCN_READ, [SIZE - 3, BASE + 3, 0]), (0, rest));
    let mut got = vec![0; INPUT_CAPACITY + 1];
    sbi.ram.read_slice(&mut got, GuestAddress(BASE)).unwrap();
    assert_eq!(got[..INPUT_CAPACITY], typed);
    assert_eq!(got[INPUT_CAPACITY], 0);
}

#[test]
fn what_is_read_is_marked() {
    let sbi = sbi();
    let log = memory::dirty_log(&sbi.ram);
    log.start().unwrap();
    sbi.console.type_input(&[b'k'; 300]);
    assert_eq!(sbi.dbcn(DBCN_READ, [300, BASE + 0x3f00, 0]), (0, 300));
    assert_eq!(memory::pages_of(&log.take()).collect::<Vec<_>>(), [3, 4]);
    // Nothing was typed, so the read is empty. A write does not change guest RAM.
    assert_eq!(sbi.dbcn(DBCN_READ, [300, BASE, 0]), (0, 0));
    assert_eq!(sbi.dbcn(DBCN_WRITE, [300, BASE, 0]), (0, 300));
    assert_eq!(memory::pages_of(&log.take()).count(), 0);
}

#[test]
fn legacy_calls_preserve_a1() {
    let sbi = sbi();
    let answer = |extension, a0| {
        let ret = sbi.call(legacy_call(extension, a0));
        assert_eq!(ret.value, 0x1111);
        ret.error
    };
    assert_eq!(answer(LEGACY_PUTCHAR, u64::from(b'p') | (1 << 40)), 0);
    assert_eq!(answer(LEGACY_GETCHAR, 0), FAILED);
    sbi.console.type_input(&[0xff]);
    assert_eq!(answer(LEGACY_GETCHAR, 0), 0xff);
    assert_eq!(sbi.output(), b"p");
}

#[test]
fn no_extension_is_there_to_be_probed() {
    let call = SbiCall {
        extension: BASE_EXTENSION,
        function: BASE_PROBE_EXTENSION,
        args: [0x0900_0000, 0, 0, 0, 0, 0],
    };
    assert_eq!(sbi().call(call), SbiRet { error: 0, value: 0 });
}

#[test]
fn what_is_unknown_is_not_supported() {
    let sbi = sbi();
    for (extension, function) in [
        (DBCN, 3),
        (DBCN, u64::MAX),
        (0, 0),
        (3, 0),
        (0x10, 4),
        (0x0800_0001, 0),
        (0x0bad_beef, 0),
        (u64::MAX, u64::MAX),
    ] {
        let call = SbiCall {
            extension,
            function,
            args: [u64::MAX; 6],
        };
        assert_eq!(
            sbi.call(call),
            SbiRet {
                error: NOT_SUPPORTED,
                value: 0
            }
        );
    }
}
