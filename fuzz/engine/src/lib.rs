//! Coverage-guided fuzzing on the one toolchain that rvmm is built with.
//!
//! libFuzzer is C++, and the cross-environment has no compiler for that. So this does what libFuzzer does, as far as
//! a parser needs it: inputs that reach new code are kept and changed on. LLVM's SanitizerCoverage tells what is
//! reached (`coverage`); `mutate` changes inputs; `watch` runs all of it in a child, so that any death leaves the
//! input; `memory` counts bytes on the heap. Options and directories are as libFuzzer's, and so is [`fuzz_target!`].
//!
//! One thread runs targets. Fuzzing is the same for the same seed, inputs and number of runs.

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

/// A program that calls this with inputs, until it panics, dies, hangs, or takes too much memory.
#[macro_export]
macro_rules! fuzz_target {
    (|$data:ident: &[u8]| $body:block) => {
        fn main() {
            $crate::run(|$data: &[u8]| $body)
        }
    };
}
