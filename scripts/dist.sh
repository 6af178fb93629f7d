#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/dist.sh FOLDER
# Writes FOLDER/libentmax-VERSION.tar.gz, the tree of the last commit, and prints its name. The same commit gives the same bytes, and
# every file in it has the commit's time.
set -eu
folder=$1
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
git rev-parse --git-dir >/dev/null 2>&1 || { echo "dist: this is no git clone; a source archive is made from a commit" >&2; exit 1; }
[ -z "$(git status --porcelain --untracked-files=no)" ] || echo "dist: uncommitted changes are not in the archive" >&2
version=$(git show HEAD:include/emx.h | sed -nE 's/^#define EMX_VERSION_(MAJOR|MINOR|PATCH) //p' | paste -sd.)
name=libentmax-$version
trap 'rm -f "$folder/$name.tar" "$folder/$name.tar.gz.tmp"' EXIT
git -c tar.umask=022 archive --format=tar --prefix="$name/" -o "$folder/$name.tar" HEAD
gzip -9n <"$folder/$name.tar" >"$folder/$name.tar.gz.tmp"
mv "$folder/$name.tar.gz.tmp" "$folder/$name.tar.gz"
echo "$folder/$name.tar.gz"
