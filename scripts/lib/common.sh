# shellcheck shell=bash
# Sourced by every script: sets paths, and a clean-up that leaves nothing running.

set -euo pipefail

RVMM_REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
RVMM_CACHE=${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/rvmm
# Cargo's output, separate for each clone: two may build at once.
RVMM_TARGET=$RVMM_CACHE/target/$(printf '%s' "$RVMM_REPO" | sha256sum | cut -c1-12)
readonly RVMM_REPO RVMM_CACHE RVMM_TARGET
readonly RVMM_TRIPLE=riscv64gc-unknown-linux-gnu

CACHE_WORK=

# shellcheck source=scripts/lib/ui.sh
source "$RVMM_REPO/scripts/lib/ui.sh"
# shellcheck source=scripts/lib/fetch.sh
source "$RVMM_REPO/scripts/lib/fetch.sh"
# shellcheck source=scripts/lib/env.sh
source "$RVMM_REPO/scripts/lib/env.sh"
# shellcheck source=scripts/lib/env-build.sh
source "$RVMM_REPO/scripts/lib/env-build.sh"
# shellcheck source=scripts/lib/rig.sh
source "$RVMM_REPO/scripts/lib/rig.sh"
# shellcheck source=scripts/lib/debian.sh
source "$RVMM_REPO/scripts/lib/debian.sh"
# shellcheck source=scripts/lib/frozen.sh
source "$RVMM_REPO/scripts/lib/frozen.sh"

# Make a directory for unfinished files. It is removed when this script ends. If the script was
# killed, the next one removes it. The lock on the script's own directory, which its children
# inherit, shows whether it is still in use.
cache_temp() {
    mktemp -d "$CACHE_WORK/XXXXXX"
}

# Called before the first cache_temp. One script at a time does this.
cache_begin() {
    local gate
    mkdir -p "$RVMM_CACHE/work"
    exec {gate}<"$RVMM_CACHE/work"
    flock "$gate"
    cache_sweep
    CACHE_WORK=$(mktemp -d "$RVMM_CACHE/work/XXXXXX")
    exec {CACHE_LOCK}>"$CACHE_WORK/lock"
    flock "$CACHE_LOCK"
    exec {gate}<&-
}

# Remove the directories of killed scripts, once all their children have ended.
cache_sweep() {
    local dir
    for dir in "$RVMM_CACHE"/work/*/; do
        [[ -d $dir ]] || continue
        ! flock --nonblock "$dir/lock" true || rm -rf --one-file-system "$dir" || true
    done
}

cache_end() {
    [[ -z $CACHE_WORK ]] || rm -rf --one-file-system "$CACHE_WORK" || true
}

cd "$RVMM_REPO"
trap 'rig_cleanup; ui_cleanup; cache_end' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
