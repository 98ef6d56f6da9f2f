//! The floor of a restore: a program that does as little as possible to let the guest of a snapshot
//! answer one line.
//!
//! ```text
//! restore-floor --prepare SNAPSHOT STATE
//! restore-floor STATE MEMORY [--aia]
//! ```
//!
//! The first form writes what it needs of an rvmm snapshot as records of three numbers, so that the
//! second form parses nothing. The second form creates the VM and its vCPU, maps the snapshot's RAM
//! privately, writes the registers and runs the guest. The guest's UART gets the line that is on
//! standard input, and its output goes to standard output. Nothing else is there: of the UART only
//! what Linux uses, of the PLIC only the claim of the UART's interrupt. Every other load reads 0.
#![allow(unsafe_code)]

#[cfg(target_arch = "riscv64")]
mod aia;
#[cfg(target_arch = "riscv64")]
mod guest;

#[cfg(not(target_arch = "riscv64"))]
fn main() {
    eprintln!("restore-floor: runs on riscv64 only");
}

#[cfg(target_arch = "riscv64")]
fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["--prepare", snapshot, state] => prepare::run(snapshot.as_ref(), state.as_ref()),
        [state, memory] => floor::run(state, memory, false),
        [state, memory, "--aia"] => floor::run(state, memory, true),
        _ => anyhow::bail!("restore-floor takes STATE MEMORY [--aia]"),
    }
}

/// A number of the guest's state: what it is, which one, and its value.
#[cfg(target_arch = "riscv64")]
type Record = [u64; 3];

/// A register of the vCPU, by KVM's id.
#[cfg(target_arch = "riscv64")]
const REGISTER: u64 = 0;
/// The UART's IER.
#[cfg(target_arch = "riscv64")]
const IER: u64 = 1;
/// A register of the APLIC, by its offset.
#[cfg(target_arch = "riscv64")]
const APLIC: u64 = 2;
/// A register of the IMSIC, by its number in `siselect`.
#[cfg(target_arch = "riscv64")]
const IMSIC: u64 = 3;

#[cfg(target_arch = "riscv64")]
mod prepare {
    use std::fs;
    use std::path::Path;

    use anyhow::{Context, Result, ensure};
    use rvmm::hypervisor::regs::{self, group};
    use rvmm::snapshot::directory::Snapshot;
    use rvmm::snapshot::{Parts, TimeState};
    use rvmm::vcpu::saved::VcpuState;
    use serde_json::Value;

    use super::{APLIC, IER, IMSIC, REGISTER, Record};

    /// SEIP in `sip`, which the interrupt controller sets.
    const EXTERNAL: u64 = 1 << 9;

    pub(super) fn run(snapshot: &Path, state: &Path) -> Result<()> {
        let sections = Snapshot::open(snapshot)?.sections;
        let take = |id: &str, kind: &str| {
            let of_kind = sections.iter().map(|section| (&section.id, &section.saved));
            let mut found = of_kind.filter(|(name, saved)| *name == id && saved.kind == kind);
            found.next().map(|(_, saved)| saved.clone())
        };
        let of = |id, kind| take(id, kind).with_context(|| format!("no {kind} of {id}"));
        let vcpu: VcpuState = Parts::new(vec![of("vcpu0", "vcpu")?]).take()?;
        ensure!(take("vcpu1", "vcpu").is_none(), "it has more than one vCPU");
        let mut records: Vec<Record> = Vec::new();
        for (id, bytes) in vcpu.registers() {
            let is_state = matches!(
                id.group(),
                group::CORE | group::CSR | group::FP_F | group::FP_D
            );
            if !is_state && id != regs::TIMER_COMPARE {
                continue;
            }
            ensure!(bytes.len() <= 8, "{id} is too wide");
            let value = vcpu.number(id).unwrap_or_default();
            let value = if id == regs::SIP {
                value & !EXTERNAL
            } else {
                value
            };
            records.push([REGISTER, id.0, value]);
        }
        let uart: Value = serde_json::from_slice(&of("uart", "uart16550")?.json)?;
        records.push([IER, 0, uart["ier"].as_u64().context("no IER")?]);
        if let Some(aia) = take("aia", "aia") {
            records.extend(of_aia(&serde_json::from_slice(&aia.json)?)?);
        }
        let time: TimeState = Parts::new(vec![of("machine", "time")?]).take()?;
        records.push([REGISTER, regs::TIMER_TIME.0, time.time]);
        let numbers = records.iter().flatten();
        let bytes: Vec<u8> = numbers.flat_map(|number| number.to_le_bytes()).collect();
        Ok(fs::write(state, bytes)?)
    }

