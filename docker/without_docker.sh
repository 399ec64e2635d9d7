#!/usr/bin/env bash
# What compose.yaml does, on this machine and without a docker engine: an S3 server (Ceph's gateway, fetched once, run from
# its own directory; OpenStack Swift where that cannot be had), a job of two ranks with its checkpoints on it, SIGTERM in the
# middle, and the job once more.
#   docker/without_docker.sh [STEPS]
# Python is $PYTHON, or that of .venv (make venv). $DCPSVC_TEST_S3_SERVER (ceph or swift) takes that server or none; they are
# kept in $DCPSVC_CEPH_ROOT and $DCPSVC_SWIFT_VENV. Everything else goes at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${1:-200}
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
CACHE=$HOME/.cache/dcpsvc-tests
declare -A KEPT=([ceph]=${DCPSVC_CEPH_ROOT:-$CACHE/ceph} [swift]=${DCPSVC_SWIFT_VENV:-$CACHE/swift})
declare -A KEY=([ceph]=testkey [swift]=test:tester)
S3=
WORK=$(mktemp -d)
export TMPDIR=$WORK # torchrun leaves folders there
job=
leave_nothing() {
    if [ -n "$job" ]; then # first, so that it does not wait for the server
        kill "$job" 2>/dev/null || true
        wait "$job" || true
    fi
    [ ! -e "$WORK/s3" ] || SIG=KILL "tests/s3/$S3/stop.sh" "$WORK/s3"
    rm -rf "$WORK"
}
trap leave_nothing EXIT

free_ports() { # the first of a group that the server will take; below what the kernel hands out by itself
    "$PYTHON" - <<'P'
import random, socket
while True:
    port = random.randrange(20_000, 32_000)
    try:
        for beside in (0, 1, 2, 3, 100, 101, 102, 103):
            socket.create_server(("127.0.0.1", port + beside)).close()
    except OSError:
        continue
    print(port)
    break
P
}

echo "== S3 server"
for server in ${DCPSVC_TEST_S3_SERVER:-ceph swift}; do
    if bash "tests/s3/$server/fetch.sh" "${KEPT[$server]}" >/dev/null; then
        S3=$server
        break
    fi
done
[ -n "$S3" ] || { echo "there is no S3 server" >&2; exit 1; }
PORT=$(free_ports)
bash "tests/s3/$S3/start.sh" "${KEPT[$S3]}" "$WORK/s3" "$PORT" >/dev/null
export DCPSVC_DEMO_STORAGE_OPTIONS='{"endpoint_url": "http://127.0.0.1:'$PORT'", "key": "'${KEY[$S3]}'", "secret": "testsecretkey0123", "client_kwargs": {"region_name": "us-east-1"}}'
"$PYTHON" -c '
import json, os
from botocore.session import Session
options = json.loads(os.environ["DCPSVC_DEMO_STORAGE_OPTIONS"])
Session().create_client(
    "s3", region_name="us-east-1", endpoint_url=options["endpoint_url"],
    aws_access_key_id=options["key"], aws_secret_access_key=options["secret"],
).create_bucket(Bucket="runs")'

train=( # no function: the signal is for torchrun itself, not for a shell around it
    "$PYTHON" -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0
    -m dcpsvc.demo.train --root s3://runs/demo --nvme "$WORK/nvme" --steps "$STEPS" --every 20 --journal "$WORK/journal"
)
committed() {
    "$PYTHON" -c '
import json, os, dcpsvc
options = json.loads(os.environ["DCPSVC_DEMO_STORAGE_OPTIONS"])
try:
    newest = dcpsvc.latest("s3://runs/demo", storage_options=options)
except dcpsvc.RootError:
    newest = None
print(newest.step if newest else 0)'
}

echo "== two ranks, until something is committed"
"${train[@]}" &
job=$!
until [ "$(committed)" -gt 0 ]; do
    kill -0 "$job" || { echo "the job ended before its first commit" >&2; exit 1; }
    sleep 1
done
echo "== SIGTERM to the launcher: the ranks save and stop"
kill -TERM "$job"
wait "$job" || true
job=
before=$(committed)
echo "== step $before is committed; the job again"
"${train[@]}"
after=$(committed)
echo "== step $after is committed"
[ "$before" -gt 0 ] && [ "$after" -eq "$STEPS" ]
