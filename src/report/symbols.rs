//! Names for a guest's addresses: the symbols of its kernel.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::ops::Range;

use elf::ElfStream;
use elf::abi::{SHN_UNDEF, STT_FUNC, STT_NOTYPE, STT_OBJECT};
use elf::endian::LittleEndian;
use thiserror::Error;

/// Why a file has no symbols that rvmm can use.
#[derive(Debug, Error)]
pub enum SymbolsError {
    /// The host could not read it.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It is an ELF without a symbol table.
    #[error("it has no symbol table: it was stripped")]
    Stripped,
    /// It is a damaged ELF.
    #[error("it is a damaged ELF file: {0}")]
    Elf(String),
    /// A line is not as in System.map.
    #[error("line {0} is no symbol: write ADDRESS TYPE NAME, as in System.map and /proc/kallsyms")]
    Line(usize),
    /// All addresses are 0.
    #[error("all its addresses are 0: copy /proc/kallsyms as root, with kptr_restrict at 0 or 1")]
    Hidden,
}

/// Symbols, in the order of their addresses.
#[derive(Debug, Default)]
pub struct Symbols {
    list: Vec<Symbol>,
    /// The trap vector as linked, if the kernel is a Linux.
    vector: Option<u64>,
    /// The running kernel is this many bytes above the addresses of the list.
    slide: u64,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Symbol {
    address: u64,
    name: Box<str>,
}

/// An address as a symbol and the distance from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a> {
    /// The symbol.
    pub symbol: &'a str,
    /// Bytes from the symbol to the address.
    pub offset: u64,
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.offset {
            0 => f.write_str(self.symbol),
            offset => write!(f, "{}+{offset:#x}", self.symbol),
        }
    }
}

impl Symbols {
    /// An address further than this from the symbol before it has no name.
    const REACH: u64 = 16 << 20;

    /// Reads the symbols of an ELF file, of System.map, or of a copy of the guest's /proc/kallsyms.
    ///
    /// # Errors
    /// Fails if `file` cannot be read, is none of these, or has no addresses.
    pub fn read(mut file: impl Read + Seek) -> Result<Self, SymbolsError> {
        let mut magic = Vec::new();
        file.by_ref()
            .take(ELF.len() as u64)
            .read_to_end(&mut magic)?;
        file.rewind()?;
        match magic == ELF {
            true => Self::read_elf(file),
            false => Self::of(of_map(file)?),
        }
    }

    /// Reads the symbols of an ELF file.
    ///
    /// # Errors
    /// Fails if `file` cannot be read, is no ELF file, or has no symbols.
    pub fn read_elf(file: impl Read + Seek) -> Result<Self, SymbolsError> {
        Self::of(of_elf(file)?)
    }

    fn of(mut symbols: Vec<Symbol>) -> Result<Self, SymbolsError> {
        if symbols.iter().all(|symbol| symbol.address == 0) {
            return Err(SymbolsError::Hidden);
        }
        symbols.sort();
        let vector = symbols.iter().find(|symbol| &*symbol.name == VECTOR);
        let vector = vector.map(|symbol| symbol.address);
        let (list, slide) = (symbols, 0);
        Ok(Self {
            list,
            vector,
            slide,
        })
    }

    /// Finds where a Linux runs that chose a random address for itself (KASLR), by its trap vector
    /// `stvec`. Does nothing for another kernel.
    pub fn follow(&mut self, stvec: u64) {
        if let Some(slide) = self.vector.and_then(|vector| slide(stvec, vector)) {
            self.slide = slide;
        }
    }

    /// The code of the function `name`.
    pub fn function(&self, name: &str) -> Option<Function> {
        let start = self.linked(name)?;
        let next = self.list.partition_point(|symbol| symbol.address <= start);
        let end = self.list.get(next)?.address;
        Some(Function {
            linked: start..end,
            vector: self.vector,
        })
    }

