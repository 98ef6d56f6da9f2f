//! The program's own code in memory.

use std::fs;
use std::io;

use rustix::mm::{Advice, madvise};

/// Lets go of the program's code: what is used again comes back, from the page cache, a few pages
/// at a time. For once the guest runs: parsing, building and loading are most of rvmm's code, and
/// are over.
///
/// # Errors
/// The host does not tell where the code is, or refused.
#[allow(unsafe_code)]
pub fn release() -> io::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let here = release as *const () as usize;
    let (start, end) = find(&maps, here).ok_or(io::ErrorKind::NotFound)?;
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is a mapping of a file that nobody may write to, in memory or, while it
    // runs, on disk: the same bytes come back. (MADV_DONTNEED of madvise(2). A debugger's software
    // breakpoints are its own copies of pages, and are lost.)
    unsafe { madvise(start, end - start.addr(), Advice::LinuxDontNeed) }?;
    Ok(())
}

/// The mapping of `maps` with `address` in it, if it is private, of a file, and not writable.
fn find(maps: &str, address: usize) -> Option<(usize, usize)> {
    maps.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        let is_text = words.next()? == "r-xp" && line.contains('/');
        (is_text && (start..end).contains(&address)).then_some((start, end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
00010000-00176000 r-xp 00000000 00:02 298    /bin/rvmm
00187000-0018d000 rw-p 00000000 00:00 0
7fff8fd4e000-7fff8fd4f000 r-xp 00000000 00:00 0    [vdso]
";

    #[test]
    fn only_a_files_unwritable_code() {
        assert_eq!(find(MAPS, 0x10000), Some((0x10000, 0x17_6000)));
        assert_eq!(find(MAPS, 0x18_7000), None);
        assert_eq!(find(MAPS, 0x7fff_8fd4_e000), None);
    }

    #[test]
    fn code_comes_back() {
        release().unwrap();
        assert_eq!(find(MAPS, 0), None);
    }
}
