# shellcheck shell=bash
# The cross-environment that the Dockerfile defines: build it once, run commands in it.
#
#   env_up             build it if need be; every script calls this first
#   env_run COMMAND    run a command in it, in the current directory, with this repository and the cache at their own paths
#
# An engine (Docker, Podman) does it where one answers; without one, buildah does, which needs root and Debian.

readonly ENV_NEEDS_MIB=6000
readonly ENV_HOST_CA=/etc/ssl/certs/ca-certificates.crt
readonly ENV_PACKAGES=(buildah mmdebstrap debian-archive-keyring ca-certificates)
readonly ENV_PROXIES=(http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY)

ENV_ENGINE=
ENV_NAME=

env_up() {
    local start=$EPOCHREALTIME
    mkdir -p "$RVMM_CACHE"/{env,cargo,home}
    env_choose_engine
    ENV_NAME=rvmm-env-$(env_key)
    env_is_built && return
    exec {lock}>"$RVMM_CACHE/lock"
    flock --nonblock "$lock" || {
        say "another run is building the cross-environment; waiting for it"
        flock "$lock"
    }
    env_is_built || "env_build_$ENV_ENGINE"
    exec {lock}>&-
    say "[$(ui_since "$start") s] The cross-environment is ready$(ui_downloaded "$UI_BYTES")"
}

# One short name for all that it is made from.
env_key() {
    {
        cat "$RVMM_REPO/Dockerfile"
        [[ $ENV_ENGINE != buildah ]] || declare -f env_make_base env_buildah_build
    } | sha256sum | cut -c1-12
}

env_choose_engine() {
    local engine
    for engine in ${RVMM_ENGINE:-docker podman}; do
        [[ $engine != buildah ]] || break
        command -v "$engine" >/dev/null || continue
        timeout 10 "$engine" info >/dev/null 2>&1 || continue
        ENV_ENGINE=$engine
        return
    done
    env_check_bare_host
    ENV_ENGINE=buildah
}

# Without an engine: this machine must be one that buildah can be installed and run on.
env_check_bare_host() {
    local id
    id=$(. /etc/os-release 2>/dev/null && printf '%s' "${ID-} ${VERSION_ID-}")
    env_has_tools || [[ $id =~ ^debian\ 1[23]$ ]] ||
        die "no container engine answers, and only on Debian 12 or 13 can this go on without one (this is '${id:-unknown}'): install and start Docker or Podman"
    ((EUID == 0)) || die "not root, and no container engine answers: run this as root, or install and start Docker or Podman"
}

env_has_tools() {
    command -v buildah >/dev/null && command -v mmdebstrap >/dev/null
}

env_is_built() {
    case $ENV_ENGINE in
        buildah) [[ -e $RVMM_CACHE/env/$ENV_NAME.done ]] ;;
        *) "$ENV_ENGINE" image inspect "$ENV_NAME" >/dev/null 2>&1 ;;
    esac
}

# Wherever commands run it is without the engine's own filter of system calls: unit tests use io_uring.
#
# Everything the three engines share before a cold build: room, a mirror, and the build's context.
env_prepare() {
    local free
    free=$(df --output=avail --block-size=1M "$RVMM_CACHE" | tail -n 1 | tr -d " ")
    ((free >= ENV_NEEDS_MIB)) || die "not enough space for the cross-environment: $RVMM_CACHE has $free MiB free and needs $ENV_NEEDS_MIB; free some, or set XDG_CACHE_HOME to a roomier place"
    ENV_MIRROR=$(env_mirror)
    [[ -z $ENV_MIRROR ]] || env_check_network "$ENV_MIRROR"
    ENV_CONTEXT=$(mktemp -d "$RVMM_CACHE/env/context.XXXXXX")
    cp "$RVMM_REPO/Dockerfile" "$ENV_CONTEXT"
    [[ ! -r $ENV_HOST_CA ]] || cp "$ENV_HOST_CA" "$ENV_CONTEXT/host-ca.crt"
    ENV_BUILD_ARGS=(--network host --build-arg "MIRROR=$ENV_MIRROR")
    local name
    for name in "${ENV_PROXIES[@]}"; do
        [[ -z ${!name-} ]] || ENV_BUILD_ARGS+=(--build-arg "$name=${!name}")
    done
}

# The mirror of Debian that this machine itself uses; nothing on other distributions.
env_mirror() {
    grep -qs '^ID=debian$' /etc/os-release || return 0
    local codename
    codename=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
    apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 2>/dev/null |
        sed -nE "s|^(https?://[^ ]*[^ /])/* +$codename main\$|\\1|p" | head -n 1
}

