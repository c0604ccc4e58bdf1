#!/bin/sh
# Set up an arm64 Debian with the locked Anther on another machine:  sudo deploy/smoke/root.sh FOLDER
#
# It runs deploy/termux/install.sh under an emulated Pi 4 processor, for `make smoke-aarch64`. It needs Debian's
# debootstrap, qemu-user-static and binfmt-support, half an hour and 2 GB. If Anther is already installed there, it only
# mounts the required file systems: remove FOLDER/opt/anther to install again.
set -eu

here=$(cd "$(dirname "$0")/../.." && pwd)
root=${1:?"name a folder: deploy/smoke/root.sh FOLDER"}

[ -e "$root/etc/debian_version" ] || debootstrap --arch=arm64 --variant=minbase \
    --include=python3,python3-venv,ca-certificates,libgomp1 bookworm "$root"
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64
cp /etc/resolv.conf "$root/etc/resolv.conf"
[ -e "$root/proc/self" ] || mount -t proc proc "$root/proc"
[ -e "$root/dev/urandom" ] || mount --rbind --make-rslave /dev "$root/dev"
[ ! -x "$root/opt/anther/bin/python" ] || exit 0
mkdir -p "$root/srv/anther"
(cd "$here" && git archive HEAD) | tar -x -C "$root/srv/anther"
exec nice -n 15 chroot "$root" /usr/bin/env -i QEMU_CPU=cortex-a72 HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    ${PIP_CERT:+PIP_CERT="$PIP_CERT"} /srv/anther/deploy/termux/install.sh
