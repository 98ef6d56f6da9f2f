# shellcheck shell=bash
# Steps that download. After a temporary error a step is tried again, after a pause. A permanent
# error ends the script with one line: the file, the reason, and what to do.

# Seconds before each further attempt.
FETCH_PAUSES=(5 20)

# Messages in logs about temporary errors of a network, a server or a lock: curl's numbers as cargo
# prints them, and HTTP's.
readonly FETCH_TRANSIENT=(
    'could not resolve' 'temporary failure' 'no such host' 'network is unreachable'
    '(could not|unable to) connect' 'connection (failed|reset|refused|timed out)' 'timed? ?out' 'tls handshake'
    'undetermined error' 'unexpected eof' 'toomanyrequests' 'mirror sync in progress' 'hash sum mismatch'
    '^ *\[(5|6|7|18|28|35|52|55|56|92)\] ' 'got (429|50[0234])' ' (429|50[0234])  ' 'could not get lock'
)

# A step that downloads, without which the script cannot go on.
#   must_fetch TITLE WAY_OUT COMMAND...
must_fetch() {
    local title=$1 way_out=$2 pause
    shift 2
    for pause in "${FETCH_PAUSES[@]}" ''; do
        step "$title" "$@" && return
        [[ -n $pause ]] || break
        fetch_is_transient || break
        say "$title: $(fetch_failure); trying again in $pause s"
        # In the background, so that a signal ends it at once.
        sleep "$pause" &
        wait $!
    done
    ui_show_log
    [[ -n $(fetch_failure) ]] || die "$title: failed; its output is in $UI_LOG"
    die "$title: $(fetch_failure). $way_out (Its output is in $UI_LOG)"
}

# Whether the log of the last step has a temporary error.
fetch_is_transient() {
    local patterns
    patterns=$(printf '|%s' "${FETCH_TRANSIENT[@]}")
    grep -qiE "${patterns:1}" "$UI_LOG"
}

# The first file that the last step could not download, and why; nothing if its log names none.
fetch_failure() {
    local failure
    failure=$(fetch_failure_of_apt | head -n 1)
    [[ -n $failure ]] || failure=$(fetch_failure_of_cargo)
    printf '%s' "${failure%%[.?]}"
}

# Messages of apt and of whole-suite. Docker prints the number of the step and the time before each
# line.
fetch_failure_of_apt() {
    sed -E 's/^#[0-9]+ ([0-9.]+ )?//; s/ \[IP: [^]]*\]//; s/  +/: /' "$UI_LOG" |
        sed -nE 's/^not whole: //p; s/^[EW]: Failed to fetch //p; s/^E: (The repository .*|Could not get lock.*)/\1/p'
}

fetch_failure_of_cargo() {
    local file reason
    file=$(sed -nE 's/^.*([Ff]ailed to download (from )?|HTTP response from )`([^`]+)`.*/\3/p' "$UI_LOG" | head -n 1)
    reason=$(sed -nE 's/^ *(\[[0-9]+\] .*)/\1/p; s/.*(got [0-9]+)$/\1/p; s/^ *(.*checksum.*)/\1/p' "$UI_LOG" | tail -n 1)
    printf '%s' "$file${reason:+: $reason}"
}
