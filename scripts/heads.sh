#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/heads.sh [BUILD [MODELS]]
# What the certified selector reads and how long it takes on every head of the trained models, beside softmax over everything: queries,
# keys and values of 32 steps after 65,536 tokens (Isaiah; samples of the retrieval task one behind the other, which hold at most 16,504
# tokens each), one head at a time on one thread. Writes bench/results/heads.jsonl and docs/pictures/heads-*.svg, and prints the rows
# of the table in docs/performance.md. Needs jq. The reads take minutes, the timings seconds: keep the machine quiet for those.
set -eu
cd "$(dirname "$0")/.."
build=${1:-build}
models=${2:-models}
if [ ! -d "$build/data/heldout" ]; then scripts/text.sh "$build/data"; fi
work=$build/heads
mkdir -p "$work"
head -c 65536 "$build/data/heldout/Isa.txt" >"$work/text"
for length in 64 16384; do # 63 tokens, then 4 times 16,383
  "$build/emx" eval --task retrieval --len $length --samples $((length == 64 ? 1 : 4)) --show
done >"$work/task"
for model in text-entmax retrieval-entmax retrieval-asentmax; do
  case $model in
    text-*) prompt=$work/text draw='--temp 1 --seed 1' ;; # what it says goes in circles if it always says the likeliest
    *) prompt=$work/task draw= ;;
  esac
  if [ ! -d "$work/$model" ]; then
    "$build/emx" generate -m "$models/$model" -f "$prompt" -n 33 $draw --dump-qkv "$work/$model" --json >"$work/$model.json"
  fi
done
: >"$work/rows"
for model in text-entmax retrieval-entmax retrieval-asentmax; do
  set --
  for file in "$work/$model"/layer-*.safetensors; do set -- "$@" --data "$file"; done
  "$build/emx" bench decode "$@" --head each --select all,certified -t 1 --rounds 129 --svg "docs/pictures/heads-$model.svg" --json |
    jq -c --arg model $model '.data |= split("/")[-1] | {model: $model} + .' >>"$work/rows"
done
mv "$work/rows" bench/results/heads.jsonl
jq -rs 'group_by([.model, .data, .head]) | map(map({(.select): .}) | add) | group_by([.all.model, .all.data])[] |
  "| \(.[0].all.model) | \(.[0].all.data | ltrimstr("layer-") | rtrimstr(".safetensors")) | " + (map(
    "\(1000 * .certified.bytes / .softmax.bytes | round / 10) / \(100 / .certified.vs_softmax | round)"
    + if .certified.certified then "" else "!" end) | join(" | ")) +
  " | \(map(100 / .all.vs_softmax) | "\(min | round) to \(max | round)") |"' bench/results/heads.jsonl