env_check_network() {
    local helper=/usr/lib/apt/apt-helper probe=$RVMM_CACHE/env/probe.$$
    [[ -x $helper ]] || return 0
    timeout 60 "$helper" -o Acquire::Retries=0 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15 \
        download-file "$1/dists/trixie/InRelease" "$probe" >/dev/null 2>&1 ||
        die "cannot download from the Debian mirror $1: connect this machine to the network, or set http_proxy and https_proxy"
    rm -f "$probe"
}

env_build_docker() {
    env_prepare
    must "Build the cross-environment with $ENV_ENGINE" env_engine_build
    rm -rf "$ENV_CONTEXT"
}

env_build_podman() {
    env_build_docker
}

# The name is given only to a finished image.
env_engine_build() {
    "$ENV_ENGINE" build "${ENV_BUILD_ARGS[@]}" --tag "$ENV_NAME" "$ENV_CONTEXT"
}

env_buildah() {
    buildah --root "$RVMM_CACHE/storage" --runroot "$RVMM_CACHE/storage-run" "$@"
}

# buildah: a base made by mmdebstrap under the name that FROM gives, the Dockerfile on it, a container to run things in.
# Each is done when its .done file is there, and what an earlier attempt left half done goes first.
env_build_buildah() {
    env_prepare
    if ! env_has_tools; then
        must "Install ${ENV_PACKAGES[*]}" env_install
    fi
    must "Make the Debian base with mmdebstrap" env_make_base "$ENV_MIRROR"
    must "Build the cross-environment with buildah" env_buildah_build
    touch "$RVMM_CACHE/env/$ENV_NAME.done"
    rm -rf "$ENV_CONTEXT"
}

env_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install --assume-yes --no-install-recommends "${ENV_PACKAGES[@]}"
}

env_make_base() {
    local container tar=$RVMM_CACHE/env/base.tar
    mmdebstrap --verbose --variant=minbase --architectures=amd64 trixie "$tar" "deb $1 trixie main" || return
    env_drop_leftovers
    container=$(env_buildah from scratch) &&
        env_buildah add --quiet "$container" "$tar" / &&
        env_buildah commit --quiet --rm "$container" "$(sed -n 's/^FROM //p' "$RVMM_REPO/Dockerfile")" &&
        rm "$tar"
}

env_buildah_build() {
    env_buildah bud --isolation chroot --pull-never "${ENV_BUILD_ARGS[@]}" --tag "$ENV_NAME" "$ENV_CONTEXT" &&
        env_buildah from --pull-never --security-opt seccomp=unconfined --name "$ENV_NAME" "$ENV_NAME"
}

# Containers without a .done file: of builds that ended early.
env_drop_leftovers() {
    local name
    env_buildah containers --format '{{.ContainerName}}' | while read -r name; do
        [[ -e $RVMM_CACHE/env/$name.done ]] || env_buildah rm "$name"
    done
}

# Run a command in the environment. stdin, stdout and stderr are the caller's; the exit status is the command's.
env_run() {
    local args=() name
    env_volumes
    for name in "${ENV_PROXIES[@]}" TERM RUSTDOCFLAGS; do
        [[ -z ${!name-} ]] || args+=(--env "$name=${!name}")
    done
    args+=(--env "HOME=$RVMM_CACHE/home" --env "CARGO_HOME=$RVMM_CACHE/cargo" --env "CARGO_TARGET_DIR=$RVMM_TARGET")
    case $ENV_ENGINE in
        buildah)
            env_buildah run --isolation chroot "${ENV_VOLUMES[@]}" "${args[@]}" --workingdir "$PWD" "$ENV_NAME" -- "$@"
            ;;
        docker)
            docker run --rm --init --interactive --network host --security-opt seccomp=unconfined --user "$(id -u):$(id -g)" \
                "${ENV_VOLUMES[@]}" "${args[@]}" --workdir "$PWD" "$ENV_NAME" "$@"
            ;;
        podman) # without root, its root is this user
            podman run --rm --init --interactive --network host --security-opt seccomp=unconfined \
                "${ENV_VOLUMES[@]}" "${args[@]}" --workdir "$PWD" "$ENV_NAME" "$@"
            ;;
    esac
}

env_volumes() {
    ENV_VOLUMES=(--volume "$RVMM_REPO:$RVMM_REPO" --volume "$RVMM_CACHE:$RVMM_CACHE")
    [[ ! -r $ENV_HOST_CA ]] || ENV_VOLUMES+=(--volume "$ENV_HOST_CA:/etc/ssl/certs/ca-certificates.crt:ro")
    [[ $ENV_ENGINE != buildah || ! -r /etc/resolv.conf ]] || ENV_VOLUMES+=(--volume "/etc/resolv.conf:/etc/resolv.conf:ro")
}
