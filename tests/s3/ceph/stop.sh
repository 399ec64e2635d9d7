#!/bin/bash
# stop.sh DATA_DIR
# Stops the daemons of start.sh by the ids they recorded, and waits until they are gone. SIG=KILL pulls the plug.
DATA=$(cd "$1" && pwd) || exit 1
stopped=()
for daemon in rgw osd mon; do
  file=$DATA/run/$daemon.pid
  [ -s "$file" ] || continue
  id=$(cat "$file")
  signal=${SIG:-TERM}
  # The gateway keeps no state, and its orderly exit can take two minutes.
  [ $daemon = rgw ] && signal=KILL
  # Only what is ours: an id may belong to another process by now.
  if tr '\0' ' ' <"/proc/$id/cmdline" 2>/dev/null | grep -qF "$DATA/ceph.conf"; then
    kill -"$signal" "$id" 2>/dev/null && stopped+=("$id")
  fi
  rm -f "$file"
done
for id in "${stopped[@]}"; do
  for _ in $(seq 200); do
    kill -0 "$id" 2>/dev/null || continue 2
    sleep 0.05
  done
  kill -KILL "$id" 2>/dev/null
done
exit 0
