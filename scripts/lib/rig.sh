# shellcheck shell=bash
# The rig: builds rvmm and L1, boots L1 in QEMU, runs a payload in it, and gets its result.
#
#   rig_build            build rvmm (release, static riscv64), then the guests and L1's base
#   rig_next KIND...     get the newer kernel that a kind of host needs; fails if there is none
#   rig_begin KIND       start a payload for a kind of host; add files in $RIG_RUN/root/payload
#   rig_add_disk IMAGE   give L1 a disk, /dev/vda and so on, whose changes are discarded;
#                        `rig_add_disk IMAGE off` keeps them
#   rig_boot SECONDS     boot L1 with it, for SECONDS at most (0: no limit); the result is in
#                        $RIG_RUN/result
#   rig_status           the payload's exit status; fails if L1 reported none
#
# L1 consists of a kernel and an initramfs: a base, kept in the cache ($RIG_L1, with the kernel),
# and the payload behind it.

readonly RIG_KINDS=(aia aia-emul none)
# The same with a newer kernel in L1, if one is available.
readonly RIG_NEXT_KINDS=(aia-next none-next)
readonly RIG_GUESTS=$RVMM_TARGET/guests
readonly RIG_RVMM=$RVMM_TARGET/$RVMM_TRIPLE/release/rvmm

# L1's harts and memory, and more arguments for its QEMU.
RIG_CPUS=2
RIG_MEM=2G
RIG_QEMU=()
RIG_DISKS=()
# Kill QEMU as soon as its console has this line. If empty, let it end.
RIG_KILL=

RIG_L1=
RIG_L1_NEXT=
RIG_RUN=
RIG_TTY=
RIG_CHILD=

rig_build() {
    must "Build rvmm for riscv64" rig_build_rvmm
    rig_assemble
}

rig_build_rvmm() {
    env_run cargo build --release --locked --bin rvmm --target "$RVMM_TRIPLE"
}

rig_assemble() {
    must "Build the guests" env_run scripts/guests "$RIG_GUESTS"
    RIG_L1=$RVMM_CACHE/l1/$(rig_l1_key)
    [[ -e $RIG_L1 ]] || must "Assemble L1" rig_make_l1 "$RIG_L1" /opt/rvmm
}

rig_l1_key() {
    { printf '%s\n' "$ENV_NAME" "$(env_made_from)" "$@" && cat resources/rig/init scripts/lib/pack.sh; } | sha256sum | cut -c1-12
}

# L1 with the kernel in HOST. The directory gets its name when it is complete.
rig_make_l1() {
    local l1=$1 host=$2 new
    new=$(cache_temp)
    mkdir -p "$RVMM_CACHE/l1"
    env_run bash -c 'source scripts/lib/pack.sh && pack_l1_base "$1" "$2/base.cpio" "$3" && cp "$3/Image" "$2"' - \
        "$RVMM_REPO" "$new" "$host" && { mv --no-target-directory "$new" "$l1" 2>/dev/null || [[ -e $l1 ]]; }
}

# The newer kernel is kept until scripts/clean. RVMM_NEXT_KERNEL names a directory with the packages
# of another one.
rig_next() {
    local kind next
    for kind; do
        [[ $kind == *-next ]] || continue
        next=$RVMM_CACHE/l1/next-$(rig_next_key)
        [[ -e $next ]] || step "Get a newer kernel for L1" rig_get_next "$next" || return
        RIG_L1_NEXT=$RVMM_CACHE/l1/$(rig_l1_key "$(cat "$next/version")")
        [[ -e $RIG_L1_NEXT ]] || must "Assemble L1 with Linux $(cat "$next/version")" rig_make_l1 "$RIG_L1_NEXT" "$next"
        return
    done
}

rig_next_key() {
    {
        printf '%s\n' "$ENV_NAME" "${RVMM_NEXT_KERNEL-}" && cat scripts/lib/next-kernel scripts/lib/apt.sh
        [[ -z ${RVMM_NEXT_KERNEL-} ]] || sha256sum "$RVMM_NEXT_KERNEL"/*.deb
    } | sha256sum | cut -c1-12
}

rig_get_next() {
    local new debs=()
    new=$(cache_temp)
    if [[ -n ${RVMM_NEXT_KERNEL-} ]]; then
        debs=("$(cache_temp)")
        cp "$RVMM_NEXT_KERNEL"/*.deb "${debs[0]}"
    fi
    env_run scripts/lib/next-kernel "$new" "${debs[@]}" && { mv --no-target-directory "$new" "$1" 2>/dev/null || [[ -e $1 ]]; }
}

# The reason why the last rig_next failed, in one line.
rig_no_next() {
    sed -nE 's/[.?]*$//; s/^no newer kernel: //p' "$UI_LOG" | paste --serial --delimiters=';'
}

# Check an option that takes a kind of host.
rig_needs_kind() {
    needs_value "$@"
    rig_machine "$2" >/dev/null || wrong_usage "there is no kind of host '$2', only ${RIG_KINDS[*]} ${RIG_NEXT_KINDS[*]}"
}

# Prepare what every payload has: rvmm, the guests, and the expected kind of host.
rig_begin() {
    local kind=$1
    rig_cleanup
    RIG_RUN=$(cache_temp)
    RIG_KIND=$kind
    RIG_DISKS=()
    mkdir -p "$RIG_RUN"/root/payload/bin
    rig_add_program "$RIG_RVMM"
    cp -r "$RIG_GUESTS" "$RIG_RUN/root/payload/guests"
    rig_set RVMM_TEST_BIN /payload/bin/rvmm
    rig_set RVMM_TEST_HOST "${kind%-next}"
    rig_set RVMM_TEST_KERNEL /guest/Image
    rig_set RVMM_TEST_GUESTS /payload/guests
}

# Add a program that cargo built, without debug information.
rig_add_program() {
    env_run riscv64-linux-gnu-strip -o "$RIG_RUN/root/payload/bin/${1##*/}" "$1"
}

