//! Files of `--symbols`: ELF files, System.map and /proc/kallsyms. A file is read or refused, with
//! memory in proportion to its length, and each of its addresses has a name.

use std::io::Cursor;

use rvmm::report::symbols::Symbols;

fuzz_engine::fuzz_target!(|data: &[u8]| {
    let (read, held) = fuzz_engine::most_memory(|| Symbols::read(Cursor::new(data)));
    let most = 64 * data.len() + (64 << 10);
    assert!(held <= most, "{held} bytes for a file of {}", data.len());
    match read {
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        Ok(mut symbols) => {
            symbols.follow(0xffff_ffff_8000_1234);
            for address in [0, 1, 0x8020_0000, u64::MAX] {
                let name = symbols.name(address).map(|name| name.to_string());
                assert!(name.is_none_or(|name| !name.is_empty()));
                let _ = symbols.caller(address);
            }
            let _ = symbols
                .function("panic")
                .map(|panic| panic.contains(0, u64::MAX));
        }
    }
});
