#!/bin/sh
# Install Anther on an Android phone, inside a Debian that Termux's PRoot runs (docs/deploy.md has the whole way):
#
#   in Termux     pkg install proot-distro termux-api && proot-distro install debian
#                 git clone … anther && proot-distro login debian --bind "$PWD/anther:/srv/anther"
#   in Debian     /srv/anther/deploy/termux/install.sh
#                 anther device enroll data=FOLDER
#
# SOURCE and TORCH are as for deploy/venv.sh; the lock's PyTorch runs on any 64-bit ARM. It makes /opt/anther,
# /usr/local/bin/anther (which keeps its state in ~/.anther), and where it sees Termux's home a script there that
# Termux:Boot runs when the phone starts. Done again it upgrades.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
termux=/data/data/com.termux/files
boot=${BOOT:-$termux/home/.termux/boot}

[ "$(id -u)" = 0 ] || {
    echo "error: log in to PRoot's Debian as it does by itself, as root: proot-distro login debian" >&2
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
# One of Anther's commands:  anther device enroll data=FOLDER
export ANTHER_HOME="$HOME/.anther" PYTHONUNBUFFERED=1
exec /opt/anther/bin/anther "$@"
END
chmod 755 /usr/local/bin/anther

if [ -d "$termux/home" ] || [ -n "${BOOT:-}" ]; then
    mkdir -p "$boot"
    install -m 0755 "$here/boot.sh" "$boot/anther"
    echo "Termux:Boot will start it with the phone: $boot/anther; run that in Termux to start it now."
else
    echo "Termux's home isn't visible here: copy $here/boot.sh to ~/.termux/boot/anther in Termux yourself."
fi
