#!/bin/sh
# Install Anther on an Android phone, in a Debian under Termux's PRoot (docs/deploy.md has all steps):
#
#   in Termux     pkg install proot-distro termux-api && proot-distro install debian
#                 git clone … anther && proot-distro login debian --bind "$PWD/anther:/srv/anther"
#   in Debian     /srv/anther/deploy/termux/install.sh
#                 anther device enroll data=FOLDER
#
# SOURCE and TORCH are those of deploy/venv.sh; the lock's PyTorch runs on any 64-bit ARM. It creates /opt/anther,
# /usr/local/bin/anther (with its state in ~/.anther), and, if Termux's home is visible, a script in it that Termux:Boot
# runs when the phone starts. Running it again upgrades.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
termux=/data/data/com.termux/files
boot=${BOOT:-$termux/home/.termux/boot}

[ "$(id -u)" = 0 ] || {
    echo "error: log in to PRoot's Debian as root, the default: proot-distro login debian" >&2
    exit 2
}
missing=
for package in python3 python3-venv ca-certificates libgomp1; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086 # several packages
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $missing >/dev/null
fi

"$here/../venv.sh" /opt/anther "${1:-$(dirname "$(dirname "$here")")}"

cat >/usr/local/bin/anther <<'END'
#!/bin/sh
# Run an Anther command:  anther device enroll data=FOLDER
export ANTHER_HOME="$HOME/.anther" PYTHONUNBUFFERED=1
exec /opt/anther/bin/anther "$@"
END
chmod 755 /usr/local/bin/anther

if [ -d "$termux/home" ] || [ -n "${BOOT:-}" ]; then
    mkdir -p "$boot"
    install -m 0755 "$here/boot.sh" "$boot/anther"
    echo "Termux:Boot will run $boot/anther when the phone starts; run it in Termux to start now."
else
    echo "Termux's home isn't visible here: copy $here/boot.sh to ~/.termux/boot/anther in Termux."
fi
