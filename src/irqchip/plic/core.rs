//! The controller itself: registers, gateways, and who is interrupted.
//!
//! ```text
//! 0x00_0000 + 4 s      priority of source s        0x20_0000 + 0x1000 c      threshold of context c
//! 0x00_1000            pending, a bit a source     0x20_0004 + 0x1000 c      claim / complete
//! 0x00_2000 + 0x80 c   enables of context c
//! ```

/// Interrupt sources, 1 to this; as many as QEMU's virt machine has.
pub const SOURCES: u32 = 95;

/// Source numbers with 0, which is none.
const IDS: usize = SOURCES as usize + 1;
/// Words of a bit for each source.
const WORDS: usize = IDS.div_ceil(32);
/// Priorities and thresholds are 0 to 7: three bits.
const PRIORITY_MASK: u32 = 7;

/// What a 32-bit register is.
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
    /// Levels of the wires.
    levels: [u32; WORDS],
    /// Claimed and not yet completed: the gateway lets nothing through.
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

    /// Sets the level of the wire of `source`; other numbers than 1 to [`SOURCES`] have none.
    pub(super) fn set_level(&mut self, source: u32, high: bool) {
        if (1..=SOURCES).contains(&source) {
            let (word, bit) = place(source as usize);
            set(&mut self.levels[word], bit, high);
            self.open_gateway(word, bit);
        }
    }

    /// Whether the context's hart is interrupted: by an enabled, pending source above its
    /// threshold (section 1.6, "Priority Thresholds").
    pub(super) fn delivers(&self, context: usize) -> bool {
        let threshold = self.contexts.get(context).map_or(0, |c| c.threshold);
        self.best(context)
            .is_some_and(|source| self.priorities[source] > threshold)
    }

    /// A load of 1, 2, 4 or 8 bytes. A register's effect, a claim, happens where the load takes
    /// its lowest byte.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, shift, bytes) in words(offset, data.len()) {
            let claims = shift == 0;
            let value = self.read_word(register_at(register, self.contexts.len()), claims);
            data[bytes.clone()].copy_from_slice(&value.to_le_bytes()[shift..shift + bytes.len()]);
        }
    }

    /// A store of 1, 2, 4 or 8 bytes; what it leaves out of a register stays.
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

    /// The source that a claim of `context` gets: of the highest priority, then of the lowest
    /// number; one of priority 0 never interrupts. The threshold has no say in a claim.
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

    /// Completion of a source that the context has enabled opens its gateway; any other is
    /// ignored (section 1.8, "Interrupt Completion").
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

    /// A wire that is high passes its gateway, unless its last request is still in service. A
    /// request that has passed stays, whatever the wire does.
    fn open_gateway(&mut self, word: usize, bit: u32) {
        if self.levels[word] & bit & !self.in_service[word] != 0 {
            self.pending[word] |= bit;
        }
    }
}

/// Word and bit of a source.
fn place(source: usize) -> (usize, u32) {
    (source / 32, 1 << (source % 32))
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

/// Splits an access into the 32-bit registers it touches: the register's offset, the first of its
/// bytes that is touched, and which bytes of the access these are.
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

/// The register at a multiple of 4, for so many contexts.
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
