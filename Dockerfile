# The cross-environment: everything rvmm is built, checked and run with, and the only list of it.
#
# scripts/lib/env.sh builds it with Docker or Podman, or without an engine on a base made by mmdebstrap. By hand:
#
#     docker build --tag rvmm-env .
#
# One suite, Debian trixie's main, so that amd64 and riscv64 are of the same age.
FROM debian:trixie-slim

# Empty: the mirror that the base image came with.
ARG MIRROR=
# A suite whose codename is trixie: scripts/lib/whole-suite prints one that the mirror has whole for both architectures.
ARG SUITE=trixie

# The host's certificate authorities, where the context has them (Dockerfile is there so that COPY finds something).
COPY Dockerfile host-ca.crt* /opt/rvmm/
RUN set -eu; \
    sources="/etc/apt/sources.list /etc/apt/sources.list.d/*"; \
    mirror=${MIRROR:-$(sed -nE 's/^(URIs:|deb) *([a-z]+:[^ ]+).*/\2/p' $sources 2>/dev/null | head -n 1)}; \
    rm -f $sources; \
    echo "deb ${mirror%/} $SUITE main" | tee /etc/apt/sources.list >/opt/rvmm/suite; \
    printf 'Package: *\nPin: release n=trixie\nPin-Priority: 1001\n' >/etc/apt/preferences.d/rvmm; \
    { echo 'APT::Install-Recommends "false";'; \
      echo 'APT::Get::Assume-Yes "true";'; \
      echo 'Acquire::Languages "none";'; \
      echo 'Acquire::Retries "3";'; \
      echo 'APT::Update::Error-Mode "any";'; \
      ! [ -s /opt/rvmm/host-ca.crt ] || echo 'Acquire::https::CAInfo "/opt/rvmm/host-ca.crt";'; \
    } >/etc/apt/apt.conf.d/90rvmm; \
    dpkg --add-architecture riscv64

# The toolchain for x86-64 and riscv64, the emulator, and what the scripts call. A base image can be newer than the suite: the same
# package for two architectures must have one version, so what is newer goes back to the suite's.
RUN set -eu; export DEBIAN_FRONTEND=noninteractive; \
    apt-get update; \
    apt-get dist-upgrade --allow-downgrades; \
    apt-get install \
        binutils-riscv64-linux-gnu ca-certificates cargo cpio device-tree-compiler e2fsprogs gcc gcc-riscv64-linux-gnu git gpg gpg-agent kmod \
        libc6-dev libc6-dev-riscv64-cross libstd-rust-dev libstd-rust-dev:riscv64 qemu-system-riscv qemu-user rust-clippy \
        rustc rustfmt shellcheck xz-utils; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /usr/share/doc /usr/share/man

# What riscv64 runs, unpacked and never installed: the kernel of L1 and of the guest, their modules and the order to load them in,
# one static busybox, U-Boot.
# The kernel's package is named by what its metapackage depends on.
RUN set -eu; cd /opt/rvmm; \
    apt-get update; \
    linux=$(apt-cache depends linux-image-riscv64:riscv64 | sed -nE 's/^ *Depends: (linux-image-[0-9][^ ]*)$/\1/p'); \
    : "${linux:?"linux-image-riscv64 depends on no kernel in this suite"}"; \
    apt-get download "$linux" busybox-static:riscv64 u-boot-qemu; \
    for deb in *.deb; do dpkg-deb --extract "$deb" root; done; \
    mkdir modules; \
    mv root/boot/vmlinux-* Image; \
    mv root/boot/config-* config; \
    mv root/usr/bin/busybox busybox; \
    mv root/usr/lib/u-boot/qemu-riscv64_smode/u-boot.bin u-boot.bin; \
    [ -e root/lib ] || ln -s usr/lib root/lib; \
    [ -e root/usr/lib ] || { mkdir -p root/usr; ln -s ../lib root/usr/lib; }; \
    version=${linux#linux-image-}; version=${version%%:*}; \
    depmod --basedir root "$version"; \
    load() { \
        list=$1; shift; \
        modprobe --dirname root --set-version "$version" --show-depends --all "$@" | \
            sed -nE 's/^insmod ([^ ]*).*/\1/p' | awk '!seen[$0]++' | \
            while read -r file; do \
                name=$(basename "$file" | sed 's/[.]ko.*//'); \
                case $file in *.xz) xz -dc "$file" >"modules/$name.ko" ;; *) cp "$file" "modules/$name.ko" ;; esac; \
                echo "$name"; \
            done >"modules/$list"; \
    }; \
    load host kvm tun vhost_net virtio_blk loop ext4; \
    load guest virtio_mmio virtio_blk virtio_net virtio_rng virtio_input evdev autofs4 ext4; \
    [ -s modules/kvm.ko ] && [ -s modules/virtio_net.ko ]; \
    rm -rf root ./*.deb /var/lib/apt/lists/* /var/cache/apt/*.bin

# QEMU for riscv64, which the benchmarks run beside rvmm: the program and the libraries it loads. apt resolves them as on a
# riscv64 machine with nothing installed.
RUN set -eu; cd /opt/rvmm; mkdir debs; \
    apt-get update; \
    apt-get install --download-only -o APT::Architecture=riscv64 -o APT::Architectures=riscv64 \
        -o Dir::State::status=/dev/null -o Dir::Cache::archives=/opt/rvmm/debs qemu-system-riscv; \
    for deb in debs/*.deb; do dpkg-deb --extract "$deb" root; done; \
    lib=usr/lib/riscv64-linux-gnu; mkdir -p qemu/lib qemu/usr/bin "qemu/$lib"; \
    cp root/usr/bin/qemu-system-riscv64 qemu/usr/bin; \
    cp -L root/usr/lib/ld-linux-riscv64-lp64d.so.1 qemu/lib; \
    todo=qemu/usr/bin/qemu-system-riscv64; \
    while [ -n "$todo" ]; do \
        next=; \
        for name in $(riscv64-linux-gnu-readelf -d $todo | sed -nE 's/.*NEEDED.*\[(.*)\]/\1/p' | sort -u); do \
            [ -e "qemu/lib/$name" ] || [ -e "qemu/$lib/$name" ] || \
                { cp -L "root/$lib/$name" "qemu/$lib/$name"; next="$next qemu/$lib/$name"; }; \
        done; \
        todo=$next; \
    done; \
    rm -rf root debs /var/lib/apt/lists/* /var/cache/apt/*.bin

# The packages of a small Debian for riscv64, which a guest boots from a disk: what every Debian has, an init, and the programs
# that test disks and networks. scripts/lib/debian.sh installs them, in an emulated machine.
RUN set -eu; mkdir -p /opt/rvmm/debian; cd /opt/rvmm/debian; \
    apt-get update; \
    apt() { \
        "$@" -o APT::Architecture=riscv64 -o APT::Architectures=riscv64 -o Dir::State::status=/dev/null \
            -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=; \
    }; \
    base=$(apt apt-cache dumpavail | awk '/^Package:/ { p = $2 } /^(Essential: yes|Priority: required)/ { print p }' | \
        sort -u | grep -v '^apt$'); \
    apt apt-get install --download-only -o Dir::Cache::archives=/opt/rvmm/debian \
        $base systemd-sysv dbus udev fio iperf3 iproute2 e2fsprogs kmod; \
    rm -rf partial lock /var/lib/apt/lists/* /var/cache/apt/*.bin

# For riscv64, cargo links statically (L1 has no libraries) and runs tests in user-mode emulation.
ENV CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_LINKER=riscv64-linux-gnu-gcc \
    CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
    CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_RUNNER=qemu-riscv64
