#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/identity.sh [BUILD [MODELS]]
# Whether the text model says the same with --select certified as with all keys: four books, 32,768 and 65,536 bytes of each read once
# and continued by 2,560 drawn bytes with both selectors. Below 65,536 tokens of this head dimension CERTIFIED takes ALL's path, so
# test_identity does the shorter contexts again with the ladder forced, and compares logits instead of text. A line a run goes to
# bench/results/identity.jsonl. Needs jq, and about half an hour. Exit status 1: some text differs.
set -eu
cd "$(dirname "$0")/.."
build=${1:-build}
models=${2:-models}
if [ ! -d "$build/data/heldout" ]; then scripts/text.sh "$build/data"; fi
work=$build/identity
out=bench/results/identity.jsonl
mkdir -p "$work"
: >"$work/rows"
seed=0
for book in heldout/Isa heldout/Acts train/Ge train/Psa; do
  for context in 32768 65536; do
    name=$(basename $book)
    cache=$work/$name.$context.cache
    seed=$((seed + 1))
    head -c $context "$build/data/$book.txt" >"$work/text"
    if [ ! -f "$cache" ]; then "$build/emx" generate -m "$models/text-entmax" -f "$work/text" -n 0 --cache-save "$cache"; fi
    for select in all certified; do
      "$build/emx" generate -m "$models/text-entmax" --cache-load "$cache" -n 2560 --temp 1 --seed $seed --select $select \
        --json >"$work/$select"
    done
    same=$(jq -s '.[0].text == .[1].text' "$work/all" "$work/certified")
    jq -c --arg book "$name" --argjson context $context --argjson seed $seed --argjson same "$same" \
      --argjson all_share "$(jq .bytes_share "$work/all")" \
      '{book: $book, context: $context, seed: $seed, same_text: $same, bytes_share_all: $all_share} + . | del(.text)' \
      "$work/certified" | tee -a "$work/rows"
    rm "$cache"
  done
  "$build/tests/test_identity" "$build/data/$book.txt" 32768 2560 2>&1 | grep '^{' | tee -a "$work/rows"
done
mv "$work/rows" "$out"
jq -es 'all(if has("same_text") then .same_text else .same_logits == .tokens end) and all(.certified == .rows)' "$out" >"$work/all"
