# shellcheck shell=bash
# Moves a guest to another host: freezes a Debian under load, to a disk that outlives L1. The guest
# goes on after L1 was rebooted, and in an L1 of another QEMU. resources/rig/migrate is what L1 does.
#
#   migrate_disk          make the disk, $MIGRATE_DISK
#   migrate_reboot KIND   freeze the guest, reboot L1, and go on
#   migrate_again KIND    go on in a new QEMU, from the same snapshot

readonly MIGRATE_LIMIT=900
MIGRATE_DISK=

migrate_disk() {
    MIGRATE_DISK=$(cache_temp)/disk
    env_run mke2fs -q -t ext4 "$MIGRATE_DISK" 2G
}

migrate_reboot() {
    # shellcheck disable=SC2034 # rig_boot reads it
    RIG_QEMU=(-action reboot=reset)
    migrate_again "$1"
}

migrate_again() {
    local status
    rig_begin "$1"
    cp resources/rig/migrate "$RIG_RUN/root/payload/run"
    rig_add_disk "$DEBIAN_IMAGE"
    rig_add_disk "$MIGRATE_DISK" off
    rig_boot "$MIGRATE_LIMIT" >"$RIG_RUN/console" || true
    status=$(rig_status) || status='no status'
    tr -d '\r' <"$RIG_RUN/console"
    [[ $status == 0 ]]
}
