# shellcheck shell=sh
# Gets packages for riscv64 with apt, in the cross-environment, apart from the packages that are
# installed there.
#
#   apt_configure WORK SUITE   use WORK for everything, and this suite of the environment's mirror
#   run COMMAND...             run a command; its output goes to WORK/log

# From this machine's settings for apt, take only those for reaching a mirror.
apt_configure() {
    work=$1
    read -r _ mirror _ </opt/rvmm/suite
    mkdir -p "$work/lists/partial" "$work/archives/partial"
    apt-config dump | grep -E '^Acquire::https?(::|[ "])' >"$work/kept" || true
    export APT_CONFIG="$work/conf"
    cat "$work/kept" - <<END >"$work/conf"
APT::Architecture "riscv64";
APT::Architectures { "riscv64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::Etc::SourceList "$work/sources";
Dir::Etc::SourceParts "/dev/null";
Dir::State "$work";
Dir::State::Lists "$work/lists";
Dir::State::status "/dev/null";
Dir::Cache "$work";
Dir::Cache::archives "$work/archives";
Acquire::Languages "none";
END
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $2 main" >"$work/sources"
}

run() {
    "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; return 1; }
    # The count of downloaded bytes uses these lines.
    grep '^Fetched' "$work/log" >&2 || true
}
