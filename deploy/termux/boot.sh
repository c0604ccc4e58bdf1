#!/data/data/com.termux/files/usr/bin/sh
# What Termux:Boot runs when the phone starts: this device's part, kept awake, and started again whatever ends it, but
# for what its owner has to do first (2; ~/anther.log says what).
termux-wake-lock
trap 'termux-wake-unlock' EXIT
while :; do
    proot-distro login debian -- /usr/local/bin/anther device run >>"$HOME/anther.log" 2>&1
    [ $? -ne 2 ] || break
    sleep 20
done
