//! A client of GDB's remote protocol ("GDB Remote Serial Protocol" in GDB's manual).

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The time limit for a reply, on a busy emulated host.
const PATIENCE: Duration = Duration::from_secs(120);

/// One connection, with a guest of up to nine harts. Hart N is thread N + 1.
pub(crate) struct Gdb(UnixStream);

impl Gdb {
    /// Connects to the socket at `path`, which must exist. The guest is stopped then.
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("connect to rvmm's socket for GDB");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut gdb = Gdb(stream);
        let features = gdb.ask("qSupported:swbreak+;vContSupported+");
        assert!(features.contains("qXfer:features:read+"), "{features}");
        assert_eq!(gdb.ask("QStartNoAckMode"), "OK");
        gdb.send_raw(b"+");
        gdb
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("send to rvmm");
    }

    /// Sends a packet.
    pub(crate) fn send(&mut self, text: &str) {
        let sum = text.bytes().fold(0u8, u8::wrapping_add);
        self.send_raw(format!("${text}#{sum:02x}").as_bytes());
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.0.read_exact(&mut byte).expect("a reply");
        byte[0]
    }

    /// The next packet, with runs of one byte expanded.
    pub(crate) fn reply(&mut self) -> String {
        while self.byte() != b'$' {}
        let mut text = Vec::new();
        loop {
            match self.byte() {
                b'#' => break,
                b'*' => {
                    let count = usize::from(self.byte() - 29);
                    let last = *text.last().expect("a byte to repeat");
                    text.extend(std::iter::repeat_n(last, count));
                }
                byte => text.push(byte),
            }
        }
        // The checksum.
        self.byte();
        self.byte();
        String::from_utf8(text).expect("text")
    }

    /// Sends a packet, and waits for the reply.
    pub(crate) fn ask(&mut self, text: &str) -> String {
        self.send(text);
        self.reply()
    }

    /// Sends a packet whose only reply is `OK`.
    #[track_caller]
    pub(crate) fn ok(&mut self, text: &str) {
        assert_eq!(self.ask(text), "OK", "{text}");
    }

    /// Chooses the hart whose registers and memory are accessed.
    pub(crate) fn choose(&mut self, hart: usize) {
        self.ok(&format!("Hg{:x}", hart + 1));
    }

    /// A register of the chosen hart, by GDB's number.
    pub(crate) fn register(&mut self, number: usize) -> u64 {
        number_of(&self.ask(&format!("p{number:x}")))
    }

    /// The chosen hart's pc.
    pub(crate) fn pc(&mut self) -> u64 {
        self.register(32)
    }

    /// Memory of the chosen hart. None if it is not mapped.
    pub(crate) fn memory(&mut self, address: u64, length: usize) -> Option<Vec<u8>> {
        let reply = self.ask(&format!("m{address:x},{length:x}"));
        (!reply.starts_with('E')).then(|| bytes_of(&reply))
    }

    /// Sets or removes a breakpoint.
    #[track_caller]
    pub(crate) fn breakpoint(&mut self, address: u64, on: bool) {
        let letter = if on { 'Z' } else { 'z' };
        self.ok(&format!("{letter}0,{address:x},2"));
    }

    /// Lets all harts run, without waiting for a stop.
    pub(crate) fn go(&mut self) {
        self.send("vCont;c");
    }

    /// Interrupts the guest, as Ctrl-C does in GDB.
    pub(crate) fn interrupt(&mut self) {
        self.send_raw(&[3]);
    }

    /// Steps `hart`, which must then have stopped.
    #[track_caller]
    pub(crate) fn step(&mut self, hart: usize) {
        let stop = self.ask(&format!("vCont;s:{:x}", hart + 1));
        assert_eq!(stop_of(&stop), (5, hart), "{stop}");
    }

    /// Sends a command of GDB's `monitor`, and returns its output.
    pub(crate) fn monitor(&mut self, command: &str) -> String {
        self.send(&format!("qRcmd,{}", hex(command.as_bytes())));
        let mut output = Vec::new();
        loop {
            match self.reply() {
                end if end == "OK" => break,
                piece => output.extend(bytes_of(piece.strip_prefix('O').expect("output"))),
            }
        }
        String::from_utf8(output).expect("text")
    }

    /// Waits for the end of the connection.
    pub(crate) fn wait_for_end(mut self) {
        let mut rest = [0; 256];
        loop {
            match self.0.read(&mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => panic!("the connection does not end: {error}"),
            }
        }
    }
}

/// The signal and the hart of a stop reply.
#[track_caller]
pub(crate) fn stop_of(reply: &str) -> (u8, usize) {
    let signal = reply.get(1..3).filter(|_| reply.starts_with('T'));
    let signal = signal.and_then(|hex| u8::from_str_radix(hex, 16).ok());
    let thread = reply
        .split(['T', ';', ':'])
        .skip_while(|word| !word.ends_with("thread"));
    let thread = thread
        .skip(1)
        .find_map(|hex| usize::from_str_radix(hex, 16).ok());
    match (signal, thread) {
        (Some(signal), Some(thread)) => (signal, thread - 1),
        _ => panic!("no stop: {reply}"),
    }
}

/// Bytes as the protocol writes them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits
        .map(|pair| byte(pair).unwrap_or_else(|| panic!("no hex: {hex}")))
        .collect()
}

fn number_of(hex: &str) -> u64 {
    let bytes = bytes_of(hex).try_into();
    u64::from_le_bytes(bytes.unwrap_or_else(|_| panic!("no register: {hex}")))
}
