#!/bin/sh
# Usage: scripts/demo.sh [BUILD [MODELS]]
# Reads 64K bytes of a book that no model here was trained on into one cache, continues it with every selector from forks of that cache,
# and draws BUILD/demo.svg; then asks the retrieval models at up to 100 times the length of their training and draws BUILD/retrieval.svg.
# MODELS holds text-entmax, text-softmax and retrieval-softmax, -entmax, -asentmax.
set -eu
cd "$(dirname "$0")/.."
build=${1:-build}
models=${2:-models}
for model in text-entmax text-softmax; do
  if [ ! -f "$models/$model/model.safetensors" ]; then
    echo "demo: $models/$model is missing; its card says how to train it" >&2
    exit 1
  fi
done
if [ ! -d "$build/data/heldout" ]; then scripts/text.sh "$build/data"; fi
echo "demo: Isaiah, 65536 bytes, held out from training; entmax model $models/text-entmax" >&2
"$build/emx" demo -m "$models/text-entmax" --softmax "$models/text-softmax" -f "$build/data/heldout/Isa.txt" --svg "$build/demo.svg"

set --
for model in retrieval-softmax retrieval-entmax retrieval-asentmax; do
  if [ -f "$models/$model/model.safetensors" ]; then set -- "$@" -m "$models/$model"; fi
done
if [ $# -gt 0 ]; then
  echo "demo: two steps along a cycle given as shuffled pairs (docs/tasks.md); trained on 16 to 64 tokens, 20 samples a length" >&2
  "$build/emx" eval "$@" --task retrieval --len 64,256,1024,6400 --samples 20 --svg "$build/retrieval.svg"
  echo "demo: picture: $build/retrieval.svg" >&2
fi
