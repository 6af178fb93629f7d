#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Trains a retrieval model of models/ again:  scripts/train_retrieval.sh softmax|entmax|asentmax [SEED [OUT]]   (minutes on two idle cores).
# The three differ in alpha and in the scale of the queries alone. A run that was interrupted continues with the same command.
set -eu
cd "$(dirname "$0")/.."
seed=${2:-1}
case ${1:-} in
  softmax) twin="--alpha 1" ;;
  entmax) twin="--alpha 1.5" ;;
  asentmax) twin="--alpha 1.5 --scale asentmax" ;;
  *) echo "usage: scripts/train_retrieval.sh softmax|entmax|asentmax [SEED [OUT]]" >&2; exit 2 ;;
esac
out=${3:-build/retrieval-$1-$seed}
emx=${EMX:-build/emx}
resume=
[ ! -f "$out/trainer.safetensors" ] || resume=--resume
# Unquoted on purpose: the twin's options and --resume are words of their own.
exec "$emx" train -o "$out" --task retrieval --length 16..64 $twin --layers 2 --hidden 64 --heads 8 --kv-heads 4 --head-dim 32 \
  --alibi-heads 4 --ffn 64 --batch 128 --steps 4000 --warmup 300 --lr 3e-3 --min-lr 1.5e-4 --weight-decay 0 --embed-dropout 0.1 \
  --head-dropout 0.2 --dtype f32 --seed "$seed" --save-every 500 ${THREADS:+-t "$THREADS"} $resume
