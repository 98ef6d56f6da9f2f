#!/usr/bin/env bash
# Tests the set-up with mirrors made here: which suite it chooses for the environment, and what
# happens when a download fails.
#
#     tests/setup.sh --list         the cases
#     tests/setup.sh DIR            run them in DIR; the records are on stdout, as resources/rig/run-tests
#                                   writes them, the rest on stderr
#
# Runs in the cross-environment. apt, gpg, xz and HTTP work here as with real mirrors.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly HOUR=3600

# --- the cases: a function each, in this order ----------------------------------------------------

suite_whole() {
    make_suite trixie
    make_suite stable
    chosen trixie
}

suite_stale_riscv64() {
    make_suite trixie
    make_stale trixie riscv64
    make_suite stable
    chosen stable
    said "^not whole: trixie: $site/$name/debian/dists/trixie/main/binary-riscv64/Packages.xz: File has unexpected size"
}

suite_stale_amd64() {
    make_suite trixie
    make_stale trixie amd64
    make_suite stable
    chosen stable
    said "^not whole: trixie: $site/$name/debian/dists/trixie/main/binary-amd64/Packages.xz: File has unexpected size"
}

suite_index_missing() {
    make_suite trixie
    rm -r "$mirror/dists/trixie/main/binary-riscv64"
    make_suite stable
    chosen stable
    said "^not whole: trixie: $site/$name/debian/dists/trixie/main/binary-riscv64/Packages.*: 404"
}

suite_other_bytes_of_the_same_size() {
    make_suite trixie
    printf x | dd of="$mirror/dists/trixie/main/binary-riscv64/Packages.xz" bs=1 seek=20 conv=notrunc status=none
    make_suite stable
    chosen stable
    said "^not whole: trixie: $site/$name/debian/dists/trixie/main/binary-riscv64/Packages.xz: Hash Sum mismatch"
}

suite_without_riscv64() {
    make_suite trixie "" amd64
    make_suite stable
    chosen stable
    said "^not whole: trixie: it has no packages for riscv64"
}

suite_expired() {
    make_suite trixie "Valid-Until: $(date_of -$HOUR)"
    make_suite stable
    # Some machines accept expired suites. The environment does not.
    echo 'Acquire::Check-Valid-Until "false";' >>"$dir/apt.conf"
    chosen stable
    said "^not whole: trixie: Release file for $site/$name/debian/dists/trixie/InRelease is expired"
}

suite_codename_moved_on() {
    make_suite trixie
    make_stale trixie riscv64
    codename=forky make_suite stable
    none_chosen
    said "^not whole: stable: it is forky now"
}

suite_snapshot_beside_the_mirror() {
    make_suite trixie
    make_stale trixie riscv64
    codename=forky make_suite stable
    mirror=$(dirname "$mirror")/archive/debian/$(date --utc --date "@$((made - 24 * HOUR))" +%Y%m%dT%H%M%SZ)
    make_suite trixie
    mirror=$dir/debian
    chosen trixie "/archive/debian/[0-9]*T[0-9]*Z"
}

suite_snapshot_known_to_apt() {
    make_suite trixie
    make_stale trixie amd64
    echo "Acquire::Snapshots::URI::Origin::Debian \"$site/$name/elsewhere/@SNAPSHOTID@/\";" >"$dir/apt.conf"
    mirror=$dir/elsewhere/$(date --utc --date "@$((made - 24 * HOUR))" +%Y%m%dT%H%M%SZ)
    make_suite trixie
    mirror=$dir/debian
    chosen trixie "/elsewhere/[0-9]*T[0-9]*Z"
}

suite_snapshot_named_by_the_mirror() {
    make_suite trixie "Snapshots: $site/$name/elsewhere/@SNAPSHOTID@/"
    make_stale trixie amd64
    mirror=$dir/elsewhere/$(date --utc --date "@$((made - 24 * HOUR))" +%Y%m%dT%H%M%SZ)
    make_suite trixie
    mirror=$dir/debian
    chosen trixie "/elsewhere/[0-9]*T[0-9]*Z"
}

suite_signed_by_another() {
    make_suite trixie
    make_suite stable
    make_key other
    keyring=$dir/other.gpg
    none_chosen
    said "^not whole: trixie: .*$site/$name/debian trixie InRelease"
}

