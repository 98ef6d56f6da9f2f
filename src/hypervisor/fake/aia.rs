//! A fake AIA: its APLIC and its IMSICs behave like those of `arch/riscv/kvm/aia_aplic.c` and
//! `aia_imsic.c`, as far as a save and a load can see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use vm_memory::GuestAddress;

use super::{Steps, refused};
use crate::hypervisor::{Aia, AiaConfig, AiaMode, MsiMessage, Result};
use crate::util::sync::lock;

/// The number of interrupt identities of this host's files.
const IDENTITIES: u32 = 255;

/// Registers of an IMSIC, by their numbers in `siselect`.
const EIDELIVERY: u64 = 0x70;
const EIP0: u64 = 0x80;
const EIE0: u64 = 0xc0;
const EIE_END: u64 = 0x100;
/// The half of a word that a lossy file has.
const LOW: u64 = 0xffff_ffff;

/// A fake AIA. A clone refers to the same AIA.
#[derive(Clone, Default)]
pub(crate) struct FakeAia {
    /// Whether the host has guest interrupt files.
    pub(crate) has_guest_files: bool,
    /// Whether the emulated files lose the upper half of a word.
    pub(crate) is_lossy: bool,
    /// The harts that have a guest interrupt file. Those never lose anything.
    pub(crate) files: Arc<Mutex<BTreeSet<u32>>>,
    /// The registers of the IMSICs, by hart and number.
    pub(crate) imsics: Arc<Mutex<BTreeMap<(u32, u64), u64>>>,
    /// The number of identities, once it is set.
    pub(crate) identities: Arc<Mutex<Option<u32>>>,
    pub(crate) aplic: Arc<Mutex<Aplic>>,
    /// The addresses of the IMSICs, by hart.
    pub(crate) places: Arc<Mutex<BTreeMap<u32, u64>>>,
    pub(crate) steps: Steps,
}

impl FakeAia {
    fn step(&self, step: String) -> Result<()> {
        lock(&self.steps).push(step);
        Ok(())
    }

    fn identities(&self) -> u32 {
        lock(&self.identities).unwrap_or(IDENTITIES)
    }

    fn loses(&self, hart: u32) -> bool {
        self.is_lossy && !lock(&self.files).contains(&hart)
    }

    /// Sets the input of an APLIC's source, as KVM_IRQ_LINE does.
    pub(super) fn set_input(&self, source: u32, high: bool) {
        let sent = lock(&self.aplic).set_input(source, high);
        self.send(sent);
    }

    /// Takes a message, as KVM_SIGNAL_MSI does.
    pub(super) fn receive(&self, message: MsiMessage) -> Result<()> {
        let hart = lock(&self.places)
            .iter()
            .find_map(|(hart, place)| (*place == message.address).then_some(*hart));
        if let Some(hart) = hart {
            if message.data == 0 || message.data > self.identities() {
                return Err(refused("send a message", Errno::INVAL));
            }
            self.pend(hart, message.data);
        }
        Ok(())
    }

    /// Sets the whole pending bit, also in a lossy file.
    fn pend(&self, hart: u32, identity: u32) {
        let select = EIP0 + 2 * u64::from(identity / 64);
        *lock(&self.imsics).entry((hart, select)).or_default() |= 1 << (identity % 64);
    }

    /// Delivers what the APLIC sends: the values of `target`.
    fn send(&self, targets: Vec<u32>) {
        for target in targets {
            let (hart, identity) = (target >> 18, target & 0x7ff);
            let is_there = lock(&self.places).contains_key(&hart);
            if is_there && (1..=self.identities()).contains(&identity) {
                self.pend(hart, identity);
            }
        }
    }

    /// The bits of a register that a write can change.
    fn writable(&self, select: u64) -> Result<u64> {
        let words = 2 * u64::from(self.identities().div_ceil(64));
        match select {
            EIDELIVERY => Ok(1),
            EIP0 | EIE0 => Ok(!1),
            EIP0..EIE_END if select % 2 == 0 && (select - EIP0) % (EIE0 - EIP0) < words => Ok(!0),
            EIP0..EIE_END => Err(refused("access an IMSIC", Errno::INVAL)),
            _ => Ok(0x7ff),
        }
    }
}

