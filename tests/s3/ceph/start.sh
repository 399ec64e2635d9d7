#!/bin/bash
# start.sh CEPH_ROOT DATA_DIR PORT
# A throwaway Ceph of one node (monitor, OSD, RADOS Gateway) that serves S3 on 127.0.0.1:PORT; ready in about 3 s.
# Also takes PORT+1 and PORT+100 to PORT+150. Data that is already there is used again. Keys: S3_ACCESS_KEY, S3_SECRET_KEY.
set -euo pipefail
ROOT=$(cd "$1" && pwd)
DATA=$(mkdir -p "$2" && cd "$2" && pwd)
PORT=$3
ACCESS_KEY=${S3_ACCESS_KEY:-testkey}
SECRET_KEY=${S3_SECRET_KEY:-testsecretkey0123}
RUN=$DATA/run
CONF=$DATA/ceph.conf
mkdir -p "$RUN" "$DATA/log"

# Debian's programs run with the C library they were built for, whatever this machine has.
LIB=$ROOT/usr/lib/x86_64-linux-gnu
for program in ceph-mon ceph-osd radosgw radosgw-admin ceph-authtool monmaptool osdmaptool; do
  eval "$program() { \"\$LIB/ld-linux-x86-64.so.2\" --library-path \"\$LIB:\$LIB/ceph\" --argv0 $program \"\$ROOT/usr/bin/$program\" \"\$@\"; }"
done
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
answers() { (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; }

FSID=$(cat "$DATA/fsid" 2>/dev/null || cat /proc/sys/kernel/random/uuid)
echo "$FSID" >"$DATA/fsid"
cat >"$CONF" <<CONF
[global]
fsid = $FSID
mon host = [v2:127.0.0.1:$((PORT + 1))/0]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = $((PORT + 100))
ms bind port max = $((PORT + 150))
ms bind msgr1 = false
auth allow insecure global id reclaim = false
keyring = $DATA/keyring
run dir = $RUN
admin socket = $RUN/\$name.asok
pid file = $RUN/\$type.pid
log file = $DATA/log/\$name.log
mon cluster log file = $DATA/log/cluster.log
crash dir = $DATA/log
erasure code dir = $LIB/ceph/erasure-code
osd class dir = $LIB/rados-classes
plugin dir = $LIB/ceph
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail warn = 2
mon data avail crit = 1
mon osd nearfull ratio = .94
mon osd backfillfull ratio = .96
mon osd full ratio = .98
[mon]
paxos propose interval = 0.02
paxos min wait = 0.01
mon data = $DATA/mon
[osd]
osd data = $DATA/osd
osd objectstore = bluestore
bluestore block size = $((${OSD_GB:-20} * 1024 * 1024 * 1024))
bluestore block create = true
bluestore fsck on mount = false
osd memory target = 1073741824
osd memory base = 268435456
osd scrub begin hour = 0
osd max markdown count = 100
osd mon shutdown timeout = 1
osd class update on start = false
osd crush update on start = false
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$PORT tcp_nodelay=1
rgw enable usage log = false
rgw dynamic resharding = false
# By default the space of a deleted object comes back after two hours, which fills the disk in a benchmark.
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 5
rgw gc max concurrent io = 20
rgw gc max trim chunk = 64
rgw enable ops log = false
rgw lc max worker = 1
rgw override bucket index max shards = 1
log file = $DATA/log/rgw.log
pid file = $RUN/rgw.pid
CONF

FRESH=
if [ ! -e "$DATA/mon/done" ]; then
  FRESH=1
  rm -rf "$DATA/mon" "$DATA/osd"
  mkdir -p "$DATA/mon" "$DATA/osd"
  ceph-authtool --create-keyring "$DATA/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  ceph-authtool "$DATA/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
  ceph-authtool "$DATA/keyring" --gen-key -n client.rgw --cap mon 'allow *' --cap osd 'allow *' >/dev/null
  ceph-authtool "$DATA/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' >/dev/null
  monmaptool -c "$CONF" --create --clobber --fsid "$FSID" --addv a "[v2:127.0.0.1:$((PORT + 1))/0]" "$DATA/monmap" >/dev/null
  # The OSD is put into the first map, so that Ceph's command line tool, and its Python, are not needed.
  osdmaptool -c "$CONF" --clobber --createsimple 1 "$DATA/osdmap" >"$DATA/log/mkfs.out" 2>&1
  ceph-mon -c "$CONF" --mkfs -i a --monmap "$DATA/monmap" --osdmap "$DATA/osdmap" --keyring "$DATA/keyring" >>"$DATA/log/mkfs.out" 2>&1
fi
alive "$RUN/mon.pid" || ceph-mon -c "$CONF" -i a >"$DATA/log/mon.out" 2>&1
if [ -n "$FRESH" ]; then
  ceph-osd -c "$CONF" -i 0 --mkfs --osd-uuid "$(cat /proc/sys/kernel/random/uuid)" --keyring "$DATA/keyring" >>"$DATA/log/mkfs.out" 2>&1
  touch "$DATA/mon/done"
fi
alive "$RUN/osd.pid" || ceph-osd -c "$CONF" -i 0 >"$DATA/log/osd.out" 2>&1
if [ ! -e "$DATA/user.done" ]; then
  radosgw-admin -c "$CONF" -n client.rgw user create --uid=test --display-name=test \
    --access-key="$ACCESS_KEY" --secret-key="$SECRET_KEY" >"$DATA/log/user.out" 2>&1
  touch "$DATA/user.done"
fi
alive "$RUN/rgw.pid" || radosgw -c "$CONF" -n client.rgw >"$DATA/log/rgw.out" 2>&1
for _ in $(seq 600); do
  answers && exit 0
  sleep 0.1
done
echo "the gateway did not come up; see $DATA/log" >&2
exit 1