    /// The symbol at or before `address`. None if there is none near it.
    pub fn name(&self, address: u64) -> Option<Name<'_>> {
        let address = address.wrapping_sub(self.slide);
        let list = &self.list;
        let behind = list.partition_point(|symbol| symbol.address <= address);
        let last = list.get(behind.checked_sub(1)?)?;
        // Of several names for one address, the first.
        let first = list.partition_point(|symbol| symbol.address < last.address);
        let offset = address - last.address;
        let symbol = &list.get(first)?.name;
        (offset < Self::REACH).then_some(Name { symbol, offset })
    }

    /// The name of the function that contains the call before the return address `address`. The
    /// call may be the function's last instruction, if what it calls does not return. Then
    /// `address` belongs to the next function.
    pub fn caller(&self, address: u64) -> Option<Name<'_>> {
        let Name { symbol, offset } = self.name(address.wrapping_sub(1))?;
        let offset = offset + 1;
        Some(Name { symbol, offset })
    }

    /// The address of `name` in the running kernel.
    pub fn address(&self, name: &str) -> Option<u64> {
        let linked = self.linked(name)?;
        Some(linked.wrapping_add(self.slide))
    }

    fn linked(&self, name: &str) -> Option<u64> {
        let found = self.list.iter().find(|symbol| &*symbol.name == name);
        found.map(|symbol| symbol.address)
    }
}

/// The code of one function, in a kernel that may have moved.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its addresses as linked.
    linked: Range<u64>,
    /// The trap vector as linked, if the kernel is a Linux.
    vector: Option<u64>,
}

impl Function {
    /// Whether `address` is in the function. `stvec` is the hart's, which shows where the kernel
    /// is.
    pub fn contains(&self, stvec: u64, address: u64) -> bool {
        let slide = self.vector.and_then(|vector| slide(stvec, vector));
        let linked = address.wrapping_sub(slide.unwrap_or_default());
        self.linked.contains(&linked)
    }
}

/// The symbol of Linux' trap vector (arch/riscv/kernel/entry.S).
const VECTOR: &str = "handle_exception";

/// How far a Linux has moved, whose trap vector is linked at `vector`. None if `stvec` is not the
/// vector of that kernel.
fn slide(stvec: u64, vector: u64) -> Option<u64> {
    /// Linux moves itself by a multiple of this (setup_vm in arch/riscv/mm/init.c).
    const UNIT: u64 = 2 << 20;
    /// It stays in the last 2 GiB of the address space.
    const MOST: u64 = 2 << 30;
    // It may be below 0 if the addresses are those of another boot.
    let slide = stvec.wrapping_sub(vector);
    let is_near = stvec.abs_diff(vector) < MOST;
    (slide % UNIT == 0 && is_near).then_some(slide)
}

/// The first bytes of an ELF file.
pub const ELF: &[u8] = b"\x7fELF";

/// The longest map that is read. That of a large Linux has 10 MiB.
const MAP_MAX: u64 = 256 << 20;

/// The longest name in an ELF file that is read. Names of Rust and C++ have some hundred bytes.
const NAME_MAX: usize = 1024;

/// Reads only the file's tables: a kernel with debug information may have hundreds of MiB.
fn of_elf(file: impl Read + Seek) -> Result<Vec<Symbol>, SymbolsError> {
    let damaged = |error: elf::ParseError| SymbolsError::Elf(error.to_string());
    let mut file = ElfStream::<LittleEndian, _>::open_stream(file).map_err(damaged)?;
    let (table, names) = file
        .symbol_table()
        .map_err(damaged)?
        .ok_or(SymbolsError::Stripped)?;
    let mut symbols = Vec::new();
    for symbol in table.iter() {
        let is_named = [STT_FUNC, STT_OBJECT, STT_NOTYPE].contains(&symbol.st_symtype());
        let Ok(name) = names.get(usize::try_from(symbol.st_name).unwrap_or(0)) else {
            continue;
        };
        // Names such as $x mark code and data for disassemblers. Long names could share their bytes
        // in the file, and not in memory.
        let is_name = (1..=NAME_MAX).contains(&name.len()) && !name.starts_with('$');
        if is_named && symbol.st_shndx != SHN_UNDEF && is_name {
            let (address, name) = (symbol.st_value, name.into());
            symbols.push(Symbol { address, name });
        }
    }
    if symbols.is_empty() {
        return Err(SymbolsError::Stripped);
    }
    Ok(symbols)
}

