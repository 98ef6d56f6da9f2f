# shellcheck shell=bash
# Cuts the power while a guest writes and syncs: kills QEMU, with L1, rvmm and the guest in it. Then
# a fresh L1 looks for every write that the guest was told is on disk.
#
#   powercut_keeps    with rvmm's ordinary cache nothing is missing
#   powercut_loses    with cache=unsafe, which ignores flushes, some are: so the first can fail

readonly POWERCUT_WRITES=150
readonly POWERCUT_LIMIT=300

powercut_keeps() {
    powercut writeback && ((POWERCUT_MISSING == 0))
}

powercut_loses() {
    powercut unsafe && ((POWERCUT_MISSING > 0))
}

# Sets POWERCUT_MISSING.
powercut() {
    local cache=$1 nonce=$RANDOM$RANDOM image synced
    image=$(cache_temp)/disk
    truncate --size=64M "$image"
    powercut_boot "$image" "$POWERCUT_WRITES" <<END
exec rvmm --kernel /guest/Image --initrd /payload/guests/virtio.cpio.gz --disk path=/dev/vda,cache=$cache \\
    --cmdline "console=ttyS0 quiet panic=-1 rvmm.action=writes rvmm.nonce=$nonce"
END
    synced=$(sed -nE 's/^rvmm-guest: synced ([0-9]+).*/\1/p' "$RIG_RUN/console" | tail -n 1)
    powercut_boot "$image" '' <<END
missing=0
for number in \$(seq ${synced:-0}); do
    dd if=/dev/vda bs=4096 skip=\$number count=1 2>/dev/null | grep -q "^write \$number $nonce\$" || missing=\$((missing + 1))
done
echo "missing \$missing"
END
    POWERCUT_MISSING=$(sed -nE 's/^missing ([0-9]+).*/\1/p' "$RIG_RUN/console")
    rm -rf "${image%/*}"
    printf 'cache=%s: %s of %s writes that were synced are missing\n' "$cache" "${POWERCUT_MISSING:-?}" "${synced:-?}"
    ((${synced:-0} >= POWERCUT_WRITES)) && [[ -n $POWERCUT_MISSING ]]
}

# Boots L1 with the image. Kills it once the guest has synced so many writes, or waits for its end.
powercut_boot() {
    local image=$1 writes=$2
    rig_begin aia </dev/null # stdin is the script
    rig_script
    # shellcheck disable=SC2034,SC2054 # rig_boot reads both; the commas are QEMU's
    RIG_DISKS=(-drive "file=$image,format=raw,if=none,id=cut,cache=writeback" -device virtio-blk-pci,drive=cut)
    # shellcheck disable=SC2034
    RIG_KILL=${writes:+rvmm-guest: synced $writes}
    rig_boot "$POWERCUT_LIMIT" >"$RIG_RUN/console" </dev/null || true
    # shellcheck disable=SC2034
    RIG_KILL=
}
