#!/bin/sh
# Install Anther on Raspberry Pi OS (64-bit) or Debian, 12 or later:  sudo deploy/install.sh [SOURCE]
#
# SOURCE and TORCH are as for deploy/venv.sh, which see: on a Pi neither has to be said. It makes
#
#   /opt/anther              a virtual environment, root's
#   anther                   a user without a password, in the group video (for a Pi's sensors) if there is one
#   /var/lib/anther          that user's: keys, adapters, ledger; never touched by this script once it is there
#   /etc/anther              server.conf: the words of `anther serve`; yours to change
#   anther-client, -server   units of systemd; enabled by you, once there is something to do
#   /usr/local/bin/anther    runs a command as that user: sudo anther device enroll data=FOLDER
#
# Done again it upgrades; what runs is started again. `deploy/install.sh --remove` removes all but /var/lib/anther,
# /etc/anther and the user.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
units="anther-client.service anther-server.service"

refuse() {
    echo "error: $*" >&2
    exit 2
}
booted() { [ -d /run/systemd/system ]; }

[ "$(id -u)" = 0 ] || refuse "sudo deploy/install.sh: it makes a user and units of systemd"
command -v apt-get >/dev/null || refuse "this is not Debian: deploy/venv.sh installs Anther alone, anywhere"

if [ "${1:-}" = --remove ]; then
    # shellcheck disable=SC2086 # two units
    ! booted || systemctl disable --now $units
    for unit in $units; do rm -f "/etc/systemd/system/$unit"; done
    ! booted || systemctl daemon-reload
    rm -rf /opt/anther /usr/local/bin/anther
    echo "Removed. /var/lib/anther and /etc/anther are still there: what was learnt, the ledger, keys."
    exit
fi

missing=
for package in python3 python3-venv ca-certificates libgomp1; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086 # several packages
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $missing >/dev/null
fi

getent passwd anther >/dev/null ||
    useradd --system --user-group --home-dir /var/lib/anther --no-create-home --shell /usr/sbin/nologin anther
! getent group video >/dev/null || usermod --append --groups video anther
install -d -o anther -g anther -m 0700 /var/lib/anther
install -d -m 0755 /etc/anther

"$here/venv.sh" /opt/anther "${1:-$(dirname "$here")}"

install -m 0755 "$here/anther" /usr/local/bin/anther
[ -e /etc/anther/server.conf ] || install -m 0644 "$here/systemd/server.conf" /etc/anther/server.conf
for unit in $units; do install -m 0644 "$here/systemd/$unit" "/etc/systemd/system/$unit"; done
if booted; then
    systemctl daemon-reload
    # shellcheck disable=SC2086 # two units
    systemctl try-restart $units
fi

cat <<'END'
Installed. A device:  sudo anther device enroll data=FOLDER
                      sudo systemctl enable --now anther-client
The server:           say in /etc/anther/server.conf what is to run, then
                      sudo systemctl enable --now anther-server
                      sudo anther keys ticket --holder NAME
END