suite_unsigned() {
    make_suite trixie
    rm "$mirror/dists/trixie/InRelease"
    cp "$dir/Release" "$mirror/dists/trixie"
    make_suite stable
    chosen stable
    said "^not whole: trixie: The repository '$site/$name/debian trixie Release' is not signed"
}

suite_signed_beside() {
    make_suite trixie
    rm "$mirror/dists/trixie/InRelease"
    cp "$dir/Release" "$mirror/dists/trixie"
    gpg --quiet --batch --local-user ours --detach-sign --armor --output "$mirror/dists/trixie/Release.gpg" "$dir/Release"
    chosen trixie
}

suite_stale_by_hash() {
    make_suite trixie "Acquire-By-Hash: yes"
    make_stale trixie riscv64
    make_suite stable
    chosen stable
    said "^not whole: trixie: $site/$name/debian/dists/trixie/main/binary-riscv64/.*: File has unexpected size"
}

suite_no_such_mirror() {
    none_chosen
    said "^not whole: trixie: The repository '$site/$name/debian trixie Release' does not have a Release file"
    said "^not whole: stable: The repository '$site/$name/debian stable Release' does not have a Release file"
}

suite_unreachable() {
    url=http://127.0.0.1:9/debian
    none_chosen
    said "^not whole: trixie: http://127.0.0.1:9/debian/dists/trixie/InRelease: .* connect to 127.0.0.1:9"
}

