#!/bin/sh
# Usage: scripts/demo.sh [BUILD [MODELS]]
# Reads 64K bytes of a book that no model here was trained on into one cache, continues it with every selector from forks of that cache,
# and draws BUILD/demo.svg. MODELS holds text-entmax and text-softmax.
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
exec "$build/emx" demo -m "$models/text-entmax" --softmax "$models/text-softmax" -f "$build/data/heldout/Isa.txt" --svg "$build/demo.svg"
