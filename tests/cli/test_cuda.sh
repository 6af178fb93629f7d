# A GPU, or a clear word that there is none.
. "$SRC/tests/cli/lib.sh"
fails 2 'device' bench decode --device tpu
fails 2 'device' bench decode --device cuda:x
fails 2 'device' bench attn --device tpu
fails 2 'device' generate -m "$MODEL" -p a --device tpu
for refused in "--cache-save x" "--cache-load x" "--dump-qkv x" "--kv-file x"; do
  fails 2 'for the CPU' generate -m "$MODEL" -p a --device cuda $refused
done
fails 2 'for the CPU' inspect -m "$MODEL" -p a -o x --device cuda
fails 2 'for the CPU' eval -m "$MODEL" --task copy --len 8 --device cuda
fails 2 'for the CPU' eval -m "$MODEL" -f "$0" --dump x --device cuda
seq 400 >text
run 0 info --json
holds '(.cuda == null) != (.cuda_missing == null)'
if jq -e '.cuda == null' out >/dev/null; then
  holds '.cuda_missing | contains("CUDA")'
  run 0 info
  grep -q '^cuda      none: .*CUDA' out || die "info does not say why there is no GPU"
  fails 1 'CUDA' bench decode --device cuda --n 100
  fails 1 'CUDA' bench attn --device cuda --n 100
  fails 1 'CUDA' generate -m "$MODEL" -p a --device cuda
  fails 1 'CUDA' eval -m "$MODEL" -f text --device cuda
else
  run 0 bench decode --device cuda --n 3000 --rounds 2 --batch 3 --alibi --json
  holds '.device == "cuda" and .certified and .rel_err < 1e-4'
  run 0 bench attn --device cuda --n 700 --hq 4 --hkv 2 --d 64 --alibi --rounds 2 --json
  holds '.device == "cuda" and .ms > 0 and .rel_err < 1e-4'
  run 0 bench attn --device cuda --n 400 --dtype bf16 --list 0 --alpha 2 --rounds 2 --json
  holds '.device == "cuda" and .rel_err < 2e-2'
  run 0 bench decode --device cuda --n 3000 --rounds 2 --select topk,gaussian --budget 4096 --json
  holds 'select(.select == "topk") | .certified and .rel_err < 1e-4' # the budget covers the sequence
  run 0 bench decode --device cuda --n 3000 --rounds 2 --select certified --json
  holds '.certified and .rel_err < 1e-4'
  if "$EMX" generate -m "$MODEL" -f text -n 9 --device cuda >out 2>err; then
    for select in all topk gaussian certified; do
      run 0 generate -m "$MODEL" -f text -n 9 --device cuda --select $select --json
      holds '.tokens == 9 and .rows > 0 and .tok_per_s > 0'
    done
    run 0 eval -m "$MODEL" -f text --json
    cp out cpu
    run 0 eval -m "$MODEL" -f text --device cuda --json
    jq -es '(.[0].bits_per_byte - .[1].bits_per_byte | fabs) < 1e-3' cpu out >/dev/null || die "bits per byte: not the CPU's"
  else
    grep -q 'cublasLt' err || die "generate does not work and does not say that cuBLASLt is missing"
  fi
fi
