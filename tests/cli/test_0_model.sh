# The model that the other tests use: a few steps on the licence's text.
. "$SRC/tests/cli/lib.sh"
rm -rf "$MODEL"
run 0 train -o "$MODEL" --data "$SRC/LICENSE" $SHAPE --steps 20 --valid "$SRC/LICENSE"
[ -s "$MODEL/config.json" ] && [ -s "$MODEL/model.safetensors" ] && [ -s "$MODEL/trainer.safetensors" ] || die "files are missing"
grep -q '</svg>' "$MODEL/loss.svg" || die "no loss curve"
cp "$MODEL/log.jsonl" out
holds '.step >= 1 and .step <= 20'
all_hold 'map(select(.loss)) | length == 20'
all_hold 'map(select(.loss)) | .[0].loss > 5 and .[19].loss < .[0].loss and all(.tokens == 256 and .grad_norm > 0 and .lr > 0)'
all_hold 'map(select(.valid_loss)) | length == 1'
