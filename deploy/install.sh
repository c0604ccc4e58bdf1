#!/bin/sh
# Install Anther on Raspberry Pi OS (64-bit) or Debian, 12 or later:  sudo deploy/install.sh [SOURCE]
#
# SOURCE and TORCH are those of deploy/venv.sh; a Pi needs neither. It creates
#
#   /opt/anther              a virtual environment, owned by root
#   anther                   a user without a password, in the group video (for a Pi's sensors) if it exists
#   /var/lib/anther          that user's keys, adapters and ledger; this script never changes an existing one
#   /etc/anther              server.conf: arguments of `anther serve`, for you to edit
#   anther-client, -server   systemd units; enable them after the configuration
#   /usr/local/bin/anther    runs a command as that user: sudo anther device enroll data=FOLDER
#
# Running it again upgrades, and restarts running units. `deploy/install.sh --remove` removes everything except
# /var/lib/anther, /etc/anther and the user.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
units="anther-client.service anther-server.service"

refuse() {
    echo "error: $*" >&2
    exit 2
}
booted() { [ -d /run/systemd/system ]; }

[ "$(id -u)" = 0 ] || refuse "run sudo deploy/install.sh: it creates a user and systemd units"
command -v apt-get >/dev/null || refuse "this is not Debian: deploy/venv.sh installs only Anther, on any system"

if [ "${1:-}" = --remove ]; then
    # shellcheck disable=SC2086 # two units
    ! booted || systemctl disable --now $units
    for unit in $units; do rm -f "/etc/systemd/system/$unit"; done
    ! booted || systemctl daemon-reload
    rm -rf /opt/anther /usr/local/bin/anther
    echo "Removed. Kept /var/lib/anther and /etc/anther: adapters, the ledger, keys."
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
The server:           edit /etc/anther/server.conf, then
                      sudo systemctl enable --now anther-server
                      sudo anther keys ticket --holder NAME
END
