//! The values of flags: an accepted value is printed, and reading that gives the same again.
//!
//! Each input is tried as the value of every flag. A refusal has a reason.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use rvmm::config::{
    ConsoleConfig, CpuConfig, DiskConfig, MemConfig, NetConfig, SbiConfig, SigtermConfig,
};

fuzz_engine::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    check::<MemConfig>(text);
    check::<CpuConfig>(text);
    check::<SbiConfig>(text);
    check::<DiskConfig>(text);
    check::<NetConfig>(text);
    check::<ConsoleConfig>(text);
    check::<SigtermConfig>(text);
});

fn check<T: FromStr<Err: Display> + Display + Debug + PartialEq>(text: &str) {
    match text.parse::<T>() {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(value) => {
            let printed = value.to_string();
            match printed.parse::<T>() {
                Ok(again) => assert_eq!(again, value, "printed as {printed:?}"),
                Err(error) => panic!("{value:?} is printed as {printed:?}, but: {error}"),
            }
        }
    }
}