mirror_of_debian() {
    os debian bookworm
    sources "deb https://apt.vendor.example/packages stable main" "deb http://deb.example/debian bookworm main"
    [[ $(machines_mirror) == http://deb.example/debian/ ]]
}

mirror_with_another_name() {
    os debian trixie
    sources "deb https://repository.example/mirrors/main trixie main contrib" "deb http://deb.example/security trixie-security main"
    [[ $(machines_mirror) == https://repository.example/mirrors/main/ ]]
}

mirror_from_a_list() {
    os debian trixie
    echo "http://listed.example/debian" >"$dir/debian.list"
    sources "deb mirror+file:$dir/debian.list trixie main"
    [[ $(machines_mirror) == http://listed.example/debian ]]
}

mirror_of_another_distribution() {
    os ubuntu noble
    sources "deb http://archive.ubuntu.example/ubuntu noble main"
    [[ -z $(machines_mirror) ]]
}

fetch_comes_back() {
    fetch_with "unreachable unreachable fine"
    [[ $status == 0 && $tries == 3 ]]
    said "Get it: http://mirror/file: Could not connect to mirror:80.*; trying again in 0 s"
}

fetch_gives_up() {
    fetch_with "unreachable unreachable unreachable fine"
    [[ $status == 123 && $tries == 3 ]]
    said "^setup.sh: Get it: http://mirror/file: Could not connect to mirror:80.*. Another day. (Its output is in .*)$"
}

fetch_of_what_is_not_there() {
    fetch_with "missing fine"
    [[ $status == 123 && $tries == 1 ]]
    said "^setup.sh: Get it: http://mirror/file: 404  Not Found. Another day."
}

fetch_of_a_crate() {
    fetch_with "crate crate crate"
    [[ $status == 123 && $tries == 3 ]]
    said "^setup.sh: Get it: https://registry/config.json: \[6\] Could not resolve hostname.* Another day."
}

fetch_where_the_disk_is_full() {
    fetch_with "full fine"
    [[ $status == 123 && $tries == 1 ]]
    said "^setup.sh: Get it: failed; its output is in "
}

fetch_in_a_build_of_docker() {
    fetch_with "docker docker docker"
    [[ $status == 123 && $tries == 3 ]]
    said "^setup.sh: Get it: http://mirror/file: Could not connect to mirror:80.*. Another day."
}

fetch_without_a_word() {
    fetch_with "silent fine"
    [[ $status == 123 && $tries == 1 ]]
    said "^setup.sh: Get it: failed; its output is in "
}

crates_without_a_network() {
    fetch_crates "crate crate crate"
    [[ $status == 123 && $tries == 3 && ! -e $dir/cache/cargo/registry/fetched-$lock ]]
}

crates_half_there() {
    mkdir -p "$dir/cache/cargo/registry/cache"
    touch "$dir/cache/cargo/registry/cache/half"
    fetch_crates "half fine fine"
    [[ $status == 0 && $tries == 3 && ! -e $dir/cache/cargo/registry/cache/half ]]
    [[ -e $dir/cache/cargo/registry/fetched-$lock ]]
}

work_of_a_killed_script_goes() {
    local work=$dir/cache/rvmm/work
    script 'kill -KILL $$' || true
    [[ $(find "$work" -mindepth 1 -maxdepth 1 | wc -l) == 1 ]]
    # A child of the script still works there.
    script 'sleep 1000 & echo $! >"$RVMM_CACHE/child"; kill -KILL $$' || true
    [[ $(find "$work" -mindepth 1 -maxdepth 1 | wc -l) == 1 ]]
    script 'ls "$RVMM_CACHE/work" | wc -l >"$RVMM_CACHE/seen"'
    [[ $(cat "$dir/cache/rvmm/seen") == 2 ]]
    kill "$(cat "$dir/cache/rvmm/child")"
    script 'ls "$RVMM_CACHE/work" | wc -l >"$RVMM_CACHE/seen"'
    [[ $(cat "$dir/cache/rvmm/seen") == 1 && -z $(ls "$work") ]]
}

# A command in the environment is started again if its engine failed before the command began. It is
# not started again if the command itself failed, or if it was killed.
work_begins_again() {
    begun_by "refuses refuses runs" 'exit 7' 7 3
    begun_by "refuses refuses refuses runs" 'exit 7' 1 3
    begun_by "runs runs" 'exit 1' 1 1
    begun_by "runs runs" 'exit 0' 0 1
    begun_by "killed runs" 'exit 0' 143 1
}

# Calls env_run with an engine that does these things in turn. Checks the status and the number of
# turns.
begun_by() {
    # shellcheck disable=SC2086 # one line for each word
    printf '%s\n' $1 >"$dir/turns"
    script '
        ENV_ENGINE=buildah ENV_NAME=none status=0
        env_buildah() {
            while [[ $1 != -- ]]; do shift; done
            local turn
            turn=$(head -n 1 "$RVMM_CACHE/../../turns")
            sed -i 1d "$RVMM_CACHE/../../turns"
            case $turn in
                refuses) return 1 ;;
                killed) return 143 ;;
                runs) "${@:2}" ;;
            esac
        }
        env_run sh -c "'"$2"'" || status=$?
        echo "$status" >"$RVMM_CACHE/status"
    '
    [[ $(cat "$dir/cache/rvmm/status") == "$3" ]]
    [[ $(($(wc -w <<<"$1") - $(wc -l <"$dir/turns"))) == "$4" ]]
}

options_help() {
    local script
    for script in $(scripts); do
        called "$script" --help
        [[ $status == 0 && ! -e $dir/cache/rvmm ]]
        grep -q "^Usage: scripts/$script" "$dir/out"
    done
}

options_that_are_none() {
    local script
    for script in $(scripts); do
        called "$script" --nope
        [[ $status == 125 && ! -e $dir/cache/rvmm ]]
        said "^$script: there is no option '--nope'"
    done
}

options_without_a_value() {
    local script
    for script in bench demo l1 test; do
        called "$script" --host
        [[ $status == 125 && ! -e $dir/cache/rvmm ]]
        said "^$script: --host needs a value; scripts/$script --help lists every option"
        called "$script" --host mars
        [[ $status == 125 ]]
        said "^$script: there is no kind of host 'mars', only aia aia-emul none aia-next none-next;"
    done
}

options_that_cannot_be() {
    refused build "'$dir' is no FILE" "$dir"
    refused build "'' is no FILE" ''
    refused demo "different guests" --debian --conformance
    refused demo "different guests" --restore --debian
    refused l1 "no command, and no terminal"
    refused fuzz "a TARGET is needed"
    refused fuzz "there is no TARGET 'mars'" mars
    refused fuzz "'soon' is no number of SECONDS, and no FILE" ctl soon
    RVMM_TIMEOUT=soon refused l1 "RVMM_TIMEOUT is 'soon'" true
    RVMM_TIMEOUT=soon refused demo "RVMM_TIMEOUT is 'soon'"
    refused bench "is not NAME=COMMAND" --peer nonsense
    refused bench "there is no program '/nowhere'" --peer x=/nowhere
    refused bench "is no program for riscv64" --before "$repo/README.md"
    refused bench "without --peer" --before "$repo/README.md" --peer x=/nowhere
}

# Wrong usage gives one line of error before anything is done.
refused() {
    called "$1" "${@:3}"
    [[ $status == 125 && ! -e $dir/cache/rvmm ]]
    said "^$1: .*$2.*; scripts/$1 --help lists every option"
}

# --- helpers of the cases ------------------------------------------------------------------------

# Make a signed, complete suite of two architectures: make_suite NAME [FIELD [ARCHITECTURES]]
make_suite() {
    local field=${2-} architectures=${3:-amd64 riscv64} top=$mirror/dists/$1 arch
    for arch in $architectures; do
        make_index "$top" "$arch" 2
    done
    {
        printf 'Origin: Debian\nLabel: Debian\nSuite: stable\nVersion: 13.9\nCodename: %s\n' "${codename:-trixie}"
        printf 'Date: %s\nArchitectures: %s\nComponents: main\n' "$(date_of 0)" "$architectures"
        [[ -z $field ]] || printf '%s\n' "$field"
        echo SHA256:
        (cd "$top" && find main -type f -printf '%p %s\n' | while read -r file size; do
            printf ' %s %s %s\n' "$(sha256sum "$file" | cut -d' ' -f1)" "$size" "$file"
        done)
    } >"$dir/Release"
    # Uncompressed indexes are listed but missing, as on real mirrors.
    find "$top" -name Packages -delete
    gpg --quiet --batch --yes --local-user ours --clearsign --output "$top/InRelease" "$dir/Release"
}

make_index() {
    local to=$1/main/binary-$2
    mkdir -p "$to"
    printf 'Package: thing\nVersion: %s\nArchitecture: %s\nFilename: pool/thing.deb\nSize: 1\nSHA256: %064d\n' "$3" "$2" 0 >"$to/Packages"
    xz --force --keep "$to/Packages"
}

# Replace the index of an architecture by one from another day than the Release file.
make_stale() {
    make_index "$mirror/dists/$1" "$2" "1 of another day"
    rm "$mirror/dists/$1/main/binary-$2/Packages"
}

make_key() {
    gpg --quiet --batch --passphrase '' --quick-generate-key "$1" rsa2048 sign never
    gpg --quiet --batch --export "$1" >"$dir/$1.gpg"
}

# The time of the start plus so many seconds, in the form of Release files.
date_of() {
    LC_ALL=C date --utc --date "@$((made + $1))" '+%a, %d %b %Y %H:%M:%S UTC'
}

whole_suite() {
    sh "$repo/scripts/lib/whole-suite" "${url:-$site/$name/debian}" "$keyring" >"$dir/out" 2>"$dir/err"
}

# Serves the files in the current directory by HTTP; prints the port.
serve() {
    perl -MIO::Socket::INET -e '
        $| = 1;
        $SIG{PIPE} = "IGNORE";
        my $server = IO::Socket::INET->new(Listen => 9, LocalAddr => "127.0.0.1") or die "no socket: $!";
        print $server->sockport, "\n";
        close STDOUT;
        while (my $client = $server->accept) {
            my ($path) = (<$client> // "") =~ m{^GET /(\S+)};
            while (($_ = <$client>) =~ /\S/) {}
            my $found = defined $path && -f $path && open my $file, "<", $path;
            my $body = $found ? do { local $/; <$file> } : "";
            my $status = $found ? "200 OK" : "404 Not Found";
            print $client "HTTP/1.1 $status\r\nContent-Length: ", length $body, "\r\nConnection: close\r\n\r\n$body";
            close $client;
        }'
}

# Check that this suite, of this URL (a pattern), is chosen.
chosen() {
    whole_suite || return
    grep -q "^$site/$name${2:-/debian} $1 13.9 [0-9]" "$dir/out"
}

none_chosen() {
    if whole_suite; then return 1; fi
    [[ ! -s $dir/out ]]
}

said() {
    grep -q -- "$1" "$dir/err"
}

# Describe this machine to apt and in os-release.
os() {
    printf 'ID=%s\nVERSION_CODENAME=%s\n' "$1" "$2" >"$dir/os-release"
}

sources() {
    printf '%s\n' "$@" >"$dir/sources.list"
    printf 'Dir::Etc::SourceList "%s";\nDir::Etc::SourceParts "/dev/null";\n' "$dir/sources.list" >"$dir/apt.conf"
}

machines_mirror() {
    OS_RELEASE=$dir/os-release sh "$repo/scripts/lib/whole-suite" --mirror 2>"$dir/err"
}

# Calls must_fetch with a command that ends in these ways, one for each attempt. Sets $status and
# $tries.
fetch_with() {
    ending "$1" 'must_fetch "Get it" "Another day." download'
}

# The same for the crates, with a cargo that ends so.
fetch_crates() {
    lock=$(cat "$repo"/{,fuzz/}Cargo.lock | sha256sum | cut -c1-12)
    mkdir -p "$dir/cache/cargo/registry"
    ending "$1" 'env_run() { download; }; env_fetch_crates'
}

ending() {
    status=0
    tr ' ' '\n' <<<"$1" >"$dir/ways"
    bash -euo pipefail -c '
        RVMM_REPO=$2 RVMM_TARGET=$1/target RVMM_CACHE=$1/cache RVMM_TRIPLE=riscv64gc-unknown-linux-gnu ways=$1/ways
        for part in ui fetch env env-build; do source "$2/scripts/lib/$part.sh"; done
        FETCH_PAUSES=(0 0)
        download() {
            local way
            way=$(head -n 1 "$ways")
            sed -i 1d "$ways"
            case $way in
                fine) return ;;
                unreachable) echo "E: Failed to fetch http://mirror/file  Could not connect to mirror:80 (192.0.2.1). - connect (111: Connection refused) [IP: 192.0.2.1 80]" ;;
                docker) echo "#8 3.42 E: Failed to fetch http://mirror/file  Could not connect to mirror:80 (192.0.2.1). - connect (111: Connection refused) [IP: 192.0.2.1 80]" ;;
                missing) echo "E: Failed to fetch http://mirror/file  404  Not Found [IP: 192.0.2.1 80]" ;;
                crate) printf "error: failed to get x\n\nCaused by:\n  failed to download from \`https://registry/config.json\`\n\nCaused by:\n  [6] Could not resolve hostname (Could not resolve host: registry)\n" ;;
                half) printf "error: failed to unpack package x\n" ;;
                full) echo "dpkg: error: No space left on device" ;;
                silent) ;;
            esac
            return 1
        }
        eval "$3"
    ' setup.sh "$dir" "$repo" "$2" 2>"$dir/err" || status=$?
    tries=$(($(wc -w <<<"$1") - $(wc -l <"$dir/ways")))
}

