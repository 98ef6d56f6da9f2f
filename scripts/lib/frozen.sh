# shellcheck shell=bash
# A Debian guest frozen at its login: a snapshot of rvmm, on a disk for L1.
#
#   frozen_build KIND    make $FROZEN_IMAGE for a kind of host, unless it is there. It is an ext4 file
#                        system with the snapshot `login`. $DEBIAN_IMAGE has to be there: the
#                        guest's disk, /dev/vda in L1
#   frozen_forget        remove it, because it does not fit any more
#
# Its name depends on what it is made from, except on rvmm. Another rvmm may still be able to
# restore it; if not, it says so.

readonly FROZEN_SIZE=1536M
readonly FROZEN_LIMIT=900
FROZEN_IMAGE=

frozen_build() {
    FROZEN_IMAGE=$RVMM_CACHE/l1/login-$(frozen_key "$1").img
    [[ -e $FROZEN_IMAGE ]] || must "Boot a Debian to its login, and freeze it" frozen_make "$1"
}

frozen_key() {
    { printf '%s\n' "$1" "$DEBIAN_IMAGE" "$(RIG_KIND=$1 rig_l1)" && cat scripts/lib/frozen.sh; } | sha256sum | cut -c1-12
}

frozen_forget() {
    rm -f "$FROZEN_IMAGE"
}

frozen_make() {
    local work
    work=$(cache_temp)
    env_run mke2fs -q -t ext4 -L rvmm-frozen "$work/image" "$FROZEN_SIZE" || return
    rig_begin "$1"
    rig_add_disk "$DEBIAN_IMAGE"
    rig_add_disk "$work/image" off
    frozen_script | rig_script
    rig_boot "$FROZEN_LIMIT" && [[ $(rig_status) == 0 ]] && mv "$work/image" "$FROZEN_IMAGE"
}

# The guest is paused when Enter is pressed. So a restored guest prints its prompt again.
frozen_script() {
    cat <<'END'
mkdir -p /mnt && mount -t ext4 /dev/vdb /mnt || exit
mkfifo /tmp/keys
rvmm --kernel /guest/Image --initrd /payload/guests/virtio.cpio.gz --mem 512M --ctl /tmp/ctl \
    --disk path=/dev/vda,snapshot=on,snapshot-dir=/tmp --cmdline "console=ttyS0 quiet root=/dev/vda" \
    </tmp/keys >/tmp/console &
exec 3>/tmp/keys
until grep -q 'login: ' /tmp/console; do
    kill -0 $! || exit
    sleep 0.2
done
rvmm ctl /tmp/ctl pause && echo >&3 && rvmm ctl /tmp/ctl snapshot /mnt/login && rvmm ctl /tmp/ctl stop || exit
cat /tmp/console
umount /mnt
END
}
