#!/bin/sh
# Create a virtual environment with only Anther and the packages of its lock:  deploy/venv.sh FOLDER [SOURCE]
#
# SOURCE   a wheel of Anther, or a folder with its source (default: the folder of this file)
# TORCH    arguments of pip in place of the lock's PyTorch, for example TORCH="torch==2.13.0 --index-url …". Required on
#          x86-64: the CPU wheels are in PyTorch's own index (pytorch.org, Get Started, CPU); those in Python's registry
#          are built for CUDA. On aarch64 the lock has a CPU build.
# PYTHON   the interpreter, 3.11 to 3.13 (default: python3)
#
# Running it again applies changes. Every file except TORCH's is checked against the lock's hash; nothing is resolved.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?"name a folder: deploy/venv.sh FOLDER [SOURCE]"}
source=${2:-$(dirname "$here")}
python=${PYTHON:-python3}

refuse() {
    echo "error: $*" >&2
    exit 2
}

case $(uname -m) in
x86_64 | amd64) lock=$here/locks/x86_64.txt ;;
aarch64 | arm64) lock=$here/locks/aarch64.txt ;;
*) refuse "$(uname -m): no lock for this architecture, only for 64-bit ARM and x86; a Raspberry Pi needs the 64-bit system" ;;
esac
grep -q '^torch==' "$lock" || [ -n "${TORCH:-}" ] || refuse "TORCH: set it to a PyTorch, the CPU wheel or one for your" \
    "GPU: TORCH=\"torch==2.13.0 --index-url …\"; pytorch.org's install page has the index"
[ -e "$source" ] || refuse "$source: no such wheel or folder"
"$python" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 14) and sys.maxsize > 2**32))' ||
    refuse "$python: Anther needs a 64-bit Python, 3.11 to 3.13; set PYTHON=…"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install() {
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps "$@"
}

echo "$folder: installing PyTorch and the locked packages (minutes on a small board) …"
"$python" -m venv "$folder"
install --require-hashes --requirement "$here/locks/build.txt"
cp "$lock" "$work/lock"
if [ -n "${TORCH:-}" ]; then
    # shellcheck disable=SC2086 # split into words
    install $TORCH
    awk '/^[a-z]/ { torch = /^torch==/ } !torch' "$lock" >"$work/lock" # drop the requirement and the lines of its hashes
fi
install --use-pep517 --no-build-isolation --require-hashes --requirement "$work/lock"
install --no-build-isolation --force-reinstall "$source"
"$folder/bin/python" -m pip --disable-pip-version-check check
cd / # import the installed packages, not the source
"$folder/bin/python" -c 'import importlib.metadata as m, torch, client.runtime.supervisor, client.runtime.worker, server.supervisor.run
print("Anther", m.version("anther"), "with PyTorch", torch.__version__, "and Flower", m.version("flwr"))'
