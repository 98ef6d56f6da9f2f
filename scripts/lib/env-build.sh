# shellcheck shell=bash
# Builds the cross-environment: checks free space, installs tools, chooses a complete Debian suite,
# builds the image, and downloads the crates.
#
# The suite is chosen before each build (scripts/lib/whole-suite). A built environment keeps its
# suite: /opt/rvmm/suite in it.

readonly ENV_NEEDS_MIB=6000
readonly ENV_PACKAGES=(buildah mmdebstrap debian-archive-keyring ca-certificates)
readonly ENV_OTHER_MIRROR="Use another mirror with RVMM_MIRROR=URL, set http_proxy and https_proxy if this machine needs them, or try again another day."
readonly ENV_OTHER_IMAGE="That is the engine's own download: check its proxy, its login and its limits, or try again another day."
readonly ENV_OTHER_REGISTRY="Try again later, or name a mirror of crates.io as cargo's source replacement in $RVMM_CACHE/cargo/config.toml."

# The steps before a build that all engines share.
env_prepare() {
    env_check_room
    env_take_proxies_of_apt
    if [[ $ENV_ENGINE == buildah ]]; then
        env_install_tools
    else
        env_pull_base
    fi
    env_choose_suite
    ENV_CONTEXT=$(cache_temp)
    cp "$RVMM_REPO/Dockerfile" "$ENV_CONTEXT"
    [[ ! -r $ENV_HOST_CA ]] || cp "$ENV_HOST_CA" "$ENV_CONTEXT/host-ca.crt"
    env_proxies --build-arg
    ENV_BUILD_ARGS=(--network host --build-arg "MIRROR=$ENV_MIRROR" --build-arg "SUITE=$ENV_SUITE" "${ENV_PROXY_ARGS[@]}")
}

# Use this machine's proxies of apt for the environment, too.
env_take_proxies_of_apt() {
    local proxy
    command -v apt-config >/dev/null || return 0
    for proxy in http https; do
        eval "$(apt-config shell "${proxy}_proxy_of_apt" "Acquire::$proxy::Proxy")"
        proxy=${proxy}_proxy
        local of_apt=${proxy}_of_apt
        [[ -n ${!proxy-} || -z ${!of_apt-} || ${!of_apt} == DIRECT ]] || export "$proxy=${!of_apt}"
    done
}

env_pull_base() {
    "$ENV_ENGINE" image inspect "$(env_base)" >/dev/null 2>&1 ||
        must_fetch "Get the base image" "$ENV_OTHER_IMAGE" "$ENV_ENGINE" pull "$(env_base)"
}

env_check_room() {
    local free
    free=$(df --output=avail --block-size=1M "$RVMM_CACHE" | tail -n 1 | tr -d " ")
    ((free >= ENV_NEEDS_MIB)) ||
        die "not enough space for the cross-environment: $RVMM_CACHE has $free MiB free and needs $ENV_NEEDS_MIB; free some, or set XDG_CACHE_HOME to a directory with more space"
}

env_install_tools() {
    env_has_tools ||
        must_fetch "Install ${ENV_PACKAGES[*]}" "apt-get update must work on this machine first." env_install
}

env_install() {
    export DEBIAN_FRONTEND=noninteractive
    local wait=(-o DPkg::Lock::Timeout=300)
    apt-get update
    apt-get install "${wait[@]}" --assume-yes --no-install-recommends "${ENV_PACKAGES[@]}"
}

# Sets ENV_MIRROR and ENV_SUITE. Prints one line with them and the suites that were passed over.
env_choose_suite() {
    local chosen passed_over version made
    chosen=$(cache_temp)/suite
    must_fetch "Choose the Debian suite" "$ENV_OTHER_MIRROR" env_whole_suite "$chosen"
    read -r ENV_MIRROR ENV_SUITE version made <"$chosen"
    passed_over=$(sed -nE 's/[.?]*$//; s/^not whole: //p' "$UI_LOG" | paste --serial --delimiters=';')
    ENV_FROM="Debian $version of $made: suite $ENV_SUITE of $ENV_MIRROR"
    say "$ENV_FROM${passed_over:+ (passed over: $passed_over)}"
}

