# shellcheck shell=bash
# What the long cases of the debugger compare rvmm with.
#
#   gdb_build        make $GDB_IMAGE, a disk with gdb-multiarch for L1, unless it is there
#   gdb_emulate FILE run resources/guests/stepping.S in QEMU, without KVM and rvmm, and write the pc
#                    of each instruction to FILE, a line each

GDB_IMAGE=

gdb_build() {
    GDB_IMAGE=$RVMM_CACHE/l1/gdb-$(gdb_key).img
    [[ -e $GDB_IMAGE ]] || must "Get GDB for L1" gdb_get
}

gdb_key() {
    { printf '%s\n' "$ENV_NAME" "$(env_made_from)" && cat scripts/lib/apt.sh scripts/lib/gdb-image; } | sha256sum | cut -c1-12
}

gdb_get() {
    local work
    work=$(cache_temp)
    env_run scripts/lib/gdb-image "$work/image" && mv "$work/image" "$GDB_IMAGE"
}

# The hart has no H extension here, so that the CSR of the hypervisor causes the same trap as in a
# guest of rvmm. With -icount, a nanosecond of its clock is one instruction: no timer fires.
gdb_emulate() {
    local out=$1
    # shellcheck disable=SC2054 # the commas are QEMU's
    local command=(
        qemu-system-riscv64 -M virt -cpu rv64,h=false -m 128M -no-reboot -nodefaults -display none -monitor none
        -accel tcg,one-insn-per-tb=on -icount shift=0 -d exec,nochain -dfilter 0x80200000..0x80210000 -D "$out.log"
        -kernel "$RIG_GUESTS/stepping.elf" -serial stdio
    )
    env_run timeout --foreground --kill-after=5 60 "${command[@]}" >"$out.console" || return
    # "Trace CPU: HOST [CS_BASE/PC/FLAGS/CFLAGS] NAME"
    sed -nE 's|^Trace [0-9]+: [^ ]+ \[[0-9a-f]+/([0-9a-f]+)/.*|\1|p' "$out.log" >"$out"
    rm "$out.log"
    grep -q '^sum 12100' "$out.console"
}
