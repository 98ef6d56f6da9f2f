//! Copies the device tree of this kernel for the next one.

use std::fs::File;
use std::io::Read;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use vm_fdt::FdtWriter;

/// New values in `/chosen`.
pub(crate) struct Chosen<'a> {
    pub(crate) cmdline: &'a str,
    pub(crate) initrd: Range<u64>,
    /// More ranges, by their properties' names.
    pub(crate) ranges: Vec<(&'a str, Range<u64>)>,
}

/// Properties of `/chosen` that are only for one boot.
const OF_ONE_BOOT: &[&str] = &[
    "bootargs",
    "linux,initrd-start",
    "linux,initrd-end",
    "linux,usable-memory-range",
    "linux,elfcorehdr",
    "rng-seed",
];

/// Returns `blob` with this `/chosen`, and everything else unchanged.
pub(crate) fn rewrite(blob: &[u8], chosen: &Chosen) -> Result<Vec<u8>> {
    let mut tokens = Tokens::of(blob)?;
    let mut fdt = FdtWriter::new()?;
    let mut open = Vec::new();
    let mut in_chosen = false;
    loop {
        match tokens.next()? {
            Token::Begin(name) => {
                open.push(fdt.begin_node(name)?);
                in_chosen = open.len() == 2 && name == "chosen";
                if in_chosen {
                    chosen.write(&mut fdt)?;
                }
            }
            Token::Property(name, _) if in_chosen && OF_ONE_BOOT.contains(&name) => {}
            Token::Property(name, value) => fdt.property(name, value)?,
            Token::EndNode => {
                fdt.end_node(open.pop().context("a node ends that never began")?)?;
                in_chosen = false;
            }
            Token::End => return Ok(fdt.finish()?),
        }
    }
}

impl Chosen<'_> {
    fn write(&self, fdt: &mut FdtWriter) -> Result<()> {
        fdt.property_string("bootargs", self.cmdline)?;
        fdt.property_u64("linux,initrd-start", self.initrd.start)?;
        fdt.property_u64("linux,initrd-end", self.initrd.end)?;
        for (name, Range { start, end }) in &self.ranges {
            fdt.property_array_u64(name, &[*start, end - start])?;
        }
        let mut seed = [0; 64];
        File::open("/dev/urandom")?.read_exact(&mut seed)?;
        fdt.property("rng-seed", &seed)?;
        Ok(())
    }
}

/// Devicetree Specification 0.4, section 5.4.1.
enum Token<'a> {
    Begin(&'a str),
    Property(&'a str, &'a [u8]),
    EndNode,
    End,
}

/// A reader of the structure block, from front to back.
struct Tokens<'a> {
    rest: &'a [u8],
    strings: &'a [u8],
}

impl<'a> Tokens<'a> {
    fn of(blob: &'a [u8]) -> Result<Self> {
        const MAGIC: u32 = 0xd00d_feed;
        ensure!(word(&mut &*blob)? == MAGIC, "no device tree");
        let [structure, strings, reserved] =
            [offset(blob, 8)?, offset(blob, 12)?, offset(blob, 16)?];
        let from = |at: usize| blob.get(at..).context("the device tree is cut off");
        // rvmm reserves nothing. Reservations of other VMMs would be lost here.
        ensure!(
            from(reserved)?.starts_with(&[0; 16]),
            "the device tree reserves RAM"
        );
        Ok(Self {
            rest: from(structure)?,
            strings: from(strings)?,
        })
    }

    fn next(&mut self) -> Result<Token<'a>> {
        loop {
            return Ok(match word(&mut self.rest)? {
                1 => {
                    let name = text(self.rest)?;
                    take(&mut self.rest, name.len() + 1)?;
                    Token::Begin(name)
                }
                2 => Token::EndNode,
                3 => {
                    let length = usize::try_from(word(&mut self.rest)?)?;
                    let name = usize::try_from(word(&mut self.rest)?)?;
                    let name = self.strings.get(name..).context("a property's name")?;
                    Token::Property(text(name)?, take(&mut self.rest, length)?)
                }
                // Linux replaces rng-seed.
                4 => continue,
                9 => Token::End,
                other => bail!("the device tree has a token {other}"),
            });
        }
    }
}

/// An offset in the header, section 5.2.
fn offset(blob: &[u8], at: usize) -> Result<usize> {
    let mut field = blob.get(at..).unwrap_or_default();
    Ok(usize::try_from(word(&mut field)?)?)
}

fn word(rest: &mut &[u8]) -> Result<u32> {
    Ok(u32::from_be_bytes(take(rest, 4)?.try_into()?))
}

/// Skips so many bytes, and the padding to a word.
fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8]> {
    let (bytes, behind) = rest
        .split_at_checked(length.next_multiple_of(4))
        .context("the device tree ends early")?;
    *rest = behind;
    Ok(&bytes[..length])
}

/// A text that ends with NUL.
fn text(bytes: &[u8]) -> Result<&str> {
    let end = bytes.iter().position(|&byte| byte == 0);
    let end = end.context("a name without an end")?;
    Ok(std::str::from_utf8(&bytes[..end])?)
}
