# shellcheck shell=bash
# Progress and messages of the scripts. Everything here goes to stderr, because stdout is the
# guest's console or the result.
#
# A step is `step TITLE COMMAND...`. On a terminal it is one line that is updated. Elsewhere it is a
# line when it starts, one about every half minute, and one when it ends. Its output goes to a log,
# whose last lines are shown if it fails.

readonly UI_HEARTBEAT=30
UI_LOG=
UI_CHILD=
UI_BYTES=0

# Print one line.
say() {
    printf '%s\n' "$*" >&2
}

# Print one line and end. 123 is rvmm's own "the host or one of its files failed".
die() {
    say "${0##*/}: $*"
    exit 123
}

# Print one line about wrong usage of the script and end. 125 is rvmm's own "wrong usage".
wrong_usage() {
    say "${0##*/}: $*; scripts/${0##*/} --help lists every option"
    exit 125
}

# Check that an option has a value.
needs_value() {
    [[ -n ${2-} ]] || wrong_usage "$1 needs a value"
}

# Run a command as a named step; its exit status is the command's.
step() {
    local title=$1 start=$EPOCHREALTIME status=0
    shift
    UI_LOG=$(ui_log_name "$title")
    ui_begin "$title"
    set -m # its own process group: an interrupt ends all of it, and nothing else
    "$@" >"$UI_LOG" 2>&1 </dev/null &
    UI_CHILD=$!
    set +m
    ui_watch "$title"
    wait "$UI_CHILD" || status=$?
    UI_CHILD=
    ui_end "$title" "$start" "$status"
    return "$status"
}

# The same for a step without which the script cannot go on.
must() {
    local title=$1
    step "$@" && return
    ui_show_log
    die "$title: failed; its output is in $UI_LOG"
}

# The end of the last step's log, indented.
ui_show_log() {
    sed '/^subprocess exited with status/d' "$UI_LOG" | tail -n 25 | sed 's/^/    | /' >&2
}

ui_log_name() {
    local name=${1//[^A-Za-z0-9]/-}
    mkdir -p "$RVMM_TARGET/log"
    printf '%s/log/%s.log' "$RVMM_TARGET" "${name,,}"
}

# Seconds since an $EPOCHREALTIME, with one decimal, right-aligned.
ui_since() {
    local now=$EPOCHREALTIME tenths
    tenths=$(((${now/[.,]/} - ${1/[.,]/}) / 100000))
    printf '%4d.%d' $((tenths / 10)) $((tenths % 10))
}

ui_begin() {
    [[ -t 2 ]] || say "[        ] $1 ..."
}

ui_end() {
    local title=$1 failed='' took bytes
    took=$(ui_since "$2")
    bytes=$(ui_count_downloads)
    UI_BYTES=$((UI_BYTES + bytes))
    [[ $3 == 0 ]] || failed=': failed'
    [[ ! -t 2 ]] || printf '\r\e[K' >&2
    say "[$took s] $title$failed$(ui_downloaded "$bytes")"
}

# Until the step ends: update the line, or print one now and then.
ui_watch() {
    local title=$1 start=$SECONDS shown=$SECONDS pause=0.02
    while kill -0 "$UI_CHILD" 2>/dev/null; do
        if [[ -t 2 ]]; then
            ui_live "$title" "$((SECONDS - start))"
        elif ((SECONDS - shown >= UI_HEARTBEAT)); then
            shown=$SECONDS
            say "[$((SECONDS - start)) s] $title: $(ui_last_line)"
        fi
        sleep "$pause"
        ((SECONDS - start < 1)) || pause=0.2
    done
}

ui_live() {
    local width line
    width=$(stty size <&2 2>/dev/null | cut -d' ' -f2) || width=80
    line=$(printf '[%4d   s] %s: %s' "$2" "$1" "$(ui_last_line)")
    printf '\r\e[K%s' "${line:0:width-1}" >&2
}

ui_last_line() {
    tail -c 400 "$UI_LOG" 2>/dev/null | tr '\r' '\n' | tr -dc '[:print:]\n' | grep -v '^ *$' | tail -n 1
}

# The bytes that the last step downloaded. apt prints them; for cargo, add the sizes of the crates
# that it names.
ui_count_downloads() {
    {
        sed -nE 's/,//g; s/.*Fetched ([0-9.]+) ([kMG]?)B in .*/\1 \2/p' "$UI_LOG"
        sed -nE 's/^ *Downloaded ([^ ]+) v([^ ]+)$/\1-\2.crate/p' "$UI_LOG" | ui_crate_sizes
    } | awk '{ x["k"] = 1e3; x["M"] = 1e6; x["G"] = 1e9; x[""] = 1; sum += $1 * x[$2] } END { printf "%d", sum }'
}

ui_crate_sizes() {
    local crate
    while read -r crate; do
        stat --format %s "$RVMM_CACHE"/cargo/registry/cache/*/"$crate" 2>/dev/null || true
    done
}

# ", 612.0 MB downloaded" when there are any bytes.
ui_downloaded() {
    (($1 == 0)) || printf ', %d.%d MB downloaded' $(($1 / 1000000)) $(($1 / 100000 % 10))
}

# Called on every way out: ends the running step.
ui_cleanup() {
    [[ -n $UI_CHILD ]] || return 0
    kill -TERM -- "-$UI_CHILD" 2>/dev/null || true
    wait "$UI_CHILD" || true
    UI_CHILD=
}
