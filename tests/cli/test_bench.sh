# Benchmarks: their JSON, every workload, and that their checks agree with what they claim.
. "$SRC/tests/cli/lib.sh"
for data in iid ar:0.9 topics topics:24 outlier:3,8 flat:0.05; do
  run 0 bench decode --data $data --n 3000 --hq 4 --hkv 2 --d 32 --select all,topk,gaussian --budget 512 --rounds 3 --json
  [ "$(wc -l <out)" = 4 ] || die "softmax and three selectors"
  holds '.data == "'$data'" and .device == "cpu" and .n == 3000 and .hq == 4 and .hkv == 2 and .d == 32 and .dtype == "bf16" and .page == 16'
  holds '.ms > 0 and .ms_min > 0 and .ms_min <= .ms and .ms_mad >= 0 and .vs_softmax > 0 and .bytes > 0 and .gbps > 0 and .read_gbps > 0'
  holds '.delta_bound >= .delta - 1e-6 and .delta >= 0 and (.certified | type) == "boolean" and (.path | type) == "string"'
  all_hold '.[0].select == "softmax" and .[0].vs_softmax == 1 and .[0].alpha == 1 and .[1].select == "all" and .[1].alpha == 1.5'
  # exact methods: float sums of 32 products, see test_decode.sh
  all_hold 'map(select(.path == "all")) | length >= 2 and all(.rel_err < 1e-5 and .delta == 0)'
done
run 0 bench decode --n 500 --hq 2 --hkv 2 --d 80 --dtype f32 --batch 3 --alibi --select all --rounds 3 --json --page 32 --alpha 2
holds '.rel_err < 1e-5'
run 0 bench decode --n 500 --hq 2 --hkv 1 --d 64 --dtype f16 --select topk --alpha 1 --budget 512 --rounds 3 --json
holds '.alpha == 1 and .rel_err < 1e-5'
run 0 bench decode --n 500 --rounds 3
grep -q 'read rate' out || die "table"
"$TOOL" make f.safetensors bf16 2 4 2 700 32
run 0 bench decode --data f.safetensors --rounds 3 --json
holds '.n == 700 and .hq == 4 and .hkv == 2 and .rel_err < 1e-5'
for data in iid:3 ar ar:1 ar:x outlier:3 outlier:0,2 flat:0 flat: topics:64 nothing; do
  fails 2 'data' bench decode --data $data
done
fails 1 'nowhere' bench decode --data nowhere.safetensors
fails 2 'multiple' bench decode --hq 3 --hkv 2
run 1 bench decode --n 1000000000 --hkv 4096 --hq 4096 --d 256 --dtype f32
grep -q '[0-9][0-9]* bytes' err || die "a cache over memory is refused without its bytes"
# dense attention: every pass of both mappings, and what the float64 rows say of it (sums of D products in float; bf16 input, f32 output)
for data in iid ar:0.9 topics outlier:3,8 flat:0.05; do
  run 0 bench attn --data $data --n 700 --hq 4 --hkv 2 --d 32 --rounds 3 --json
  [ "$(wc -l <out)" = 4 ] || die "softmax and entmax, forward and backward"
  holds '.data == "'$data'" and .device == "cpu" and .n == 700 and .h == 4 and .hkv == 2 and .d == 32 and .dtype == "f32"'
  holds '.ms > 0 and .ms_min > 0 and .ms_min <= .ms and .vs_softmax > 0 and .density > 0 and .density <= 1 and .rel_err < 1e-5'
  all_hold 'map([.alpha, .pass]) == [[1, "forward"], [1, "backward"], [1.5, "forward"], [1.5, "backward"]] and .[0].vs_softmax == 1'
done
run 0 bench attn --n 400 --hq 2 --hkv 2 --d 80 --dtype bf16 --alibi --alpha 2 --list 0 --rounds 3 --json
all_hold '.[2].list == 0 and .[2].alpha == 2 and .[2].alibi and (map(.rel_err < 1e-5) | all)'
run 0 bench attn --n 300 --hq 2 --hkv 1 --d 16 --alpha 3 --forward --rounds 3 --json
all_hold 'length == 2 and .[1].pass == "forward"'
run 0 bench attn --n 200 --alpha 1 --rounds 3
grep -q 'vs_softmax' out || die "table"
fails 2 'forward' bench attn --alpha 3
fails 2 'multiple' bench attn --hq 3 --hkv 2
fails 2 'data' bench attn --data nothing
run 0 bench map --n 777 --rows 5 --rounds 3 --json
# largest errors: 1e-6 is the promise for weights and losses, gradients are relative
holds '.n == 777 and .rows == 5 and .ms > 0 and .max_err < 1e-6 and .support >= 1 and .vs_softmax > 0 and .bytes > 0'
all_hold 'map(.map + " " + .pass) == ["softmax forward", "entmax forward", "softmax backward", "entmax backward", "softmax loss", "entmax loss"]'
run 0 bench map --n 50 --rows 2 --rounds 3 --alpha 1 --dtype f64 --json --pass forward,loss
[ "$(wc -l <out)" = 2 ] || die "alpha 1 is softmax itself"
for kind in normmax "budget --budget 7.5"; do
  run 0 bench map --n 300 --rows 2 --rounds 3 --alpha 2 --kind $kind --json --dtype f32 --std 3
  holds '.max_err < 1e-6'
done
all_hold 'length == 4'
for alpha in 1.1 1.7 3; do
  run 0 bench map --n 300 --rows 2 --rounds 3 --alpha $alpha --json
  holds '.max_err < 2e-5'
done
run 0 bench map --n 50 --rows 1 --rounds 3 --pass backward
[ "$(wc -l <out)" = 3 ] || die "table"
fails 2 'pass' bench map --pass forward,sideways
fails 2 'pass' bench map --pass ''
fails 2 'loss' bench map --kind budget --pass loss
fails 2 'alpha' bench map --kind normmax --alpha 1
fails 2 'budget' bench map --budget 3
run 1 bench map --kind budget --budget 60 --n 50 --rows 1
run 0 bench file --kv-file slow --n 20000 --hq 4 --hkv 2 --d 128 --data topics --rounds 2 --select certified,topk --json
holds '.bytes_kv == 20480000 and .mapped > 0 and .read_bytes >= 0 and .support >= 1 and .keys >= .support'
all_hold 'length == 3 and (map(.select) == ["all", "certified", "topk"]) and all(.[0, 1]; .equal and .certified)'
all_hold '(map(.path) | .[0:2]) == ["all", "ladder"] and .[1].read_bytes <= .[0].read_bytes / 4'
run 0 bench file --kv-file slow --n 300 --rounds 1
grep -q 'certified' out || die "file: table"
[ ! -e slow ] || die "the file is still there"
fails 2 'kv-file' bench file
fails 2 'data' bench file --kv-file slow --data nothing
fails 1 'nowhere' bench file --kv-file nowhere/slow
exit 0
