//! The report as text for people.

use std::fmt;

use super::{ExtensionInfo, Info};

/// Width of a list of names, in columns.
const WIDTH: usize = 76;

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rvmm {} on Linux {}", self.rvmm, self.kernel)?;
        writeln!(f)?;
        self.host(f)?;
        writeln!(f)?;
        self.extensions(f)?;
        writeln!(f, "Known bugs of KVM:")?;
        for bug in &self.bugs {
            let found = match bug.present {
                Some(true) => "FOUND",
                Some(false) => "not here",
                None => "does not apply",
            };
            writeln!(f, "  {:<20} {found}: {}", bug.name, bug.meaning)?;
        }
        writeln!(f, "\nKVM's capabilities:")?;
        for (name, value) in &self.kvm {
            writeln!(f, "  {name:<28} {value}")?;
        }
        Ok(())
    }
}

impl Info {
    /// What guests get of this host, a line for each.
    fn host(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        row(
            f,
            "G-stage",
            format_args!(
                "{}, {}-bit guest-physical addresses",
                self.g_stage, self.gpa_bits
            ),
        )?;
        row(
            f,
            "vCPUs",
            format_args!("at most {} per guest", self.max_vcpus),
        )?;
        match &self.aia {
            Some(aia) => {
                let files = if aia.guest_files {
                    "with"
                } else {
                    "emulated, without"
                };
                let identities = aia.identities;
                row(
                    f,
                    "Interrupts",
                    format_args!("AIA, {files} guest interrupt files; {identities} identities"),
                )?;
            }
            None => row(f, "Interrupts", format_args!("no AIA: guests get a PLIC"))?,
        }
        let hart = &self.hart;
        row(f, "Guest's harts", format_args!("{}", hart.isa))?;
        row(
            f,
            "",
            format_args!("{}, timebase {} Hz", hart.mmu, hart.timebase),
        )?;
        let console = if self.legacy_sbi_console {
            "reach rvmm"
        } else {
            "do not reach rvmm: guests need DBCN or the UART"
        };
        row(f, "Legacy SBI", format_args!("console calls {console}"))?;
        let transparent = self.hugepages.transparent.as_deref().unwrap_or("none");
        row(f, "Huge pages", format_args!("transparent: {transparent}"))?;
        for pool in &self.hugepages.reserved {
            row(
                f,
                "",
                format_args!("{} reserved: {}, {} free", pool.size, pool.total, pool.free),
            )?;
        }
        Ok(())
    }

    fn extensions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (isa, sbi) = (&self.hart.extensions, &self.sbi);
        let off = "ISA extensions that --cpu NAME=off turns off";
        list(f, off, isa, |e| e.can_be_off)?;
        let on = "ISA extensions that are always on";
        list(f, on, isa, |e| !e.can_be_off)?;
        let off = "SBI extensions that --sbi NAME=off turns off";
        list(f, off, sbi, |e| e.on && e.can_be_off)?;
        let on = "SBI extensions that are always on";
        list(f, on, sbi, |e| e.on && !e.can_be_off)?;
        list(f, "SBI extensions that are off", sbi, |e| !e.on)
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: fmt::Arguments) -> fmt::Result {
    writeln!(f, "{name:<14} {value}")
}

fn list(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    extensions: &[ExtensionInfo],
    wanted: impl Fn(&ExtensionInfo) -> bool,
) -> fmt::Result {
    let names: Vec<&str> = extensions
        .iter()
        .filter(|e| wanted(e))
        .map(|e| e.name)
        .collect();
    if names.is_empty() {
        return writeln!(f, "{title}: none\n");
    }
    writeln!(f, "{title}:")?;
    let mut line = String::from(" ");
    for name in names {
        if line.len() + name.len() > WIDTH {
            writeln!(f, "{line}")?;
            line = String::from(" ");
        }
        line.push(' ');
        line.push_str(name);
    }
    writeln!(f, "{line}\n")
}