    /// The registers of the APLIC and of the IMSIC, whose guest has nothing pending (AIA 1.0,
    /// sections 3.8 and 4.5).
    fn of_aia(aia: &Value) -> Result<Vec<Record>> {
        let number = |value: &Value| value.as_u64().context("no number");
        let bit = |value: &Value| value.as_bool().map(u64::from).context("no bit");
        let list = |value: &Value| value.as_array().cloned().context("no list");
        let mut records = Vec::new();
        let mut enabled = [0; 2];
        for wire in list(&aia["wires"])? {
            // Source, mode, target, enabled, pending: docs/snapshot-format.md.
            let source = number(&wire[0])?;
            ensure!(bit(&wire[4])? == 0, "a source is pending");
            enabled[usize::from(source >= 32)] |= bit(&wire[3])? << (source % 32);
            let at = 4 * (source - 1);
            records.push([APLIC, 0x4 + at, number(&wire[1])?]);
            records.push([APLIC, 0x3004 + at, number(&wire[2])?]);
        }
        records.push([APLIC, 0x1e00, enabled[0]]);
        records.push([APLIC, 0x1e04, enabled[1]]);
        let imsic = &aia["imsics"][0];
        ensure!(list(&imsic["pending"])?.is_empty(), "a message is pending");
        let mut eie = 0;
        for identity in list(&imsic["enabled"])? {
            let identity = number(&identity)?;
            // KVM loses the upper half of the words of a file that it emulates.
            ensure!(identity < 32, "identity {identity} is too large");
            eie |= 1 << identity;
        }
        records.push([IMSIC, 0x72, number(&imsic["threshold"])?]);
        records.push([IMSIC, 0xc0, eie]);
        records.push([IMSIC, 0x70, bit(&imsic["delivers"])?]);
        records.push([APLIC, 0, bit(&aia["delivers"])? << 8]);
        Ok(records)
    }
}

