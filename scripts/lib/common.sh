# shellcheck shell=bash
# What every script starts with: where things are, and a way out that leaves nothing running.

set -euo pipefail

RVMM_REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
RVMM_CACHE=${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/rvmm
# What cargo builds, apart for each clone: two may build at once.
RVMM_TARGET=$RVMM_CACHE/target/$(printf '%s' "$RVMM_REPO" | sha256sum | cut -c1-12)
readonly RVMM_REPO RVMM_CACHE RVMM_TARGET
readonly RVMM_TRIPLE=riscv64gc-unknown-linux-gnu

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

# A new directory for what is not finished. It goes when this script ends; one that was killed leaves it to the next.
cache_temp() {
    mkdir -p "$RVMM_CACHE/tmp"
    mktemp -d "$RVMM_CACHE/tmp/$$.XXXXXX"
}

# Remove the temporary directories of this script, and those of scripts that have ended without.
cache_sweep() {
    local dir pid
    for dir in "$RVMM_CACHE"/tmp/*; do
        pid=${dir##*/}
        pid=${pid%%.*}
        [[ $pid != "$$" && -e /proc/$pid ]] || rm -rf --one-file-system "$dir" || true
    done
}

cd "$RVMM_REPO"
trap 'rig_cleanup; ui_cleanup; cache_sweep' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
