//! A planted bug. The engine must find it; otherwise the other targets' success would mean nothing.
//!
//! It cannot be found without coverage and the values of comparisons.

fuzz_engine::fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_at_checked(8) else {
        return;
    };
    let number = head
        .iter()
        .fold(0, |number, byte| (number << 8) | u64::from(*byte));
    if number == 0x5256_4d4d_0bad_cafe && rest.first() == Some(&b'!') && rest.get(1) == Some(&b'?')
    {
        panic!("this is the planted fault");
    }
});