#[cfg(target_arch = "riscv64")]
mod floor {
    use std::fs::{self, File};
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, RawFd};

    use anyhow::{Context, Result, bail, ensure};
    use kvm_bindings::*;
    use kvm_ioctls::{Kvm, VmFd};
    use rvmm::hypervisor::RegId;
    use rvmm::machine::layout::{PLIC, UART, UART_IRQ};

    use super::guest::{self, Cpu};
    use super::{APLIC, IER, IMSIC, REGISTER, aia};

    /// KVM_INTERRUPT, `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
    const KVM_INTERRUPT: libc::Ioctl = 0x4004_ae86;
    /// The PLIC's claim register of hart 0 in supervisor mode.
    const CLAIM: u64 = PLIC.start + 0x20_1004;

    pub(super) fn run(state: &str, memory: &str, with_aia: bool) -> Result<()> {
        let records = fs::read(state)?;
        let vm = Kvm::new()?.create_vm()?;
        let aia = with_aia.then(|| aia::create(&vm)).transpose()?;
        let memory = File::open(memory)?;
        let size = usize::try_from(memory.metadata()?.len())?;
        guest::map_ram(&vm, size, memory.as_raw_fd(), 0)?;
        let cpu = Cpu::new(vm.create_vcpu(0)?);
        if let Some(aia) = &aia {
            aia::start(aia)?;
        }
        let mut uart = Uart::default();
        for record in records.chunks_exact(24) {
            let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| record[at + i]));
            let (id, value) = (number(8), number(16));
            match number(0) {
                REGISTER => {
                    let width = RegId(id).width().unwrap_or_default();
                    cpu.fd.set_one_reg(id, &value.to_le_bytes()[..width])?;
                }
                IER => uart.ier = value,
                kind @ (APLIC | IMSIC) => {
                    let aia = aia.as_ref().context("the guest has an AIA: give --aia")?;
                    let group = match kind {
                        APLIC => KVM_DEV_RISCV_AIA_GRP_APLIC,
                        _ => KVM_DEV_RISCV_AIA_GRP_IMSIC,
                    };
                    aia::set(aia, group, u32::try_from(id)?, value)?;
                }
                kind => bail!("record {kind}"),
            }
        }
        let mut line = [0; 64];
        let length = std::io::stdin().read(&mut line)?;
        uart.input = line[..length].iter().rev().copied().collect();
        let mut machine = Machine {
            vcpu: cpu.fd.as_raw_fd(),
            vm: with_aia.then_some(&vm),
            uart,
            level: false,
            claimed: false,
        };
        machine.update()?;
        machine.exits(cpu)
    }

    /// A UART as Linux uses it.
    #[derive(Default)]
    struct Uart {
        ier: u64,
        /// The typed bytes, the last one first.
        input: Vec<u8>,
        output: Vec<u8>,
        /// The first byte of the output was written at once, as by rvmm. Then it is written line by
        /// line.
        has_written: bool,
        /// The interrupt of the empty transmitter is pending.
        sent: bool,
    }

    impl Uart {
        fn read(&mut self, register: u64) -> u64 {
            let has_input = !self.input.is_empty();
            match register {
                0 => self.input.pop().unwrap_or_default().into(),
                1 => self.ier,
                2 if has_input && self.ier & 1 != 0 => 0xc4,
                2 if self.sent && self.ier & 2 != 0 => {
                    self.sent = false;
                    0xc2
                }
                2 => 0xc1,
                5 => 0x60 | u64::from(has_input),
                6 => 0xb0,
                _ => 0,
            }
        }

        fn write(&mut self, register: u64, byte: u8) -> Result<()> {
            match register {
                0 => {
                    self.sent = true;
                    self.output.push(byte);
                    if byte == b'\n' || !self.has_written {
                        let mut stdout = std::io::stdout();
                        stdout.write_all(&self.output)?;
                        stdout.flush()?;
                        self.output.clear();
                        self.has_written = true;
                    }
                }
                1 => {
                    let new = u64::from(byte);
                    self.sent |= new & !self.ier & 2 != 0;
                    self.ier = new;
                }
                _ => {}
            }
            Ok(())
        }

        fn interrupts(&self) -> bool {
            let received = self.ier & 1 != 0 && !self.input.is_empty();
            received || self.ier & 2 != 0 && self.sent
        }
    }

    struct Machine<'a> {
        vcpu: RawFd,
        /// The VM, if it has an AIA.
        vm: Option<&'a VmFd>,
        uart: Uart,
        /// The level of the UART's wire, or of the PLIC's.
        level: bool,
        /// The guest has claimed the interrupt at the PLIC.
        claimed: bool,
    }

    impl Machine<'_> {
        /// Changes the level of the wire if need be.
        fn update(&mut self) -> Result<()> {
            let high = self.uart.interrupts() && !self.claimed;
            if high == self.level {
                return Ok(());
            }
            self.level = high;
            if let Some(vm) = self.vm {
                return Ok(vm.set_irq_line(UART_IRQ, high)?);
            }
            let request = kvm_interrupt {
                irq: match high {
                    true => KVM_INTERRUPT_SET as u32,
                    false => KVM_INTERRUPT_UNSET as u32,
                },
            };
            // SAFETY: the vCPU is alive, and KVM only reads the request.
            let result = unsafe { libc::ioctl(self.vcpu, KVM_INTERRUPT, &request) };
            ensure!(
                result == 0,
                "KVM_INTERRUPT: {}",
                std::io::Error::last_os_error()
            );
            Ok(())
        }

        fn read(&mut self, gpa: u64) -> Result<u64> {
            if UART.contains(&gpa) {
                let value = self.uart.read(gpa - UART.start);
                self.update()?;
                return Ok(value);
            }
            if gpa == CLAIM && self.level {
                self.claimed = true;
                self.update()?;
                return Ok(UART_IRQ.into());
            }
            Ok(0)
        }

        fn write(&mut self, gpa: u64, byte: u8) -> Result<()> {
            if UART.contains(&gpa) {
                self.uart.write(gpa - UART.start, byte)?;
            } else if gpa == CLAIM {
                self.claimed = false;
            }
            self.update()
        }

        fn exits(&mut self, mut cpu: Cpu) -> Result<()> {
            loop {
                let run = cpu.run()?;
                let exit = &mut run.__bindgen_anon_1;
                match run.exit_reason {
                    KVM_EXIT_MMIO => {
                        // SAFETY: the member that belongs to the exit reason.
                        let mmio = unsafe { &mut exit.mmio };
                        match mmio.is_write {
                            0 => mmio.data = self.read(mmio.phys_addr)?.to_le_bytes(),
                            _ => self.write(mmio.phys_addr, mmio.data[0])?,
                        }
                    }
                    KVM_EXIT_RISCV_SBI => exit.riscv_sbi.ret = [0, 0],
                    reason => bail!("exit {reason}"),
                }
            }
        }
    }
}