rig_add_disk() {
    local discard=${2:-on} id=disk$((${#RIG_DISKS[@]} / 4))
    RIG_DISKS+=(-drive "file=$1,format=raw,if=none,snapshot=$discard,id=$id" -device "virtio-blk-pci,drive=$id")
}

# Set a variable for the payload.
rig_set() {
    printf '%s=%q\n' "$1" "$2" >>"$RIG_RUN/root/payload/env"
}

# Set the payload's script, from stdin.
rig_script() {
    cat >"$RIG_RUN/root/payload/run"
}

rig_machine() {
    case ${1%-next} in
        aia) echo virt,aia=aplic-imsic,aia-guests=4 ;;
        aia-emul) echo virt,aia=aplic-imsic ;;
        none) echo virt ;;
        *) return 1 ;;
    esac
}

rig_boot() {
    local limit=$1 command
    : >"$RIG_RUN/result"
    : >"$RIG_RUN/log"
    rig_pack
    # shellcheck disable=SC2054 # the commas are QEMU's
    command=(
        qemu-system-riscv64 -M "$(rig_machine "$RIG_KIND")" -cpu rv64,h=true -smp "$RIG_CPUS" -m "$RIG_MEM" -no-reboot
        -nodefaults -display none -monitor none "${RIG_QEMU[@]}" "${RIG_DISKS[@]}"
        -kernel "$(rig_l1)/Image" -initrd "$RIG_RUN/initrd" -append "console=ttyS0 panic=-1"
        -serial "file:$RIG_RUN/l1.log"
        -device virtio-serial-pci
        -chardev stdio,signal=off,id=con -device virtconsole,chardev=con
        -chardev "file,id=result,path=$RIG_RUN/result" -device virtserialport,chardev=result,name=org.rvmm.result
        -chardev "file,id=log,path=$RIG_RUN/log" -device virtserialport,chardev=log,name=org.rvmm.log
    )
    if [[ -n $RIG_KILL ]]; then
        command=(bash -c "$RIG_KILLER" - "$RIG_KILL" "$RIG_RUN/console" "${command[@]}")
    fi
    env_run timeout --foreground --kill-after=5 "$limit" "${command[@]}"
}

# QEMU's output goes to the file $RIG_RUN/console, as it would go to the caller's.
readonly RIG_KILLER='
    line=$1 console=$2
    shift 2
    "$@" >"$console" &
    until grep -q "$line" "$console"; do
        kill -0 $! 2>/dev/null || exit 1
        sleep 0.2
    done
    kill -KILL $!'

rig_pack() {
    env_run bash -c 'source scripts/lib/pack.sh && { cat "$1" && pack_dir "$2"; } >"$3"' - \
        "$(rig_l1)/base.cpio" "$RIG_RUN/root" "$RIG_RUN/initrd"
}

# The directory of L1 for this kind of host.
rig_l1() {
    if [[ $RIG_KIND == *-next ]]; then printf '%s' "$RIG_L1_NEXT"; else printf '%s' "$RIG_L1"; fi
}

# The "done" record is L1's last. Without it, L1 ended early.
rig_status() {
    local status
    status=$(sed -n 's/^done \([0-9]*\)$/\1/p' "$RIG_RUN/result")
    [[ -n $status ]] && printf '%s' "$status"
}

# The time limit for a command in L1 in seconds: the user's, or this default.
rig_limit() {
    [[ ${RVMM_TIMEOUT:-$1} =~ ^[0-9]+$ ]] || wrong_usage "RVMM_TIMEOUT is '$RVMM_TIMEOUT', and no number of seconds"
    printf '%s' "${RVMM_TIMEOUT:-$1}"
}

# Put the user's terminal into raw mode, so that every key goes to the guest.
rig_terminal() {
    RIG_TTY=$(stty --save)
    local size
    size=$(rig_winsize)
    rig_set RIG_WINSIZE "${size:-80x24}"
    stty raw -echo
}

# Its columns and rows, as 80x24, after a prefix. Nothing if the terminal does not know them.
rig_winsize() {
    stty size | sed -nE "s/^([1-9][0-9]*) ([1-9][0-9]*)\$/${1-}\\2x\\1/p"
}

rig_terminal_back() {
    [[ -z $RIG_TTY ]] || stty "$RIG_TTY"
    RIG_TTY=
}

# Called on every way out: restores the terminal, ends L1, removes the files of the run.
rig_cleanup() {
    if [[ -n $RIG_CHILD ]]; then
        pkill -TERM -P "$RIG_CHILD" || true
        wait "$RIG_CHILD" || true
        RIG_CHILD=
    fi
    rig_terminal_back
    [[ -z $RIG_RUN ]] || rm -rf "$RIG_RUN"
    RIG_RUN=
}

# For the scripts that run one command in L1: boot, print errors, end with its status.
rig_run() {
    local limit=$1 status ended=0
    rig_boot "$limit" <&0 & # in the background, so that a signal ends it at once
    RIG_CHILD=$!
    wait "$RIG_CHILD" || ended=$?
    RIG_CHILD=
    rig_terminal_back
    # timeout's status if the time is over.
    ((ended != 124)) || die "ended after $limit s: RVMM_TIMEOUT=SECONDS sets another limit"
    if ! status=$(rig_status); then
        say "L1 ended without a result; the end of its log:"
        tail -n 15 "$RIG_RUN/l1.log" | sed 's/^/    | /' >&2
        return 123
    fi
    return "$status"
}
