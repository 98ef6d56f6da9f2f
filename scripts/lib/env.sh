# shellcheck shell=bash
# The cross-environment that the Dockerfile defines. It is built once, and commands run in it.
#
#   env_up             build it if need be; every script calls this first
#   env_run COMMAND    run a command in it, in the current directory, with this repository and the cache at their own paths
#
# A container engine (Docker, Podman) does this if one answers. Otherwise buildah does, which needs
# root and Debian. A built environment needs no network. scripts/lib/env-build.sh builds it.

readonly ENV_PROXIES=(http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY)
# This machine's certificate authorities: where Debian, Fedora and SUSE have them.
for ENV_HOST_CA in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem; do
    [[ ! -r $ENV_HOST_CA ]] || break
done

ENV_ENGINE=
ENV_NAME=

env_up() {
    local start=$EPOCHREALTIME
    mkdir -p "$RVMM_CACHE"/{env,cargo/registry,home}
    cache_begin
    env_choose_engine
    ENV_NAME=rvmm-env-$(env_key)
    env_is_built && env_has_crates && return
    exec {lock}>"$RVMM_CACHE/lock"
    flock --nonblock "$lock" || {
        say "another run is building the cross-environment; waiting for it"
        flock "$lock"
    }
    env_is_built || "env_build_$ENV_ENGINE"
    env_has_crates || env_fetch_crates
    exec {lock}>&-
    say "[$(ui_since "$start") s] The cross-environment is ready$(ui_downloaded "$UI_BYTES")"
}

# A short name that depends on everything the environment is made from.
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

# Without an engine, buildah must be installed or installable on this machine.
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

env_buildah() {
    buildah --root "$RVMM_CACHE/storage" --runroot "$RVMM_CACHE/storage-run" "$@"
}

# What the environment was made from, in one line; nothing if an engine has it from elsewhere.
env_made_from() {
    cat "$RVMM_CACHE/env/$ENV_NAME.from" 2>/dev/null || true
}

# Run a command in the environment. stdin, stdout and stderr are the caller's; the exit status is
# the command's. The engine's filter of system calls is off, because unit tests use io_uring.
env_run() {
    local args=() engine
    env_volumes
    env_proxies --env
    args=("${ENV_VOLUMES[@]}" "${ENV_PROXY_ARGS[@]}")
    [[ -z ${TERM-} ]] || args+=(--env "TERM=$TERM")
    [[ -z ${RUSTDOCFLAGS-} ]] || args+=(--env "RUSTDOCFLAGS=$RUSTDOCFLAGS")
    args+=(--env "HOME=$RVMM_CACHE/home" --env "CARGO_HOME=$RVMM_CACHE/cargo" --env "CARGO_TARGET_DIR=$RVMM_TARGET")
    engine=(--rm --init --interactive --network host --security-opt seccomp=unconfined --security-opt label=disable)
    case $ENV_ENGINE in
        buildah)
            env_buildah_run "$@"
            ;;
        docker)
            docker run "${engine[@]}" --user "$(id -u):$(id -g)" "${args[@]}" --workdir "$PWD" "$ENV_NAME" "$@"
            ;;
        podman) # without root, its root is this user
            podman run "${engine[@]}" "${args[@]}" --workdir "$PWD" "$ENV_NAME" "$@"
            ;;
    esac
}

# For env_run, whose "args" this uses. buildah's programs first copy themselves into a sealed memory
# file, and fail if the host's kernel holds a page of it at that moment (EBUSY). The command has not
# begun then, so this tries again.
env_buildah_run() {
    local begun status _
    begun=$(mktemp --dry-run "$CACHE_WORK/begun.XXXXXX")
    for _ in 1 2 3; do
        status=0
        # shellcheck disable=SC2016 # for the inner shell
        env_buildah run --isolation chroot "${args[@]}" --workingdir "$PWD" "$ENV_NAME" -- \
            /bin/sh -c ': >"$1"; shift; exec "$@"' env "$begun" "$@" || status=$?
        if ((status != 1)) || [[ -e $begun ]]; then break; fi
    done
    rm -f "$begun"
    return "$status"
}

env_volumes() {
    ENV_VOLUMES=(--volume "$RVMM_REPO:$RVMM_REPO" --volume "$RVMM_CACHE:$RVMM_CACHE")
    [[ ! -r $ENV_HOST_CA ]] || ENV_VOLUMES+=(--volume "$ENV_HOST_CA:/etc/ssl/certs/ca-certificates.crt:ro")
    [[ $ENV_ENGINE != buildah || ! -r /etc/resolv.conf ]] || ENV_VOLUMES+=(--volume "/etc/resolv.conf:/etc/resolv.conf:ro")
}

# Sets ENV_PROXY_ARGS: this machine's proxies, each after a flag (--env or --build-arg).
env_proxies() {
    local name
    ENV_PROXY_ARGS=()
    for name in "${ENV_PROXIES[@]}"; do
        [[ -z ${!name-} ]] || ENV_PROXY_ARGS+=("$1" "$name=${!name}")
    done
}
