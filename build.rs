//! Makes the linker put the code together that a running guest needs: see resources/link/order.t.
//! If the linker cannot do that, the code keeps its usual order, and rvmm takes more memory.
//!
//! Also lets a static rvmm start sooner: see [`FRAMES`].

use std::env;
use std::path::Path;
use std::process::Command;

const ORDER: &str = "resources/link/order.t";
const OPTION: &str = "--section-ordering-file";

/// GCC's start-up code of a static program registers the tables of stack frames, and sorts all of
/// them for that (0.57 ms). It does not if the functions are at address 0. Who looks for a frame
/// finds it all the same, by the program header GNU_EH_FRAME.
const FRAMES: [&str; 2] = [
    "--defsym=__register_frame_info=0",
    "--defsym=__deregister_frame_info=0",
];

fn main() {
    println!("cargo:rerun-if-changed={ORDER}");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RUSTC_LINKER");
    let is_riscv64 = env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "riscv64");
    if !is_riscv64 {
        return;
    }
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        for option in FRAMES {
            println!("cargo:rustc-link-arg-bins=-Wl,{option}");
            println!("cargo:rustc-link-arg-examples=-Wl,{option}");
        }
    }
    if !linker_orders() {
        return;
    }
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let order = Path::new(&root).join(ORDER);
    // Not with -Wl, which splits at commas.
    for argument in [OPTION, &order.to_string_lossy()] {
        println!("cargo:rustc-link-arg-bins=-Xlinker");
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}

/// Whether the compiler's linker supports the option.
fn linker_orders() -> bool {
    let compiler = env::var("RUSTC_LINKER").unwrap_or_else(|_| "cc".into());
    let help = Command::new(compiler).arg("-Wl,--help").output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains(OPTION))
}
