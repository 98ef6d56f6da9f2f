//! Files of `rvmm trace`: each is printed or refused, and what is printed is one line for each line
//! of the file, and a summary.

use rvmm::trace::read::{Filter, print};

/// The start of every trace of rvmm, before the input.
const BEGIN: &[u8] = b"[\n{\"name\":\"rvmm trace\",";

fuzz_engine::fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let file = [BEGIN, rest].concat();
    let filter = Filter {
        kind: (choice & 1 == 1).then(|| "mmio".into()),
        vcpu: (choice & 2 == 2).then_some(0),
        slowest: (choice & 4 == 4).then_some(3),
        summary: choice & 8 == 8,
    };
    let mut out = Vec::new();
    let printed = print(file.as_slice(), &filter, &mut out);
    if let Err(error) = printed {
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    assert!(std::str::from_utf8(&out).is_ok());
    assert!(out.len() <= 64 * file.len() + 4096, "{} bytes", out.len());
});
