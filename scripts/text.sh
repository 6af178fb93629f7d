#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Writes the King James Bible (Debian packages bible-kjv, bible-kjv-text) as plain text, one verse a line without references and one
# file a book:  DIR/train/*.txt, DIR/valid/Rom.txt and DIR/heldout/{Isa,Acts}.txt. Whole books are held out: no model of this project
# has seen a line of heldout/, and valid/ is only watched during training.
set -eu
dir=${1:-build/data}
command -v bible >/dev/null || { echo "text.sh: the 'bible' command is missing: install the packages bible-kjv and bible-kjv-text" >&2; exit 1; }
tmp=$dir.tmp.$$
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/train" "$tmp/valid" "$tmp/heldout"
bible -f gen1:1-rev22:21 | awk -v dir="$tmp" '
  {
    book = $1
    sub(/[0-9]+:[0-9]+$/, "", book)
    part = book == "Isa" || book == "Acts" ? "heldout" : book == "Rom" ? "valid" : "train"
    sub(/^[^ ]+ /, "")
    print > (dir "/" part "/" book ".txt")
  }'
books=$(ls "$tmp"/*/*.txt | wc -l)
[ "$books" -eq 66 ] || { echo "text.sh: found $books books, expected 66" >&2; exit 1; }
rm -rf "$dir"
mkdir -p "$(dirname "$dir")"
mv "$tmp" "$dir"
echo "text.sh: $(cat "$dir"/train/*.txt | wc -c) bytes to train on, $(cat "$dir"/heldout/*.txt | wc -c) held out, in $dir" >&2
