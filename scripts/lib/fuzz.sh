# shellcheck shell=bash
# The targets of fuzz/: built once, and run for some seconds.
#
# The corpus of the repository is only read. What is found stays in FUZZ_FOUND, apart for each target.

readonly FUZZ_FOUND=$RVMM_TARGET/fuzz-found
# A target's memory, MiB of address space.
readonly FUZZ_MEMORY=512

# The names of all targets but the one with a planted fault.
fuzz_targets() {
    local source
    for source in fuzz/targets/*.rs; do
        source=$(basename "$source" .rs)
        [[ $source == planted ]] || printf '%s\n' "$source"
    done
}

# cargo for fuzz/: in its directory, whose .cargo has the flags, and apart from rvmm's own builds, which have others.
fuzz_cargo() {
    env_run env -C fuzz CARGO_TARGET_DIR="$RVMM_TARGET/fuzz" cargo "$@"
}

fuzz_build() {
    fuzz_cargo build --release --locked
}

fuzz_lint() {
    fuzz_cargo fmt --all --check && fuzz_cargo clippy --release --locked --workspace --all-targets -- -D warnings
}

# Run a target for some seconds; further arguments are more options, and directories for the inputs.
#   fuzz_run TARGET SECONDS [ARGUMENT...]
fuzz_run() {
    local target=$1 seconds=$2 found=$FUZZ_FOUND/$1
    shift 2
    mkdir -p "$found"
    env_run env RUST_BACKTRACE=0 "$RVMM_TARGET/fuzz/x86_64-unknown-linux-gnu/release/$target" \
        -max_total_time="$seconds" -rss_limit_mb="$FUZZ_MEMORY" -artifact_prefix="$found/" "$@" "fuzz/corpus/$target"
}

# The target whose fault must be found.
fuzz_finds() {
    local status=0
    fuzz_run planted "$1" -seed=1 || status=$?
    ((status == 77)) || {
        echo "the planted fault was not found: exit status $status"
        return 1
    }
}

# Run one input.
fuzz_replay() {
    mkdir -p "$FUZZ_FOUND/$1"
    env_run env RUST_BACKTRACE=1 "$RVMM_TARGET/fuzz/x86_64-unknown-linux-gnu/release/$1" \
        -rss_limit_mb="$FUZZ_MEMORY" -artifact_prefix="$FUZZ_FOUND/$1/" "$2"
}
