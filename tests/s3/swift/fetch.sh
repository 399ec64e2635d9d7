#!/bin/bash
# fetch.sh DEST
# OpenStack Swift in a virtual environment of its own, from the package index that pip knows. Once; about 20 s.
set -euo pipefail
DEST=$1
[ -e "$DEST/ready" ] && exit 0
die() { echo "$*" >&2; exit 1; }

mkdir -p "$(dirname "$DEST")"
# Two at once wait for each other: an environment cannot be moved to its place when it is done.
exec 9>"$DEST.lock"
flock -w 200 9 || die "another fetch of Swift does not end"
[ -e "$DEST/ready" ] && exit 0
rm -rf "$DEST"
"${PYTHON:-python3}" -m venv "$DEST" >/dev/null || die "${PYTHON:-python3} makes no virtual environment"
PIP=("$DEST/bin/python" -m pip -q --disable-pip-version-check --no-input --no-cache-dir)
told=$(timeout 180 "${PIP[@]}" install swift pyeclib 2>&1) ||
  die "pip installs neither swift nor pyeclib: $(grep ERROR <<<"$told" | tail -n 1)"
"$DEST/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -iE '^(swift|pyeclib) ' >"$DEST/VERSIONS"
touch "$DEST/ready"
