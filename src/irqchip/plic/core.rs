//! The controller itself: registers, gateways, and which contexts are interrupted.
//!
//! ```text
//! 0x00_0000 + 4 s        priority of source s
//! 0x00_1000              pending, one bit for each source
//! 0x00_2000 + 0x80 c     enables of context c, one bit for each source
//! 0x20_0000 + 0x1000 c   threshold of context c
//! 0x20_0004 + 0x1000 c   claim and complete of context c
//! ```

mod saved;

pub(super) use self::saved::PlicState;

/// The number of interrupt sources, 1 to 95, as in QEMU's virt machine.
pub const SOURCES: u32 = 95;

/// The number of source numbers. 0 is one of them, but stands for no source.
const IDS: usize = SOURCES as usize + 1;
/// The number of 32-bit words that have a bit for each source.
const WORDS: usize = IDS.div_ceil(32);
/// The bits of a priority or threshold, which are 0 to 7.
const PRIORITY_MASK: u32 = 7;

/// A 32-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Priority(usize),
    Pending(usize),
    Enable { context: usize, word: usize },
    Threshold(usize),
    Claim(usize),
    Reserved,
}

#[derive(Clone, Debug, Default)]
struct Context {
    enables: [u32; WORDS],
    threshold: u32,
}

/// The PLIC's state.
#[derive(Clone, Debug)]
pub(super) struct Core {
    priorities: [u32; IDS],
    pending: [u32; WORDS],
    /// The levels of the wires.
    levels: [u32; WORDS],
    /// Sources that are claimed and not yet completed. Their gateways pass no request.
    in_service: [u32; WORDS],
    contexts: Vec<Context>,
}

impl Core {
    pub(super) fn new(contexts: usize) -> Self {
        Self {
            priorities: [0; IDS],
            pending: [0; WORDS],
            levels: [0; WORDS],
            in_service: [0; WORDS],
            contexts: vec![Context::default(); contexts],
        }
    }

    /// Sets the level of the wire of `source`. Ignores numbers other than 1 to [`SOURCES`].
    pub(super) fn set_level(&mut self, source: u32, high: bool) {
        if (1..=SOURCES).contains(&source) {
            let (word, bit) = place(source as usize);
            set(&mut self.levels[word], bit, high);
            self.open_gateway(word, bit);
        }
    }

    /// Whether the context interrupts its hart: whether a source is pending, enabled, and of a
    /// priority above the context's threshold (section 1.6, "Priority Thresholds").
    pub(super) fn delivers(&self, context: usize) -> bool {
        let threshold = self.contexts.get(context).map_or(0, |c| c.threshold);
        self.best(context)
            .is_some_and(|source| self.priorities[source] > threshold)
    }

