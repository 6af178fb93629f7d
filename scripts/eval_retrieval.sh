#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/eval_retrieval.sh DIR > FILE.jsonl   (DIR holds retrieval-TWIN-SEED as train_retrieval.sh writes them to build/)
# The ladder of every model there: 500 samples a length from the longest length of training to 100 times that.
set -eu
emx=${EMX:-build/emx}
for model in "${1:-build}"/retrieval-*-[0-9]*; do
  [ -f "$model/model.safetensors" ] || continue
  "$emx" eval -m "$model" --task retrieval --len "${LEN:-64,256,1024,3200,6400}" --samples "${SAMPLES:-500}" --json ${THREADS:+-t "$THREADS"} |
    sed "s#\"model\": *\"[^\"]*/#\"model\":\"#"
done