impl Aia for FakeAia {
    fn set_config(&self, attr: AiaConfig, value: u32) -> Result<()> {
        let is_auto = attr == AiaConfig::Mode && value == AiaMode::Auto as u32;
        if is_auto && !self.has_guest_files {
            return Err(refused("set the mode", Errno::INVAL));
        }
        if attr == AiaConfig::Ids {
            if value % 64 != 63 || value > IDENTITIES {
                return Err(refused("set the identities", Errno::INVAL));
            }
            *lock(&self.identities) = Some(value);
        }
        self.step(format!("{attr:?} = {value}"))
    }
    fn config(&self, _: AiaConfig) -> Result<u32> {
        Ok(self.identities())
    }
    fn place_aplic(&self, base: GuestAddress) -> Result<()> {
        self.step(format!("APLIC at {:#x}", base.0))
    }
    fn place_imsic(&self, index: u32, base: GuestAddress) -> Result<()> {
        lock(&self.places).insert(index, base.0);
        self.step(format!("IMSIC {index} at {:#x}", base.0))
    }
    fn init(&self) -> Result<()> {
        self.step("init".into())
    }
    fn imsic(&self, hart: u32, select: u64) -> Result<u64> {
        self.writable(select)?;
        let value = lock(&self.imsics).get(&(hart, select)).copied();
        let value = value.unwrap_or_default();
        // lr.w: the lower half, with copies of its highest bit above.
        let sign = if value & (1 << 31) != 0 { !LOW } else { 0 };
        let low = (value & LOW) | sign;
        Ok(if self.loses(hart) { low } else { value })
    }
    fn set_imsic(&self, hart: u32, select: u64, value: u64) -> Result<()> {
        let mut changes = self.writable(select)?;
        if self.loses(hart) {
            changes &= LOW;
        }
        let mut imsics = lock(&self.imsics);
        let kept = imsics.entry((hart, select)).or_default();
        *kept = (*kept & !changes) | (value & changes);
        Ok(())
    }
    fn aplic(&self, offset: u32) -> Result<u32> {
        lock(&self.aplic).read(offset)
    }
    fn set_aplic(&self, offset: u32, value: u32) -> Result<()> {
        self.step(format!("APLIC {offset:#x} = {value:#x}"))?;
        let sent = lock(&self.aplic).write(offset, value)?;
        self.send(sent);
        Ok(())
    }
}

/// The APLIC of `aia_aplic.c`.
pub(crate) struct Aplic {
    delivers: bool,
    /// By number. Source 0 does not exist.
    sources: [Source; 64],
}

impl Default for Aplic {
    fn default() -> Self {
        Self {
            delivers: false,
            sources: [Source::default(); 64],
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Source {
    mode: u32,
    target: u32,
    input: bool,
    enabled: bool,
    pending: bool,
}

const EDGE_RISE: u32 = 4;
const EDGE_FALL: u32 = 5;
const LEVEL_HIGH: u32 = 6;
const LEVEL_LOW: u32 = 7;

impl Source {
    /// A write of 1 to the source's bit of `setip`.
    fn set_pending(&mut self) {
        self.pending |= match self.mode {
            0 => false,
            LEVEL_HIGH => self.input,
            LEVEL_LOW => !self.input,
            _ => true,
        };
    }
}

impl Aplic {
    /// Makes a source pending without a message, as KVM does if the source is raised while a hart
    /// sets `domaincfg.IE`.
    pub(crate) fn miss(&mut self, source: usize) {
        self.sources[source].pending = true;
    }

    fn set_input(&mut self, source: u32, high: bool) -> Vec<u32> {
        let source = &mut self.sources[source as usize];
        source.pending |= match source.mode {
            EDGE_RISE => high && !source.input,
            EDGE_FALL => !high && source.input,
            LEVEL_HIGH => high,
            LEVEL_LOW => !high,
            _ => false,
        };
        source.input = high;
        self.send()
    }

    /// Takes the pending bits of enabled sources, and returns their targets.
    fn send(&mut self) -> Vec<u32> {
        let mut targets = Vec::new();
        for source in &mut self.sources {
            if self.delivers && source.enabled && source.pending {
                source.pending = false;
                targets.push(source.target);
            }
        }
        targets
    }

    fn read(&self, offset: u32) -> Result<u32> {
        let word = |first: u32, bit: fn(&Source) -> bool| {
            let sources = self.sources.iter().skip(8 * (offset - first) as usize);
            let bits = sources.take(32).map(bit).enumerate();
            bits.fold(0, |word, (at, bit)| word | (u32::from(bit) << at))
        };
        Ok(match offset {
            0 => 0x8000_0004 | (u32::from(self.delivers) << 8),
            4..0x100 => self.sources[(offset / 4) as usize].mode,
            0x1c00..0x1c08 => word(0x1c00, |source| source.pending),
            0x1e00..0x1e08 => word(0x1e00, |source| source.enabled),
            0x3004..0x3100 => self.sources[((offset - 0x3000) / 4) as usize].target,
            _ => return Err(refused("read the APLIC", Errno::NODEV)),
        })
    }

    fn write(&mut self, offset: u32, value: u32) -> Result<Vec<u32>> {
        match offset {
            0 => self.delivers = value & 0x100 != 0,
            4..0x100 => {
                let is_delegated = value & 0x400 != 0;
                let mode = if is_delegated { 0 } else { value & 7 };
                self.sources[(offset / 4) as usize].mode = mode;
            }
            0x1c00..0x1c08 | 0x1e00..0x1e08 => {
                let first = 8 * (offset & 0xff) as usize;
                for (at, source) in self.sources.iter_mut().enumerate().skip(1) {
                    let here = (first..first + 32).contains(&at);
                    let is_set = here && value & (1 << (at - first)) != 0;
                    match offset {
                        _ if !is_set => {}
                        0x1c00..0x1c08 => source.set_pending(),
                        _ => source.enabled = true,
                    }
                }
            }
            0x3004..0x3100 => {
                self.sources[((offset - 0x3000) / 4) as usize].target = value & !0x800;
            }
            _ => return Err(refused("write the APLIC", Errno::NODEV)),
        }
        Ok(self.send())
    }
}
