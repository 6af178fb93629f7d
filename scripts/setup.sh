#!/bin/sh
# Usage: scripts/setup.sh GROUP...   (groups of packages.txt: build test demo browser ci)
# Installs what is missing with apt-get, as root or through sudo; where it may not, says exactly what to run and fails. What has the
# alternative "none" is installed where that can be done, and else left out.
set -eu
cd "$(dirname "$0")/.."

if ! command -v dpkg-query >/dev/null 2>&1; then
  echo "setup: no dpkg here; install what packages.txt lists under your distribution's names" >&2
  exit 0 # CMake says what it misses
fi

installed() { [ "$(dpkg-query -W -f='${Status}' "$1" 2>/dev/null)" = "install ok installed" ]; }
known() { apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [^(]'; }

# The entries of the groups that have no installed alternative.
missing=
optional=
for group in "$@"; do
  for entry in $(sed -n "s/^$group  *//p" packages.txt); do
    have=
    for name in $(echo "$entry" | tr '|' ' '); do
      if installed "$name"; then have=1; fi
    done
    if [ -n "$have" ]; then continue; fi
    case $entry in
      *"|none") optional="$optional $entry" ;;
      *) missing="$missing $entry" ;;
    esac
  done
done
if [ -z "$missing$optional" ]; then exit 0; fi

# Picks the first alternative that apt knows; before an update a fresh image may know none, then the first.
choose() {
  names=
  for entry in $missing $optional; do
    pick=
    for name in $(echo "$entry" | tr '|' ' '); do
      if [ -z "$pick" ] && known "$name"; then pick=$name; fi
    done
    case $entry in
      *"|none") names="$names${pick:+ $pick}" ;;
      *) names="$names ${pick:-${entry%%|*}}" ;;
    esac
  done
  echo "$names"
}

if [ -z "$missing" ]; then
  if [ -z "$(choose)" ]; then exit 0; fi # not in this distribution
  trap 'echo "setup: goes on without$(choose)" >&2; exit 0' EXIT
fi

run=
if [ "$(id -u)" != 0 ]; then
  # Without a terminal sudo cannot ask for a password.
  if command -v sudo >/dev/null 2>&1 && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    run=sudo
  else
    echo "setup: packages are missing and this user may not install them. Run, as root:" >&2
    echo "  apt-get update && apt-get install -y --no-install-recommends$(choose)" >&2
    exit 1
  fi
fi
echo "setup: installing$(choose)" >&2
$run apt-get update -q
# shellcheck disable=SC2046
$run env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(choose)
trap - EXIT
