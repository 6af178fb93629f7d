# A GPU, or a clear word that there is none.
. "$SRC/tests/cli/lib.sh"
fails 2 'device' bench decode --device tpu
fails 2 'device' bench decode --device cuda:x
run 0 info --json
holds '(.cuda == null) != (.cuda_missing == null)'
if jq -e '.cuda == null' out >/dev/null; then
  holds '.cuda_missing | contains("CUDA")'
  run 0 info
  grep -q '^cuda      none: .*CUDA' out || die "info does not say why there is no GPU"
  fails 1 'CUDA' bench decode --device cuda --n 100
else
  run 0 bench decode --device cuda --n 3000 --rounds 2 --batch 3 --alibi --json
  holds '.device == "cuda" and .certified and .rel_err < 1e-4'
  run 0 bench decode --device cuda --n 3000 --rounds 2 --select topk,gaussian --budget 4096 --json
  holds 'select(.select == "topk") | .certified and .rel_err < 1e-4' # the budget covers the sequence
  fails 1 'SKETCH' bench decode --device cuda --n 3000 --select certified
fi
