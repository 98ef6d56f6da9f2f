# shellcheck shell=bash
# Suites: libtest binaries with a list of cases for each. They run somewhere, and are judged by the
# records that they leave.
#
# A suite is a directory with an executable NAME and a list of its cases NAME.names for every
# binary. resources/rig/run-tests runs it, wherever that is. A case has passed if there is exactly
# one record of it, and that is "ok". A missing, ignored or duplicate record is a failure.

PASSED=0
FAILED=0

pass() {
    PASSED=$((PASSED + 1))
    printf 'ok   %s\n' "$1"
}

fail() {
    FAILED=$((FAILED + 1))
    printf 'FAIL %s\n' "$1"
}

# A step that is itself a case.
check() {
    local name=$1
    shift
    if step "$@"; then
        pass "$name"
    else
        ui_show_log
        fail "$name"
        return 1
    fi
}

# From the log of `cargo test --no-run`, print a line "SOURCE EXECUTABLE" for each test binary.
suite_executables() {
    sed -nE 's/^ *Executable (unittests )?([^ ]+) \((.*)\)$/\2 \3/p' "$1"
}

# Make a suite of the binaries whose source matches a pattern, and of the cases whose name contains
# a filter.
#   suite_make DIR LOG SOURCES FILTER RUNNER
suite_make() {
    local dir=$1 log=$2 sources=$3 filter=$4 runner=$5 source executable name
    rm -rf "$dir"
    mkdir -p "$dir"
    while read -r source executable; do
        # shellcheck disable=SC2053 # a pattern
        [[ $source == $sources ]] || continue
        name=$(basename "$source" .rs)
        env_run cp "$executable" "$dir/$name" </dev/null
        # shellcheck disable=SC2086 # a runner may be absent
        env_run $runner "$dir/$name" --list --format terse </dev/null |
            sed -n 's/: test$//p' | suite_filter "$name" "$filter" >"$dir/$name.names"
        [[ -s $dir/$name.names ]] || rm "$dir/$name" "$dir/$name.names"
    done < <(suite_executables "$log")
}

suite_filter() {
    local name=$1 filter=$2 case
    while read -r case; do
        [[ "$name::$case" != *"$filter"* ]] || printf '%s\n' "$case"
    done
}

suite_is_empty() {
    ! compgen -G "$1/*.names" >/dev/null
}

# Judge a suite by its records: prints LABEL/NAME::CASE for each case, and the output of the failed
# binaries.
suite_judge() {
    local label=$1 dir=$2 records=$3 log=$4 names name verdict case
    for names in "$dir"/*.names; do
        name=$(basename "$names" .names)
        local before=$FAILED
        while read -r verdict case; do
            "$verdict" "$label/$name$case"
        done < <(suite_verdicts "$name" "$names" "$records")
        ((FAILED == before)) || suite_show_output "$name" "$log"
    done
}

# "pass ::CASE" or "fail ::CASE (why)" for each case of one binary, then its exit status if that
# contradicts them.
suite_verdicts() {
    awk -v bin="$1" '
        NR == FNR { wanted[++n] = $1; next }
        $1 == bin && $2 == "exit" { exited = 1; status = $3; next }
        $1 == bin { count[$NF]++; said[$NF] = $2; sub(/:$/, "", said[$NF]) }
        END {
            for (i = 1; i <= n; i++) {
                name = wanted[i]
                if (count[name] == 1 && said[name] == "ok") { print "pass", "::" name; continue }
                failed++
                why = !count[name] ? "no record" : count[name] > 1 ? "more than one record" : said[name]
                print "fail", "::" name " (" why ")"
            }
            if (!exited) print "fail", " (never ended)"
            else if (status != 0 && !failed) print "fail", " (exit status " status ")"
        }' "$2" "$3"
}

suite_show_output() {
    sed -n "/^=== $1\$/,/^=== /p" "$2" | tail -n 200 | sed 's/^/    | /'
}
