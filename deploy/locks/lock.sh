#!/bin/sh
# Lock what a server and a device install:  make locks
#
# Of every package the version that .venv holds, which is what the tests ran with; of PyTorch the one for the kind of
# machine: aarch64.txt has its CPU build, x86_64.txt has none, since there the registry's is made for CUDA, and
# deploy/venv.sh takes it from where it is told (TORCH=…). No package is CUDA's. build.txt is what builds wheels of the
# two packages that come as source: ANTLR's runtime, and Anther.
#
# Resolved for Python 3.11, the oldest; hashes are those of all of a version's files, so 3.12 and 3.13 take the same.
set -eu
cd "$(dirname "$0")/../.."

PYTHON=3.11
ON_ARM=2.9.1 # 2.10 has instructions that cores of a Pi 4 lack, later ones need CUDA's libraries
ON_X86=2.13.0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip freeze --exclude-editable --exclude anther --exclude torch --exclude setuptools >"$work/held"

compile() { # compile INPUT MORE…: a lock of INPUT on standard output
    .venv/bin/uv pip compile --quiet --no-config --python-version "$PYTHON" --constraint "$work/held" \
        --generate-hashes --no-annotate --no-header --only-binary :all: --no-binary antlr4-python3-runtime "$@"
}

lock() { # lock FILE INPUT MORE…
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
