#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/budgets.sh [BUILD [MODELS]]
# Measures what byte budgets lose on both text models while they read Isaiah (held out from their training): writes
# bench/results/budgets-text.jsonl and docs/pictures/budgets.svg, and prints the rows of the tables in docs/performance.md. The retrieval
# models, where MODELS holds them, read samples of their task: budgets-retrieval, one row a model. Needs jq.
set -eu
number='def sig: if . == 0 then "0" else (. | log10 | floor) as $e | (. / pow(10; $e - 1) | round) as $m |
  if $e < -3 then "\($m / 10)e\($e)" else "\($m * pow(10; $e - 1) * 1e9 | round / 1e9)" end end;'
cd "$(dirname "$0")/.."
build=${1:-build}
models=${2:-models}
if [ ! -d "$build/data/heldout" ]; then scripts/text.sh "$build/data"; fi
out=bench/results/budgets-text.jsonl
"$build/emx" bench budgets -m "$models/text-entmax" -m "$models/text-softmax" -f "$build/data/heldout/Isa.txt" \
  --len 4096,16384,65536 --svg docs/pictures/budgets.svg --json >"$out.all"
jq -c 'del(.heads)' "$out.all" >"$out"
rm "$out.all"
jq -rs "$number"'
  def cells: "\(.budget) | \(.delta.mean | sig) | \(.recall99.mean * 1000 | round / 10) % | \(.rel_err.mean | sig) | \(.kl | sig)";
  (map(select(.target | IN(0.08, 0.125, 0.25, 0.5))) | group_by([.length, .target])[] | (map(select(.alpha == 1))[0]) as $s |
    (map(select(.alpha > 1))[0]) as $e | select($s and $e) |
    "| \(.[0].length) | \(.[0].target * 1000 | round / 10) % | \($s | cells) | \($e | cells) | \($s.rel_err.mean / $e.rel_err.mean | round) |"),
  "",
  (map(select(.target == "gaussian")) | group_by(.length)[] | .[] |
    "| \(.length) | \(if .alpha == 1 then "softmax" else "entmax" end) \(.select) \(.budget // "") | \(.bytes_share.mean * 1000 | round / 10) % | \(.delta.mean | sig) | \(.recall99.mean * 1000 | round / 10) % | \(.rel_err.mean | sig) | \(.kl | sig) |")
' "$out"

set --
for model in retrieval-softmax retrieval-entmax retrieval-asentmax; do
  if [ -f "$models/$model/model.safetensors" ]; then set -- "$@" -m "$models/$model"; fi
done
if [ $# = 0 ]; then exit 0; fi
out=bench/results/budgets-retrieval.jsonl
"$build/emx" bench budgets "$@" --len 512,2048,8192 --svg docs/pictures/budgets-retrieval.svg --json >"$out.all"
jq -c 'del(.heads)' "$out.all" >"$out"
rm "$out.all"
echo
jq -rs "$number"'
  (map(select(.target | IN("gaussian", 0.125, 0.25, 0.5))) | group_by(.length)[] | .[] |
    "| \(.length) | \(if .target == "gaussian" then "as gaussian" else "\(.target * 1000 | round / 10) %" end) | \(.model | split("/") | last) | \(.select) \(.budget // "") | \(.bytes_share.mean * 1000 | round / 10) % | \(.delta.mean | sig) | \(.recall99.mean * 1000 | round / 10) % | \(.rel_err.mean | sig) | \(.kl | sig) | \(.exact * 1000 | round / 10) % |")
' "$out"