# With an engine this runs in the base image, which has apt where this machine may have none.
env_whole_suite() {
    local args mirror=${RVMM_MIRROR-}
    [[ -n $mirror ]] || mirror=$(sh scripts/lib/whole-suite --mirror)
    if [[ $ENV_ENGINE == buildah ]]; then
        sh scripts/lib/whole-suite "$mirror" >"$1"
        return
    fi
    env_proxies --env
    args=(--rm --interactive --network host --security-opt label=disable "${ENV_PROXY_ARGS[@]}")
    [[ ! -r $ENV_HOST_CA ]] || args+=(--volume "$ENV_HOST_CA:/etc/ssl/certs/ca-certificates.crt:ro")
    "$ENV_ENGINE" run "${args[@]}" "$(env_base)" sh -s "$mirror" <scripts/lib/whole-suite >"$1"
}

# The name of the base image.
env_base() {
    sed -n 's/^FROM //p' "$RVMM_REPO/Dockerfile"
}

env_build_docker() {
    env_prepare
    must_fetch "Build the cross-environment with $ENV_ENGINE" "$ENV_OTHER_MIRROR" env_engine_build
    env_finish
}

env_build_podman() {
    env_build_docker
}

# Only a finished image gets the name.
env_engine_build() {
    "$ENV_ENGINE" build "${ENV_BUILD_ARGS[@]}" --tag "$ENV_NAME" "$ENV_CONTEXT"
}

# buildah: mmdebstrap makes a base with the name in FROM, the Dockerfile is built on it, and
# commands run in a container. The .done file says that the build is complete. Leftovers of an
# earlier attempt are removed first.
env_build_buildah() {
    env_prepare
    must_fetch "Make the Debian base with mmdebstrap" "$ENV_OTHER_MIRROR" env_make_base
    must_fetch "Build the cross-environment with buildah" "$ENV_OTHER_MIRROR" env_buildah_build
    env_finish
    touch "$RVMM_CACHE/env/$ENV_NAME.done"
}

env_finish() {
    printf '%s\n' "$ENV_FROM" >"$RVMM_CACHE/env/$ENV_NAME.from"
}

# mmdebstrap's mounts are in their own namespace, so that nothing is left if it is killed.
env_make_base() {
    local container dir tar
    dir=$(cache_temp)
    tar=$dir/base.tar
    TMPDIR=$dir unshare --mount \
        mmdebstrap --verbose --variant=minbase --architectures=amd64 "$ENV_SUITE" "$tar" "deb $ENV_MIRROR $ENV_SUITE main" || return
    env_drop_leftovers
    container=$(env_buildah from scratch) &&
        env_buildah add --quiet "$container" "$tar" / &&
        env_buildah commit --quiet --rm "$container" "$(env_base)" &&
        rm -rf "$dir"
}

env_buildah_build() {
    env_drop_leftovers
    env_buildah bud --isolation chroot --pull-never "${ENV_BUILD_ARGS[@]}" --tag "$ENV_NAME" "$ENV_CONTEXT" &&
        env_buildah from --pull-never --security-opt seccomp=unconfined --name "$ENV_NAME" "$ENV_NAME"
}

# Containers without a .done file are from builds that ended early. Images without a name are their
# layers.
env_drop_leftovers() {
    local name
    env_buildah containers --format '{{.ContainerName}}' | while read -r name; do
        [[ -e $RVMM_CACHE/env/$name.done ]] || env_buildah rm "$name"
    done
    env_buildah rmi --prune >/dev/null || true
}

# The packages with their own Cargo.lock.
readonly ENV_MANIFESTS=(Cargo.toml fuzz/Cargo.toml)

# The file that exists if all crates of each Cargo.lock are there. It is removed with them.
env_crates_mark() {
    local locks=("${ENV_MANIFESTS[@]/#/"$RVMM_REPO/"}")
    printf '%s/cargo/registry/fetched-%s' "$RVMM_CACHE" "$(cat "${locks[@]/%.toml/.lock}" | sha256sum | cut -c1-12)"
}

env_has_crates() {
    [[ -e $(env_crates_mark) ]]
}

# Download all crates at once, so that no later step needs a network.
env_fetch_crates() {
    must_fetch "Download the crates" "$ENV_OTHER_REGISTRY" env_cargo_fetch
    touch "$(env_crates_mark)"
}

# An interrupted download can leave a file that cargo accepts as complete and then cannot unpack.
env_cargo_fetch() {
    env_cargo_fetch_each && return
    grep -qE 'failed to unpack|checksum|corrupt' "$UI_LOG" || return 1
    rm -rf "$RVMM_CACHE"/cargo/registry/{cache,src,fetched-*}
    env_cargo_fetch_each
}

env_cargo_fetch_each() {
    local manifest
    for manifest in "${ENV_MANIFESTS[@]}"; do
        env_run cargo fetch --locked --manifest-path "$manifest" --target x86_64-unknown-linux-gnu --target "$RVMM_TRIPLE" || return
    done
}
