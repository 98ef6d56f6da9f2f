# shellcheck shell=bash
# The benchmark's L1: one hart, and a clock that counts instructions.

# 1 instruction is 1 ns, and waiting takes no time: the clock runs the same on every machine.
BENCH_CLOCK=(-icount "shift=0,sleep=off")
BENCH_HARTS=1
BENCH_L1='1 hart'
# L1's memory: enough for a hundred guests.
readonly BENCH_MEM=3G
readonly BENCH_GROUPS=(boot hugeboot log init firstbyte exits pages processes memory blk net snapshot clones)
readonly BENCH_LIMIT=5400
readonly BENCH_PROGRAMS=(floor disk-floor restore-floor bench-suite guest-io)
# The user's directory: the scripts work in the repository.
BENCH_CALLER=$OLDPWD

# Two harts instead, and this machine's time.
bench_by_wall_clock() {
    BENCH_CLOCK=()
    BENCH_HARTS=2
    BENCH_L1='2 harts, by the wall clock'
}

bench_check_groups() {
    local group
    for group in ${1//,/ }; do
        [[ " ${BENCH_GROUPS[*]} " == *" $group "* ]] || wrong_usage "there is no group '$group' (there are ${BENCH_GROUPS[*]})"
    done
}

bench_build() {
    rig_build
    must "Build the floor and the driver" \
        env_run cargo build --release --locked "${BENCH_PROGRAMS[@]/#/--example=}" --target "$RVMM_TRIPLE"
}

# A payload with the contestants, and the measurements outside L1.
bench_begin() {
    local kind=$1 repetitions=$2 only=$3 program root bare=
    rig_begin "$kind"
    # shellcheck disable=SC2034 # rig_boot reads them
    RIG_CPUS=$BENCH_HARTS RIG_MEM=$BENCH_MEM RIG_QEMU=("${BENCH_CLOCK[@]}")
    root=$RIG_RUN/root
    env_run cp -r /opt/rvmm/qemu/. "$root"
    for program in "${BENCH_PROGRAMS[@]}"; do
        rig_add_program "$RVMM_TARGET/$RVMM_TRIPLE/release/examples/$program"
    done
    must "Pack the guest that measures disks and networks" bench_pack_io
    if [[ -z $only || ,$only, == *,init,* ]]; then
        must "Boot without a hypervisor" bench_bare "$kind" "$repetitions"
        bare=$(bench_stamps)
    fi
    rig_set RVMM_BENCH_HOST "$kind"
    rig_set RVMM_BENCH_L1 "$BENCH_L1"
    rig_set RVMM_BENCH_REPETITIONS "$repetitions"
    rig_set RVMM_BENCH_ONLY "$only"
    rig_set RVMM_BENCH_BARE "$bare"
    rig_set RVMM_BENCH_SIZE "$([[ -n $only ]] || bench_sizes)"
    rig_script <<'END'
mkdir /dev/hugepages
mount -t hugetlbfs none /dev/hugepages
tunctl -t bench0 >/dev/null
ip addr add 10.99.0.1/24 dev bench0
ip link set bench0 up
exec bench-suite
END
}

# The guest's initramfs with the modules for virtio, and the program behind it.
bench_pack_io() {
    local work=$RIG_RUN/io
    mkdir -p "$work/bin"
    env_run riscv64-linux-gnu-strip -o "$work/bin/guest-io" "$RVMM_TARGET/$RVMM_TRIPLE/release/examples/guest-io"
    env_run bash -c 'source scripts/lib/pack.sh && { cat "$1" && pack_dir "$2" | gzip -n; } >"$3"' - \
        "$RIG_GUESTS/virtio.cpio.gz" "$work" "$RIG_RUN/root/payload/guests/io.cpio.gz"
    rm -r "$work"
}

bench_boot() {
    rig_boot "$BENCH_LIMIT"
}

# Boots the guest of the group "init" on L0. Each boot adds a line "[    0.841366] Run /init ..." to
# $RIG_RUN/bare.
bench_bare() {
    local kind=$1 repetitions=$2 run
    : >"$RIG_RUN/bare"
    for ((run = 0; run < repetitions; run++)); do
        rm -f "$RIG_RUN/bare.one"
        env_run timeout --foreground --kill-after=5 300 qemu-system-riscv64 -M "$(rig_machine "$kind")" -cpu rv64,h=true -smp 1 -m 256M \
            "${BENCH_CLOCK[@]}" -no-reboot -nodefaults -display none -monitor none -serial "file:$RIG_RUN/bare.one" \
            -kernel "$RIG_L1/Image" -initrd "$RIG_GUESTS/initramfs.cpio.gz" \
            -append "console=ttyS0 quiet panic=-1 rvmm.action=clock" || return
        grep -h '\] Run /init' "$RIG_RUN/bare.one" >>"$RIG_RUN/bare" || return
    done
}

# The timestamps of those lines, in milliseconds.
bench_stamps() {
    sed -E 's/^\[ *([0-9.]+)\].*/\1/' "$RIG_RUN/bare" | awk '{ printf "%.3f ", $1 * 1000 }'
}

# rvmm's stripped size, and the size of its symbols by crate, largest first: words PART=BYTES.
bench_sizes() {
    printf 'all=%d' "$(stat --format %s "$RIG_RUN/root/payload/bin/rvmm")"
    env_run riscv64-linux-gnu-nm --demangle --print-size --size-sort --radix=d "$RIG_RVMM" | bench_by_crate
}

# Reads nm's lines "address size type symbol". A symbol belongs to the first path in its name; one
# without a path is C's.
bench_by_crate() {
    awk '
        {
            size = $2 + 0; type = $3; $1 = $2 = $3 = ""; name = $0
            if (type ~ /[bB]/) next
            part = "libc"
            if (match(name, /[A-Za-z_][A-Za-z0-9_]*::/)) part = substr(name, RSTART, RLENGTH - 2)
            if (part ~ /^(std|core|alloc|compiler_builtins|hashbrown|gimli|addr2line|rustc_demangle|miniz_oxide|object|memchr)$/)
                part = "std"
            sum[part] += size
        }
        END { for (part in sum) print sum[part], part }' | sort -rn | awk '{ printf " %s=%d", $2, $1 }'
}

# Other VMMs: NAME=PROGRAM ARGUMENTS. The program's path is relative to the caller's directory.
bench_check_peers() {
    local peer name names=" rvmm rvmm/mmio qemu floor floor+aia bare " program
    for peer; do
        name=${peer%%=*}
        [[ $peer == *=* && $name =~ ^[a-z0-9_-]+$ ]] || wrong_usage "--peer '$peer' is not NAME=COMMAND, with a NAME of a-z, 0-9, _ and -"
        [[ $names != *" $name "* ]] || wrong_usage "--peer $name: there is a contestant of that name"
        names+="$name "
        program=$(bench_peer_program "$peer")
        [[ -f $program ]] || wrong_usage "--peer $name: there is no program '$program'"
        bench_is_riscv64 "$program" || wrong_usage "--peer $name: '$program' is no program for riscv64"
    done
}

bench_peer_program() {
    local command=${1#*=}
    bench_path "${command%% *}"
}

# Checks the start of the ELF file: 64 bits, EM_RISCV.
bench_is_riscv64() {
    [[ $(od -An -tx1 -N20 "$1" | tr -d ' \n') =~ ^7f454c4602.{26}f300$ ]]
}

# The absolute path of a file that is relative to the caller's directory.
bench_path() {
    [[ $1 == /* ]] || printf '%s/' "$BENCH_CALLER"
    printf '%s' "$1"
}

# Adds another build of rvmm.
bench_add_before() {
    install -m 755 "$1" "$RIG_RUN/root/payload/bin/before"
    rig_set RVMM_BENCH_BEFORE before
}

# Adds the programs of the peers, which were checked.
bench_add_peers() {
    local peer name command lines='' bin=$RIG_RUN/root/payload/bin/peer
    mkdir -p "$bin"
    for peer; do
        name=${peer%%=*} command=${peer#*=}
        install -m 755 "$(bench_peer_program "$peer")" "$bin/$name"
        lines+="$name=/payload/bin/peer/$name${command#"${command%% *}"}"$'\n'
    done
    rig_set RVMM_BENCH_PEERS "$lines"
}

# Prints the table of L1's report, if there is one, and writes the JSON to a file.
bench_report() {
    local out=$RVMM_TARGET/bench-$1.json
    [[ -s $RIG_RUN/log ]] || return 0
    sed '1,/^=== json$/d' "$RIG_RUN/log" >"$out"
    sed '/^=== json$/,$d' "$RIG_RUN/log"
    say "All samples are in $out"
}

bench_fail() {
    ui_show_log
    die "the benchmark failed; its output is in $UI_LOG"
}
