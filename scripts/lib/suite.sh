# shellcheck shell=bash
# Suites: libtest binaries with a list of cases for each. They run somewhere, and are judged by the
# records that they leave.
#
# A suite is a directory with an executable NAME and a list of its cases NAME.names for every
# binary. resources/rig/run-tests runs it, wherever that is. scripts/judge says which cases have
# passed.

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
        # A binary of several files is a folder, and has its name.
        [[ $source == src/main.rs ]] || source=${source%/main.rs}
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
#   suite_judge LABEL DIR RECORDS LOG
suite_judge() {
    local verdicts passed failed
    verdicts=$(env_run "$RVMM_TARGET/debug/examples/suite-judge" "$@" </dev/null) || verdicts=
    read -r passed failed < <(sed -n '$s/^judged //p' <<<"$verdicts") || true
    if [[ ! $passed$failed =~ ^[0-9]+$ ]]; then
        fail "$1 (the judge failed)"
        return
    fi
    sed '$d' <<<"$verdicts"
    PASSED=$((PASSED + passed))
    FAILED=$((FAILED + failed))
}