    /// Serves a load of 1, 2, 4 or 8 bytes. A load of the claim register is a claim only if it
    /// includes the register's lowest byte.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, shift, bytes) in words(offset, data.len()) {
            let claims = shift == 0;
            let value = self.read_word(register_at(register, self.contexts.len()), claims);
            data[bytes.clone()].copy_from_slice(&value.to_le_bytes()[shift..shift + bytes.len()]);
        }
    }

    /// Serves a store of 1, 2, 4 or 8 bytes. Bytes of a register outside the store keep their
    /// value.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, shift, bytes) in words(offset, data.len()) {
            let register = register_at(register, self.contexts.len());
            let mut value = self.read_word(register, false).to_le_bytes();
            value[shift..shift + bytes.len()].copy_from_slice(&data[bytes]);
            if shift == 0 || !matches!(register, Register::Claim(_)) {
                self.write_word(register, u32::from_le_bytes(value));
            }
        }
    }

    fn read_word(&mut self, register: Register, claims: bool) -> u32 {
        match register {
            Register::Priority(source) => self.priorities[source],
            Register::Pending(word) => self.pending[word],
            Register::Enable { context, word } => self.contexts[context].enables[word],
            Register::Threshold(context) => self.contexts[context].threshold,
            Register::Claim(context) if claims => self.claim(context),
            Register::Claim(_) | Register::Reserved => 0,
        }
    }

    fn write_word(&mut self, register: Register, value: u32) {
        match register {
            Register::Priority(source) => self.priorities[source] = value & PRIORITY_MASK,
            Register::Enable { context, word } => {
                let no_source_0 = if word == 0 { !1 } else { !0 };
                self.contexts[context].enables[word] = value & no_source_0;
            }
            Register::Threshold(context) => {
                self.contexts[context].threshold = value & PRIORITY_MASK
            }
            Register::Claim(context) => self.complete(context, value as usize),
            Register::Pending(_) | Register::Reserved => {}
        }
    }

    /// The source that a claim of `context` returns: the one with the highest priority, and of
    /// those the one with the lowest number. A source with priority 0 never interrupts. The
    /// threshold does not matter for a claim.
    fn best(&self, context: usize) -> Option<usize> {
        let enables = &self.contexts.get(context)?.enables;
        let mut best = None;
        for (word, (pending, enabled)) in self.pending.iter().zip(enables).enumerate() {
            let mut bits = pending & enabled;
            while bits != 0 {
                let source = word * 32 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let priority = self.priorities[source];
                if priority > best.map_or(0, |best| self.priorities[best]) {
                    best = Some(source);
                }
            }
        }
        best
    }

    fn claim(&mut self, context: usize) -> u32 {
        let Some(source) = self.best(context) else {
            return 0;
        };
        let (word, bit) = place(source);
        set(&mut self.pending[word], bit, false);
        set(&mut self.in_service[word], bit, true);
        u32::try_from(source).unwrap_or(0)
    }

    /// Completes `source` and opens its gateway. Ignores a source that the context has not enabled
    /// (section 1.8, "Interrupt Completion").
    fn complete(&mut self, context: usize, source: usize) {
        if source == 0 || source >= IDS {
            return;
        }
        let (word, bit) = place(source);
        if self.contexts[context].enables[word] & bit != 0 {
            set(&mut self.in_service[word], bit, false);
            self.open_gateway(word, bit);
        }
    }

    /// Makes a source pending if its wire is high, and its last request is not in service any more.
    /// It stays pending when the wire goes low.
    fn open_gateway(&mut self, word: usize, bit: u32) {
        if self.levels[word] & bit & !self.in_service[word] != 0 {
            self.pending[word] |= bit;
        }
    }
}

/// The index of a source's word, and its bit in the word.
fn place(source: usize) -> (usize, u32) {
    (source / 32, 1 << (source % 32))
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

/// Splits an access into the 32-bit registers that it touches. For each one, returns the register's
/// offset, the number of its first byte that is touched, and the range of these bytes in the
/// access.
fn words(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let byte = offset.checked_add(at as u64).filter(|_| at < len)?;
        let shift = (byte % 4) as usize;
        let count = (4 - shift).min(len - at);
        let bytes = at..at + count;
        at += count;
        Some((byte - shift as u64, shift, bytes))
    })
}

/// The register at `offset`, a multiple of 4, of a PLIC with this number of contexts.
fn register_at(offset: u64, contexts: usize) -> Register {
    let Ok(offset) = usize::try_from(offset) else {
        return Register::Reserved;
    };
    let index = offset / 4;
    let register = match offset {
        0..0x1000 => Register::Priority(index),
        0x1000..0x2000 => Register::Pending(index - 0x1000 / 4),
        0x2000..0x20_0000 => Register::Enable {
            context: (offset - 0x2000) / 0x80,
            word: index % 0x20,
        },
        _ => match offset % 0x1000 {
            0 => Register::Threshold((offset - 0x20_0000) / 0x1000),
            4 => Register::Claim((offset - 0x20_0000) / 0x1000),
            _ => Register::Reserved,
        },
    };
    let exists = match register {
        Register::Priority(source) => (1..IDS).contains(&source),
        Register::Pending(word) => word < WORDS,
        Register::Enable { context, word } => context < contexts && word < WORDS,
        Register::Threshold(context) | Register::Claim(context) => context < contexts,
        Register::Reserved => false,
    };
    if exists { register } else { Register::Reserved }
}
