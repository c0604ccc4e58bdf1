#!/data/data/com.termux/files/usr/bin/sh
# Termux:Boot runs this when the phone starts: `anther device run` with a wake lock, restarted after any exit except
# status 2, after which the owner has to act (~/anther.log says how).
termux-wake-lock
trap 'termux-wake-unlock' EXIT
while :; do
    proot-distro login debian -- /usr/local/bin/anther device run >>"$HOME/anther.log" 2>&1
    [ $? -ne 2 ] || break
    sleep 20
done
