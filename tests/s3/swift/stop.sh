#!/bin/bash
# stop.sh DATA_DIR
# Stops the daemons of start.sh, with their workers, and waits until they are gone. SIG=KILL pulls the plug.
DATA=$(cd "$1" && pwd) || exit 1
stopped=()
for daemon in proxy object container account log; do
  file=$DATA/run/$daemon.pid
  [ -s "$file" ] || continue
  id=$(cat "$file")
  # Only what is ours: an id may belong to another process by now.
  if tr '\0' ' ' <"/proc/$id/cmdline" 2>/dev/null | grep -qF "$DATA"; then
    kill -"${SIG:-TERM}" -- "-$id" 2>/dev/null && stopped+=("$id")
  fi
  rm -f "$file"
done
for id in "${stopped[@]}"; do
  for _ in $(seq 200); do
    kill -0 -- "-$id" 2>/dev/null || continue 2
    sleep 0.05
  done
  kill -KILL -- "-$id" 2>/dev/null
done
exit 0
