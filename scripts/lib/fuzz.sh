# shellcheck shell=bash
# The targets of fuzz/: builds them once, and runs them for some seconds.
#
# The corpus in the repository is only read. Findings are kept in FUZZ_FOUND, separately for each
# target.

readonly FUZZ_FOUND=$RVMM_TARGET/fuzz-found
# The limit of a target's address space, in MiB.
readonly FUZZ_MEMORY=512

# The names of all targets except the one with a planted bug.
fuzz_targets() {
    local source
    for source in fuzz/targets/*.rs; do
        source=$(basename "$source" .rs)
        [[ $source == planted ]] || printf '%s\n' "$source"
    done
}

# cargo for fuzz/: in its directory, whose .cargo has the flags, and with its own target directory,
# because rvmm's builds have other flags.
fuzz_cargo() {
    env_run env -C fuzz CARGO_TARGET_DIR="$RVMM_TARGET/fuzz" cargo "$@"
}

fuzz_build() {
    fuzz_cargo build --release --locked
}

fuzz_lint() {
    fuzz_cargo fmt --all --check && fuzz_cargo clippy --release --locked --workspace --all-targets -- -D warnings
}

# Run a target for some seconds. Further arguments are options, and directories for the inputs.
#   fuzz_run TARGET SECONDS [ARGUMENT...]
fuzz_run() {
    local target=$1 seconds=$2 found=$FUZZ_FOUND/$1
    shift 2
    mkdir -p "$found"
    env_run env RUST_BACKTRACE=0 "$RVMM_TARGET/fuzz/x86_64-unknown-linux-gnu/release/$target" \
        -max_total_time="$seconds" -rss_limit_mb="$FUZZ_MEMORY" -artifact_prefix="$found/" "$@" "fuzz/corpus/$target"
}

# The target whose bug must be found.
fuzz_finds() {
    local status=0
    fuzz_run planted "$1" -seed=1 || status=$?
    ((status == 77)) || {
        echo "the planted bug was not found: exit status $status"
        return 1
    }
}

# Run one input.
fuzz_replay() {
    mkdir -p "$FUZZ_FOUND/$1"
    env_run env RUST_BACKTRACE=1 "$RVMM_TARGET/fuzz/x86_64-unknown-linux-gnu/release/$1" \
        -rss_limit_mb="$FUZZ_MEMORY" -artifact_prefix="$FUZZ_FOUND/$1/" "$2"
}