fn of_map(file: impl Read) -> Result<Vec<Symbol>, SymbolsError> {
    let lines = BufReader::new(file.take(MAP_MAX)).split(b'\n');
    let mut symbols = Vec::new();
    for (number, line) in (1..).zip(lines) {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let mut words = line.split_ascii_whitespace();
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next())
        else {
            return Err(SymbolsError::Line(number));
        };
        let address = u64::from_str_radix(address, 16).map_err(|_| SymbolsError::Line(number))?;
        if kind.len() != 1 {
            return Err(SymbolsError::Line(number));
        }
        // Absolute symbols are numbers, such as sizes.
        if !matches!(kind, "a" | "A" | "U") && !name.starts_with('$') {
            let name = name.into();
            symbols.push(Symbol { address, name });
        }
    }
    if symbols.is_empty() {
        return Err(SymbolsError::Line(1));
    }
    Ok(symbols)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "ffffffff80002000 T _start\n\
                       ffffffff80002000 T _stext\n\
                       ffffffff80002100 t panic\n\
                       ffffffff80002100 t $xrv64i\n\
                       0000000000001000 A SIZE\n\
                       ffffffff01e80000 t probe\t[virtio_blk]\n";

    fn parse(bytes: &[u8]) -> Result<Symbols, SymbolsError> {
        Symbols::read(io::Cursor::new(bytes))
    }

    #[test]
    fn addresses_have_the_name_before_them() {
        let symbols = parse(MAP.as_bytes()).unwrap();
        let name = |address| symbols.name(address).map(|name| name.to_string());
        let base = 0xffff_ffff_8000_2000;
        assert_eq!(name(base).as_deref(), Some("_start"));
        assert_eq!(name(base + 0xfe).as_deref(), Some("_start+0xfe"));
        assert_eq!(name(base + 0x102).as_deref(), Some("panic+0x2"));
        assert_eq!(name(0xffff_ffff_01e8_0004).as_deref(), Some("probe+0x4"));
        assert_eq!(name(0x8000_0000), None, "before the first");
        // A call at the end of _start.
        let caller = |address| symbols.caller(address).map(|name| name.to_string());
        assert_eq!(caller(base + 0x100).as_deref(), Some("_start+0x100"));
        assert_eq!(caller(base + 0x104).as_deref(), Some("panic+0x4"));
        assert_eq!(caller(base), None);
        assert_eq!(name(base + 0x100 + Symbols::REACH), None, "too far");
        assert_eq!(symbols.address("panic"), Some(base + 0x100));
        assert_eq!(symbols.address("SIZE"), None);
    }

    #[test]
    fn a_kernel_that_has_moved_has_names_too() {
        let map = "ffffffff80002000 T _start\nffffffff80003000 T handle_exception\n";
        let mut symbols = parse(map.as_bytes()).unwrap();
        let linked = 0xffff_ffff_8000_3000;
        for (stvec, start) in [
            (linked, 0xffff_ffff_8000_2000_u64),
            (linked - (4 << 20), 0xffff_ffff_7fc0_2000),
            (linked + (6 << 20), 0xffff_ffff_8060_2000),
            // The vectors of another kernel: the last one stays.
            (0x8000_0000, 0xffff_ffff_8060_2000),
            (linked + 0x100, 0xffff_ffff_8060_2000),
        ] {
            symbols.follow(stvec);
            assert_eq!(symbols.address("_start"), Some(start), "{stvec:#x}");
            assert_eq!(symbols.name(start + 2).unwrap().to_string(), "_start+0x2");
        }
    }

    #[test]
    fn a_function_ends_where_the_next_symbol_begins() {
        let symbols = parse(MAP.as_bytes()).unwrap();
        let start = symbols.function("_start").unwrap();
        let base = 0xffff_ffff_8000_2000;
        assert!(start.contains(0, base) && start.contains(0, base + 0xff));
        assert!(!start.contains(0, base - 1) && !start.contains(0, base + 0x100));
        assert!(
            symbols.function("panic").is_none(),
            "the last one has no end"
        );

        let map = "ffffffff80002000 T panic\nffffffff80003000 T handle_exception\n";
        let symbols = parse(map.as_bytes()).unwrap();
        let panic = symbols.function("panic").unwrap();
        let moved = 6 << 20;
        assert!(panic.contains(base + 0x1000, base));
        assert!(panic.contains(base + 0x1000 + moved, base + moved));
        assert!(!panic.contains(base + 0x1000 + moved, base));
    }

    #[test]
    fn what_has_no_symbols_is_refused() {
        let hidden = "0000000000000000 T _start\n0000000000000000 t panic\n";
        for (bytes, reason) in [
            (&b""[..], "line 1 is no symbol"),
            (b"\xff\xfe\0", "line 1 is no symbol"),
            (b"80000000 T a\nhello\n", "line 2 is no symbol"),
            (hidden.as_bytes(), "kptr_restrict"),
            (b"\x7fELF", "a damaged ELF file"),
        ] {
            let error = parse(bytes).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
