#!/bin/sh
# Lock the packages of a server and a device:  make locks
#
# Every package has the version in .venv, with which the tests ran. PyTorch depends on the machine: aarch64.txt has its
# CPU build; x86_64.txt has none, since the registry's build for x86-64 is made for CUDA, and deploy/venv.sh installs the
# one that TORCH=… names. No CUDA package is included. build.txt has the packages that build wheels of the two packages
# that come as source: ANTLR's runtime, and Anther.
#
# Versions are resolved for Python 3.11, the oldest. Hashes cover all files of a version, so 3.12 and 3.13 use the same.
set -eu
cd "$(dirname "$0")/../.."

PYTHON=3.11
ON_ARM=2.9.1 # 2.10 uses instructions that a Pi 4 lacks; later versions need CUDA's libraries
ON_X86=2.13.0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip freeze --exclude-editable --exclude anther --exclude torch --exclude setuptools >"$work/installed"

compile() { # compile INPUT OPTIONS…: print a lock of INPUT
    .venv/bin/uv pip compile --quiet --no-config --python-version "$PYTHON" --constraint "$work/installed" \
        --generate-hashes --no-annotate --no-header --only-binary :all: --no-binary antlr4-python3-runtime "$@"
}

lock() { # lock FILE INPUT OPTIONS…
    file=deploy/locks/$1 && shift
    echo "# Made by \`make locks\`." >"$work/lock"
    compile "$@" >>"$work/lock"
    cp "$work/lock" "$file"
    echo "$file: $(grep -c == "$file") packages"
}

printf 'hatchling\nsetuptools>=70.1\n' >"$work/build"
lock build.txt "$work/build"

echo "torch==$ON_ARM" >"$work/arm"
lock aarch64.txt pyproject.toml --python-platform aarch64-manylinux_2_28 --constraint "$work/arm"

echo "torch==$ON_X86" >"$work/x86"
compile pyproject.toml --python-platform x86_64-manylinux_2_28 --constraint "$work/x86" \
    | sed -n 's/^\(\(nvidia\|cuda\)-[^=]*\|triton\)==.*/\1/p' >"$work/cuda"
lock x86_64.txt pyproject.toml --python-platform x86_64-manylinux_2_28 --constraint "$work/x86" \
    --excludes "$work/cuda" --no-emit-package torch