scripts() {
    find "$repo/scripts" -maxdepth 1 -type f -printf '%f\n'
}

# Run a script with these arguments and an empty cache. Sets $status.
called() {
    status=0
    XDG_CACHE_HOME=$dir/cache "$repo/scripts/$1" "${@:2}" >"$dir/out" 2>"$dir/err" </dev/null || status=$?
}

# Run commands as a script with its own cache.
script() {
    XDG_CACHE_HOME=$dir/cache bash -c 'source "$1/scripts/lib/common.sh"; cache_begin; eval "$2"' - "$repo" "$1" >>"$dir/out" 2>>"$dir/err"
}

# --- running the cases ---------------------------------------------------------------------------

cases() {
    sed -nE 's/^((suite|mirror|fetch|crates|work|options)_[a-z0-9_]+)\(\) \{$/\1/p' "$repo/tests/setup.sh" | grep -vE '^fetch_(with|crates)$'
}

main() {
    case $1 in
        --list) cases && exit ;;
        --case)
            run "$2"
            exit
            ;;
    esac
    local name status=0
    mkdir -p "$1"
    cd "$1"
    # It will have a socket, whose name cannot be long.
    GNUPGHOME=$(mktemp -d)
    export GNUPGHOME
    trap 'gpgconf --kill all; rm -rf "$GNUPGHOME"; kill "${SERVER_PID-}" 2>/dev/null || true' EXIT
    made=$(($(date +%s) - HOUR))
    dir=$PWD make_key ours
    coproc SERVER { serve; }
    read -r port <&"${SERVER[0]}"
    export made site=http://127.0.0.1:$port
    for name in $(cases); do
        # A separate process, which ends at its first command that fails.
        if bash "$repo/tests/setup.sh" --case "$name"; then
            echo "setup ok $name"
        else
            echo "setup failed $name"
            status=1
        fi
    done
    echo "setup exit $status"
}

run() {
    name=$1 dir=$PWD/$1 mirror=$PWD/$1/debian keyring=$PWD/ours.gpg
    mkdir "$dir"
    # apt may know where the real mirrors' snapshots are.
    echo '#clear Acquire::Snapshots;' >"$dir/apt.conf"
    export APT_CONFIG=$dir/apt.conf
    trap 'tail -n +1 "$dir"/{err,out} >&2 || true' EXIT
    "$1"
}

main "$@"
