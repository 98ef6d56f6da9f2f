# shellcheck shell=bash
# Makes initramfs archives. Runs where the cross-tools are: in the cross-environment, or on a
# riscv64 machine.

readonly PACK_ENV=/opt/rvmm

# Write a directory as a cpio archive to stdout: owned by root, in a fixed order.
pack_dir() {
    (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=+0:+0 --reproducible)
}

# Make a riscv64 root directory with busybox under all its names.
pack_busybox() {
    local root=$1 busybox=$PACK_ENV/busybox emulator=qemu-riscv64 name
    [[ -e $busybox ]] || busybox=$(command -v busybox)
    [[ $(uname -m) != riscv64 ]] || emulator=
    mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,tmp,root,etc}
    cp "$busybox" "$root/bin/busybox"
    for name in $($emulator "$busybox" --list); do
        [[ $name == busybox ]] || ln -s /bin/busybox "$root/bin/$name"
    done
    # Pid 1 is a script here, which does not react to the signal of busybox's poweroff. With -f,
    # poweroff does not need pid 1. The alias is for interactive shells.
    printf "alias %s='%s -f'\n" poweroff poweroff reboot reboot halt halt >"$root/etc/shrc"
}

# Copy the modules in a list, without the symbols that only debuggers need. These are most of each
# module, and loading them takes most of a small guest's boot. The modules lose their signature,
# which the kernel notes but does not require.
pack_modules() {
    local from=$1 list=$2 to=$3 name
    mkdir -p "$to"
    while read -r name; do
        riscv64-linux-gnu-strip --strip-debug --discard-locals -o "$to/$name.ko" "$from/$name.ko"
    done <"$from/$list"
}

# The Linux guest's initramfs, with the modules for virtio and disks if their directory is given.
pack_guest_initramfs() {
    local repo=$1 out=$2 modules=${3-} root
    root=$(mktemp -d)
    pack_busybox "$root"
    install -m 755 "$repo/resources/initramfs/init" "$root/init"
    if [[ -n $modules ]]; then
        pack_modules "$modules" guest "$root/modules"
        cp "$modules/guest" "$root/modules/order"
    fi
    pack_dir "$root" | gzip -9n >"$out.tmp"
    mv "$out.tmp" "$out"
    rm -rf "$root"
}

# The part of L1's initramfs that is the same in every run: busybox, KVM, the guest's kernel, init.
# KVM belongs to the kernel in HOST.
pack_l1_base() {
    local repo=$1 out=$2 host=$3 root
    root=$(mktemp -d)
    pack_busybox "$root"
    mkdir "$root/guest"
    cp "$PACK_ENV/Image" "$root/guest/Image"
    pack_modules "$host/modules" host "$root/modules"
    cp "$host/modules/host" "$root/modules"
    install -m 755 "$repo/resources/rig/init" "$root/init"
    pack_dir "$root" >"$out.tmp"
    mv "$out.tmp" "$out"
    rm -rf "$root"
}
