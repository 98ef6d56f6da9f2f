#!/usr/bin/env bash
# The set-up's decisions, against mirrors made here: which suite the environment is made from, and what a download that fails leads to.
#
#     tests/setup.sh --list         the cases
#     tests/setup.sh DIR            run them in DIR; records as resources/rig/run-tests writes them on stdout, the rest on stderr
#
# Runs in the cross-environment: apt, gpg, xz and HTTP do here what they do with real mirrors.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly HOUR=3600

# --- the cases: a function each, in this order ---------------------------------------------------------------------------------------

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
    said "trixie: $site/$name/debian/dists/trixie/main/binary-riscv64/Packages.xz: File has unexpected size"
}

suite_stale_amd64() {
    make_suite trixie
    make_stale trixie amd64
    make_suite stable
    chosen stable
    said "trixie: $site/$name/debian/dists/trixie/main/binary-amd64/Packages.xz: File has unexpected size"
}

suite_index_missing() {
    make_suite trixie
    rm -r "$mirror/dists/trixie/main/binary-riscv64"
    make_suite stable
    chosen stable
    said "trixie: $site/$name/debian/dists/trixie/main/binary-riscv64/Packages.*: 404"
}

suite_other_bytes_of_the_same_size() {
    make_suite trixie
    printf x | dd of="$mirror/dists/trixie/main/binary-riscv64/Packages.xz" bs=1 seek=20 conv=notrunc status=none
    make_suite stable
    chosen stable
    said "trixie: $site/$name/debian/dists/trixie/main/binary-riscv64/Packages.xz: Hash Sum mismatch"
}

suite_without_riscv64() {
    make_suite trixie "" amd64
    make_suite stable
    chosen stable
    said "trixie: it has no packages for riscv64"
}

suite_expired() {
    make_suite trixie "Valid-Until: $(date_of -$HOUR)"
    make_suite stable
    chosen stable
    said "trixie: Release file for $site/$name/debian/dists/trixie/InRelease is expired"
}

suite_codename_moved_on() {
    make_suite trixie
    make_stale trixie riscv64
    codename=forky make_suite stable
    none_chosen
    said "stable: it is forky now"
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
    said "trixie: .*$site/$name/debian trixie InRelease.*[Mm]issing key"
}

suite_unsigned() {
    make_suite trixie
    rm "$mirror/dists/trixie/InRelease"
    make_suite stable
    chosen stable
    said "trixie: "
}

suite_no_such_mirror() {
    none_chosen
    said "trixie: The repository '$site/$name/debian trixie Release' does not have a Release file"
    said "stable: The repository '$site/$name/debian stable Release' does not have a Release file"
}

suite_unreachable() {
    url=http://127.0.0.1:9/debian
    none_chosen
    said "trixie: http://127.0.0.1:9/debian/dists/trixie/InRelease: .* connect to 127.0.0.1:9"
}

fetch_comes_back() {
    fetch_with "unreachable unreachable fine"
    [[ $status == 0 && $tries == 3 ]]
    said "Get it: http://mirror/file: Could not connect to mirror:80.*; trying again in 0 s"
}

fetch_gives_up() {
    fetch_with "unreachable unreachable unreachable fine"
    [[ $status == 123 && $tries == 3 ]]
    said "^setup.sh: Get it: http://mirror/file: Could not connect to mirror:80.*. Another day. (All it said is in .*)$"
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
    said "^setup.sh: Get it: .*No space left on device. Another day."
}

# --- what they are made with ---------------------------------------------------------------------------------------------------------

# A suite of two architectures, signed, whole: make_suite NAME [FIELD [ARCHITECTURES]]
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
    # Listed and not there, as on real mirrors.
    find "$top" -name Packages -delete
    gpg --quiet --batch --yes --local-user ours --clearsign --output "$top/InRelease" "$dir/Release"
}

