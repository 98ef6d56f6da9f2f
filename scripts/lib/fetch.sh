# shellcheck shell=bash
# Steps that download. What fails for the moment is tried again after a pause; what fails for good ends the script with one line that
# names the file, the reason and the way out.

# Seconds before each further try.
FETCH_PAUSES=(5 20)

# A step that downloads, without which nothing can go on.
#   must_fetch TITLE WAY_OUT COMMAND...
must_fetch() {
    local title=$1 way_out=$2 pause
    shift 2
    for pause in "${FETCH_PAUSES[@]}" ''; do
        step "$title" "$@" && return
        [[ -n $pause ]] || break
        fetch_is_transient "$UI_LOG" || break
        say "$title: $(fetch_failure "$UI_LOG"); trying again in $pause s"
        sleep "$pause"
    done
    fetch_failed "$title" "$way_out"
}

# Whether the log of a failed step speaks of a network or a server that may be back in a moment.
fetch_is_transient() {
    grep -qiE 'could not resolve|temporary failure|(could not|unable to) connect|connection (failed|reset|refused|timed out)|timed? ?out|undetermined error|network is unreachable|(^|[^0-9])(429|50[0234])  ' "$1"
}

# The first file that the log says could not be downloaded, and why: apt's, whole-suite's and cargo's words for it.
fetch_failure() {
    local failure
    failure=$(sed -nE 's/ \[IP: [^]]*\]//; s/  +/: /; s/^[EW]: Failed to fetch //p; s/^[EW]: (The repository .* Release.*)/\1/p; /^(trixie|stable|snapshot): /p' "$1" | head -n 1)
    [[ -n $failure ]] || failure=$(sed -nE 's/^.*[Ff]ailed to download (from )?`([^`]+)`.*/\2/p' "$1" | head -n 1)$(sed -nE 's/^ *(\[[0-9]+\] .*|.*checksum.*|.*status code.*)/: \1/p' "$1" | tail -n 1)
    printf '%s' "${failure:-$(ui_last_line)}"
}

fetch_failed() {
    ui_show_log
    die "$1: $(fetch_failure "$UI_LOG"). $2 (All it said is in $UI_LOG)"
}
