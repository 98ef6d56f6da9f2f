//! Coverage-guided fuzzing with the same toolchain as rvmm.
//!
//! libFuzzer is C++, for which the cross-environment has no compiler. This crate does what
//! libFuzzer does, as far as parsers need it: inputs that reach new code are kept and changed
//! further. LLVM's SanitizerCoverage reports the code that is reached (`coverage`). `mutate`
//! changes inputs. `watch` runs all of it in a child, so that the input survives any death.
//! `memory` counts bytes on the heap. Options and directories are libFuzzer's, and so is
//! [`fuzz_target!`].
//!
//! One thread runs targets. With the same seed, inputs and number of runs, fuzzing does the same.

mod coverage;
mod fuzzer;
mod memory;
mod mutate;
mod options;
mod rng;
mod watch;

pub use memory::most_memory;

/// Fuzzes `target` as the command line says. [`fuzz_target!`] calls it.
pub fn run(target: fn(&[u8])) -> ! {
    let options = options::Options::read(std::env::args().skip(1)).unwrap_or_else(|why| {
        eprintln!("{why}");
        std::process::exit(125);
    });
    let status = watch::run(&options, |input| fuzzer::fuzz(&options, target, input));
    std::process::exit(status)
}

/// Defines a program that calls this with inputs until it panics, dies, hangs, or uses too much
/// memory.
#[macro_export]
macro_rules! fuzz_target {
    (|$data:ident: &[u8]| $body:block) => {
        fn main() {
            $crate::run(|$data: &[u8]| $body)
        }
    };
}