make_index() {
    local to=$1/main/binary-$2
    mkdir -p "$to"
    printf 'Package: thing\nVersion: %s\nArchitecture: %s\nFilename: pool/thing.deb\nSize: 1\nSHA256: %064d\n' "$3" "$2" 0 >"$to/Packages"
    xz --force --keep "$to/Packages"
}

# The index of an architecture is of another day than the Release file.
make_stale() {
    make_index "$mirror/dists/$1" "$2" "1 of another day"
    rm "$mirror/dists/$1/main/binary-$2/Packages"
}

make_key() {
    gpg --quiet --batch --passphrase '' --quick-generate-key "$1" rsa2048 sign never
    gpg --quiet --batch --export "$1" >"$dir/$1.gpg"
}

# Seconds from when this began, as Release files write it.
date_of() {
    LC_ALL=C date --utc --date "@$((made + $1))" '+%a, %d %b %Y %H:%M:%S UTC'
}

whole_suite() {
    sh "$repo/scripts/lib/whole-suite" "${url:-$site/$name/debian}" "$keyring" >"$dir/out" 2>"$dir/err"
}

# Serves the files below the current directory by HTTP; prints the port.
serve() {
    perl -MIO::Socket::INET -e '
        $| = 1;
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

# The choice is this suite, of this URL (a pattern).
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

# must_fetch on a command that fails in these ways, one for each try; sets $status and $tries.
fetch_with() {
    status=0
    tr ' ' '\n' <<<"$1" >"$dir/ways"
    bash -euc '
        RVMM_TARGET=$1/target RVMM_CACHE=$1/cache ways=$1/ways
        source "$2/scripts/lib/ui.sh" && source "$2/scripts/lib/fetch.sh"
        FETCH_PAUSES=(0 0)
        download() {
            local way
            way=$(head -n 1 "$ways")
            sed -i 1d "$ways"
            case $way in
                fine) return ;;
                unreachable) echo "E: Failed to fetch http://mirror/file  Could not connect to mirror:80 (192.0.2.1). - connect (111: Connection refused) [IP: 192.0.2.1 80]" ;;
                missing) echo "E: Failed to fetch http://mirror/file  404  Not Found [IP: 192.0.2.1 80]" ;;
                crate) printf "error: failed to get x\n\nCaused by:\n  failed to download from \`https://registry/config.json\`\n\nCaused by:\n  [6] Could not resolve hostname (Could not resolve host: registry)\n" ;;
                full) echo "dpkg: error: No space left on device" ;;
            esac
            return 1
        }
        must_fetch "Get it" "Another day." download
    ' setup.sh "$dir" "$repo" 2>"$dir/err" || status=$?
    tries=$(($(wc -w <<<"$1") - $(wc -l <"$dir/ways")))
}

# --- running them --------------------------------------------------------------------------------------------------------------------

cases() {
    sed -nE 's/^((suite|fetch)_[a-z0-9_]+)\(\) \{$/\1/p' "$repo/tests/setup.sh" | grep -v '^fetch_with$'
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
    export GNUPGHOME=$PWD/gnupg
    mkdir -m 700 "$GNUPGHOME"
    made=$(($(date +%s) - HOUR))
    dir=$PWD make_key ours
    coproc SERVER { serve; }
    read -r port <&"${SERVER[0]}"
    export made site=http://127.0.0.1:$port
    for name in $(cases); do
        # A process of its own: its first command that fails ends it.
        if bash "$repo/tests/setup.sh" --case "$name"; then
            echo "setup ok $name"
        else
            echo "setup failed $name"
            status=1
        fi
    done
    kill "$SERVER_PID"
    gpgconf --kill all
    echo "setup exit $status"
}

run() {
    name=$1 dir=$PWD/$1 mirror=$PWD/$1/debian keyring=$PWD/ours.gpg
    mkdir "$dir"
    trap 'tail -n +1 "$dir"/{err,out} >&2 || true' EXIT
    "$1"
}

main "$@"
