//! Ctrl-A on a terminal: escape sequences for keys that are for rvmm, not for the guest.

/// What a typed byte means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A byte for the guest.
    Byte(u8),
    /// No meaning: the start of an escape sequence, or an unknown one.
    Held,
    /// Ctrl-A X: end the VM.
    Leave,
    /// Ctrl-A R: report what the guest's harts are doing.
    Report,
    /// Ctrl-A H or Ctrl-A ?: show the help.
    Help,
    /// Ctrl-A P, in debug builds: panic, to test what a panic leaves behind.
    #[cfg(debug_assertions)]
    Panic,
}

/// The help that Ctrl-A H shows.
pub const HELP: &str = "Ctrl-A X ends rvmm, Ctrl-A R reports what the guest's harts are doing, \
                        Ctrl-A Ctrl-A sends one Ctrl-A, Ctrl-A H shows this";

const CTRL_A: u8 = 1;

/// Remembers whether the last byte was Ctrl-A.
#[derive(Debug, Default)]
pub struct Escape {
    held: bool,
}

impl Escape {
    /// Returns the meaning of the next typed byte. An unknown byte after Ctrl-A is dropped,
    /// together with the Ctrl-A.
    pub fn key(&mut self, byte: u8) -> Key {
        let held = std::mem::take(&mut self.held);
        match (held, byte) {
            (false, CTRL_A) => {
                self.held = true;
                Key::Held
            }
            (false, _) | (true, CTRL_A) => Key::Byte(byte),
            (true, b'x' | b'X') => Key::Leave,
            (true, b'r' | b'R') => Key::Report,
            (true, b'h' | b'H' | b'?') => Key::Help,
            #[cfg(debug_assertions)]
            (true, b'p' | b'P') => Key::Panic,
            (true, _) => Key::Held,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_terminal() {
        let mut escape = Escape::default();
        let mut keys = |bytes: &[u8]| bytes.iter().map(|b| escape.key(*b)).collect::<Vec<_>>();
        assert_eq!(keys(b"a\x03"), [Key::Byte(b'a'), Key::Byte(3)]);
        assert_eq!(
            keys(b"\x01\x01a"),
            [Key::Held, Key::Byte(1), Key::Byte(b'a')]
        );
        assert_eq!(keys(b"\x01h"), [Key::Held, Key::Help]);
        assert_eq!(keys(b"\x01r"), [Key::Held, Key::Report]);
        assert_eq!(keys(b"\x01qx"), [Key::Held, Key::Held, Key::Byte(b'x')]);
        assert_eq!(keys(b"\x01"), [Key::Held]);
        assert_eq!(keys(b"X"), [Key::Leave]);
    }
}
