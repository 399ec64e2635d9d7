#!/bin/bash
# start.sh VENV DATA_DIR PORT
# A throwaway OpenStack Swift of one node (proxy, account, container, object; one copy) that serves S3 on 127.0.0.1:PORT;
# ready in about 2 s. Also takes PORT+1 to PORT+3. Data that is already there is used again. Keys: S3_ACCESS_KEY (with a
# colon: account and user), S3_SECRET_KEY.
set -euo pipefail
VENV=$(cd "$1" && pwd)
DATA=$(mkdir -p "$2" && cd "$2" && pwd)
PORT=$3
ACCESS_KEY=${S3_ACCESS_KEY:-test:tester}
SECRET_KEY=${S3_SECRET_KEY:-testsecretkey0123}
OBJECT=$((PORT + 1))
CONTAINER=$((PORT + 2))
ACCOUNT=$((PORT + 3))
CONF=$DATA/etc
RUN=$DATA/run
mkdir -p "$CONF" "$RUN" "$DATA/log" "$DATA/cache" "$DATA/devices/d1"
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
status() { curl -so /dev/null -w '%{http_code}' -m 5 "http://127.0.0.1:$1" || true; }

if [ ! -s "$CONF/object.ring.gz" ]; then
  "$VENV/bin/python" - "$CONF" $ACCOUNT $CONTAINER $OBJECT <<'P'
import os
import sys

from swift.common.ring import RingBuilder

for name, port in zip(("account", "container", "object"), map(int, sys.argv[2:])):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev(
        {"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1",
         "replication_port": port, "device": "d1", "weight": 1, "meta": ""}
    )
    builder.rebalance(seed=1)
    builder.get_ring().save(os.path.join(sys.argv[1], f"{name}.ring.gz"))
P
fi
[ -s "$CONF/swift.conf" ] || cat >"$CONF/swift.conf" <<C
[swift-hash]
swift_hash_path_prefix = lab
swift_hash_path_suffix = $RANDOM$RANDOM
[storage-policy:0]
name = p0
default = yes
C

common() {
  cat <<C
[DEFAULT]
swift_dir = $CONF
devices = $DATA/devices
mount_check = false
bind_ip = 127.0.0.1
bind_port = $1
workers = 1
user = $(id -un)
recon_cache_path = $DATA/cache
log_level = INFO
log_address = $RUN/log.sock
eventlet_debug = false
fallocate_reserve = 0
C
}
for part in account:$ACCOUNT container:$CONTAINER object:$OBJECT; do
  name=${part%%:*}
  {
    common "${part##*:}"
    cat <<C
[pipeline:main]
pipeline = $name-server
[app:$name-server]
use = egg:swift#$name
network_chunk_size = 1048576
disk_chunk_size = 1048576
C
  } >"$CONF/$name.conf"
done
{
  common "$PORT"
  cat <<C
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
node_timeout = 60
conn_timeout = 3
object_chunk_size = 1048576
client_chunk_size = 1048576
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
dns_compliant_bucket_names = true
max_upload_part_num = 10000
multi_delete_concurrency = 8
[filter:tempauth]
use = egg:swift#tempauth
user_${ACCESS_KEY/:/_} = $SECRET_KEY .admin
C
} >"$CONF/proxy.conf"

# Each daemon leads a process group of its own, so that it can be ended with its workers.
start() {
  local name=$1
  shift
  alive "$RUN/$name.pid" && return
  setsid "$@" </dev/null >>"$DATA/log/$name.out" 2>&1 &
  echo $! >"$RUN/$name.pid"
}
# Where there is no /dev/log, Swift would send its log from sockets that are bound to all addresses.
alive "$RUN/log.pid" || rm -f "$RUN/log.sock"
start log "$VENV/bin/python" -c '
import os, socket, sys
os.chdir(sys.argv[1])  # a path of any length may be too long for a socket
sink = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sink.bind("run/log.sock")
with open("log/swift.log", "ab", 0) as file:
    while True:
        file.write(sink.recv(65536).rstrip(b"\0") + b"\n")' "$DATA"
for _ in $(seq 100); do
  [ -S "$RUN/log.sock" ] && break
  sleep 0.05
done
for name in account container object proxy; do
  start "$name" "$VENV/bin/swift-$name-server" "$CONF/$name.conf" -v
done
for _ in $(seq 300); do
  if [ "$(status "$PORT/healthcheck")" = 200 ] && [ "$(status $OBJECT)" != 000 ] &&
    [ "$(status $CONTAINER)" != 000 ] && [ "$(status $ACCOUNT)" != 000 ]; then
    exit 0
  fi
  sleep 0.1
done
echo "Swift did not come up; see $DATA/log" >&2
exit 1
