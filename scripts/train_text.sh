#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Trains the text models of models/ again:  scripts/train_text.sh entmax|softmax [OUT]   (a quarter of an hour on a quiet pair of fast cores, an hour on a busy one).
# The two differ in alpha alone. A run that was interrupted continues with the same command. Files are named in one fixed order,
# because the order of the windows depends on it.
set -eu
export LC_ALL=C
cd "$(dirname "$0")/.."
case ${1:-} in
  entmax) alpha=1.5 ;;
  softmax) alpha=1 ;;
  *) echo "usage: scripts/train_text.sh entmax|softmax [OUT]" >&2; exit 2 ;;
esac
out=${2:-build/text-$1}
emx=${EMX:-build/emx}
[ -d build/data ] || scripts/text.sh build/data
resume=
[ ! -f "$out/trainer.safetensors" ] || resume=--resume
exec "$emx" train -o "$out" --alpha $alpha --layers 4 --hidden 192 --heads 6 --kv-heads 3 --head-dim 32 --ffn 512 --alibi-heads 3 \
  --batch 8 --length 512 --long-length 4096 --long-every 8 --steps 2400 --warmup 100 --lr 3e-3 --min-lr 0.00030000000000000003 \
  --seed 1 --save-every 200 $resume --data build/data/train/*.txt --valid build/data/valid/Rom.txt
