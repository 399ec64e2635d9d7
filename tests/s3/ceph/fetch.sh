#!/bin/bash
# fetch.sh DEST [SUITE=forky]
# Unpacks Ceph's monitor, OSD and RADOS Gateway with the libraries they need into DEST. No root; nothing is installed.
# Packages come from this machine's own Debian mirror with apt, whose signatures apt checks. About 206 MB, 20 s.
set -euo pipefail
DEST=$1
SUITE=${2:-forky}
[ -x "$DEST/usr/bin/radosgw" ] && exit 0
die() { echo "$*" >&2; exit 1; }

[ "$(uname -m)" = x86_64 ] || die "only x86-64 is supported, this is $(uname -m)"
for tool in apt-get dpkg-deb tar awk; do command -v "$tool" >/dev/null || die "$tool is missing: not a Debian machine?"; done
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$KEYRING" ] || die "$KEYRING is missing: not a Debian machine?"
# Taken before APT_CONFIG below hides the machine's sources.
MIRROR=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | sort -u | head -1)}
[ -n "$MIRROR" ] || die "no Debian mirror in this machine's apt sources: run apt-get update, or set MIRROR"

WORK=$(mktemp -d "${TMPDIR:-/tmp}/ceph-fetch.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$WORK"/{state/lists/partial,cache/archives/partial,etc,root,empty,out}
touch "$WORK/state/status"
echo "deb [signed-by=$KEYRING] ${MIRROR%/} $SUITE main" >"$WORK/etc/sources.list"
cat >"$WORK/apt.conf" <<CONF
Dir::State "$WORK/state";
Dir::State::status "$WORK/state/status";
Dir::Cache "$WORK/cache";
Dir::Etc::sourcelist "$WORK/etc/sources.list";
Dir::Etc::sourceparts "$WORK/empty";
Dir::Etc::preferences "$WORK/empty/none";
Dir::Etc::preferencesparts "$WORK/empty";
APT::Install-Recommends "false";
Debug::NoLocking "true";
APT::Sandbox::User "$(id -un)";
Acquire::Languages "none";
Acquire::http::Timeout "30";
Acquire::Retries "2";
CONF
export APT_CONFIG=$WORK/apt.conf
apt-get -qq update || die "cannot read $SUITE from the mirror"
# libqatzip3 is loaded at run time where it exists; not every release of the suite has it.
apt-get -qq -y --download-only install ceph-mon ceph-osd radosgw libqatzip3 >/dev/null 2>&1 ||
  apt-get -qq -y --download-only install ceph-mon ceph-osd radosgw >/dev/null || die "cannot download Ceph from $SUITE"

# Packages that the three daemons depend on by name only.
SKIP='^(python3|ceph-mgr|perl|systemd|lvm2|parted|smart|nvme|sudo|util-linux|coreutils|adduser|passwd|debconf|dpkg_|tar_|bash_|xfsprogs)|-data_'
for deb in "$WORK"/cache/archives/*.deb; do
  echo "${deb##*/}" | grep -qE "$SKIP" || dpkg-deb -x "$deb" "$WORK/root"
done

cd "$WORK/root"
LIB=usr/lib/x86_64-linux-gnu
PROGRAMS=$(printf 'usr/bin/%s ' ceph-mon ceph-osd radosgw radosgw-admin ceph-authtool monmaptool osdmaptool)
needed_by() {
  "$LIB/ld-linux-x86-64.so.2" --library-path "$LIB:$LIB/ceph" --list "$1" 2>/dev/null |
    awk '$3 ~ /usr\/lib/ {print $3}' | sed "s#^.*/$LIB/#$LIB/#"
}
{
  printf '%s\n' $PROGRAMS $LIB/ld-linux-x86-64.so.2
  find $LIB/ceph/erasure-code $LIB/ceph/compressor $LIB/rados-classes \( -type f -o -type l \) -name '*.so*' 2>/dev/null || true
  for file in $PROGRAMS $(find $LIB/ceph $LIB/rados-classes -name '*.so'); do needed_by "$file"; done
  ls $LIB/libnss_files.so* $LIB/libnss_dns.so* 2>/dev/null || true
  for package in ceph-common radosgw ceph-osd librados2; do ls usr/share/doc/$package/copyright 2>/dev/null || true; done
} | sort -u >"$WORK/wanted"
# A link and everything it leads to.
while read -r file; do
  [ -e "$file" ] || continue
  echo "$file"
  while [ -L "$file" ]; do
    target=$(readlink "$file")
    case $target in /*) file=${target#/} ;; *) file=$(dirname "$file")/$target ;; esac
    echo "$file"
  done
done <"$WORK/wanted" | sort -u >"$WORK/keep"
tar -cf - -T "$WORK/keep" | tar -xf - -C "$WORK/out"
ls "$WORK/cache/archives" | grep -E '^(radosgw|ceph-osd|libc6)_' >"$WORK/out/VERSIONS"

# Aside, then in one step: two fetches at once, or one that is killed, never leave half a tree.
mkdir -p "$(dirname "$DEST")"
cp -a "$WORK/out" "$DEST.part.$$"
mv -T "$DEST.part.$$" "$DEST" 2>/dev/null || { rm -rf "$DEST.part.$$"; [ -x "$DEST/usr/bin/radosgw" ]; }
cat "$DEST/VERSIONS"
