# shellcheck shell=bash
# A small Debian for guests, on a disk. Packages of the cross-environment are installed in an
# emulated machine.
#
#   debian_build         make $DEBIAN_IMAGE, an ext4 file system, unless it is there
#
# The image is never changed afterwards: those who boot it use a throw-away overlay.

readonly DEBIAN_SIZE=1G
readonly DEBIAN_LIMIT=1800
DEBIAN_IMAGE=

debian_build() {
    DEBIAN_IMAGE=$RVMM_CACHE/l1/debian-$(debian_key).img
    [[ -e $DEBIAN_IMAGE ]] || must "Install a Debian for guests" debian_install
}

debian_key() {
    { printf '%s\n' "$ENV_NAME" "$(env_made_from)" && cat resources/debian/* scripts/lib/debian.sh; } | sha256sum | cut -c1-12
}

debian_install() {
    local work status=0
    work=$(cache_temp)
    debian_unpack "$work" && debian_boot "$work" && mv "$work/image" "$DEBIAN_IMAGE" || status=$?
    rm -rf "$work"
    return "$status"
}

# All packages unpacked, and also the packages as files without compression, from which dpkg
# registers them. No documentation except licences, no translations. Includes the modules that a
# guest has loaded by the time this disk is mounted, so that modprobe finds them.
debian_unpack() {
    env_run bash -euc '
        work=$1
        root=$work/root
        mkdir -p "$root/debs"
        dpkg-deb --extract /opt/rvmm/debian/base-files_*.deb "$root"
        for deb in /opt/rvmm/debian/*.deb; do
            dpkg-deb --extract "$deb" "$root"
            dpkg-deb --raw-extract "$deb" "$work/one"
            dpkg-deb --build -Znone "$work/one" "$root/debs/${deb##*/}"
            rm -r "$work/one"
        done
        rm -rf "$root"/usr/share/{info,lintian,locale,man}/*
        find "$root/usr/share/doc" -not -type d -not -name copyright -delete
        find "$root/usr/share/doc" -type d -empty -delete
        install -m 644 -D resources/debian/dpkg.cfg "$root/etc/dpkg/dpkg.cfg.d/rvmm"
        install -m 755 resources/debian/configure "$root/configure"
        version=$(modinfo --field vermagic /opt/rvmm/modules/ext4.ko | cut -d" " -f1)
        modules=$root/usr/lib/modules/$version/kernel
        mkdir -p "$modules"
        while read -r name; do cp "/opt/rvmm/modules/$name.ko" "$modules"; done </opt/rvmm/modules/guest
        touch "$modules"/../modules.{order,builtin,builtin.modinfo}
        depmod --basedir "$root" "$version"
        mke2fs -q -t ext4 -L rvmm-debian -d "$root" "$work/image" "$2"
        rm -r "$root"
    ' - "$1" "$DEBIAN_SIZE"
}

debian_boot() {
    local work=$1
    # shellcheck disable=SC2054 # the commas are QEMU's
    local command=(
        qemu-system-riscv64 -M virt -smp 2 -m 1G -no-reboot -nodefaults -display none -monitor none
        -kernel "$RIG_L1/Image" -initrd "$RIG_GUESTS/virtio.cpio.gz"
        -append "console=ttyS0 panic=-1 root=/dev/vda rvmm.init=/configure"
        -drive "file=$work/image,format=raw,if=none,id=root,cache=unsafe,discard=unmap"
        -device virtio-blk-pci,drive=root -serial "file:$work/console"
    )
    env_run timeout --foreground --kill-after=5 "$DEBIAN_LIMIT" "${command[@]}"
    cat "$work/console"
    grep -q '^rvmm: configured' "$work/console" && env_run e2fsck -f -n "$work/image"
}
