//! The memory that holds rvmm's own code.

use std::fs;
use std::io;

use rustix::mm::{Advice, madvise};

/// Releases the pages of the program's code. A page that is used again is mapped again from the
/// page cache, a few pages at a time. To be called once the guest runs: most of rvmm's code parses
/// flags, builds the machine and loads the kernel, and is not needed again.
///
/// # Errors
/// Fails if /proc/self/maps cannot be read or does not list the code, and if madvise(2) fails.
#[allow(unsafe_code)]
pub fn release() -> io::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let here = release as *const () as usize;
    let (start, end) = find(&maps, here).ok_or(io::ErrorKind::NotFound)?;
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is a private, read-only mapping of the program's file, which the kernel
    // protects from writes while the program runs. So the same bytes come back (MADV_DONTNEED of
    // madvise(2)). Only a debugger's software breakpoints are lost: they are private copies of
    // pages.
    unsafe { madvise(start, end - start.addr(), Advice::LinuxDontNeed) }?;
    Ok(())
}

/// Start and end of the mapping in `maps` that contains `address`, if it is a private, executable
/// and read-only mapping of a file.
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
