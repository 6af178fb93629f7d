# Sourced by the CLI tests. EMX, TOOL, SRC and WORK come from ctest; every test has an empty folder of its own.
set -u
rm -rf "$WORK"
mkdir -p "$WORK"
cd "$WORK" || exit 1
MODEL=$WORK/../model # made by test_0_model.sh

die() {
  echo "FAILED: $*" >&2
  [ -s out ] && { echo "-- standard output" >&2; head -c 2000 out >&2; }
  [ -s err ] && { echo "-- standard error" >&2; head -c 2000 err >&2; }
  exit 1
}
# run CODE ARGS...: emx with these arguments ends with CODE; output in out and err.
run() {
  local want=$1 got
  shift
  "$EMX" "$@" >out 2>err </dev/null
  got=$?
  [ "$got" = "$want" ] || die "emx $* ended with $got, expected $want"
}
# fails CODE TEXT ARGS...: the error message says TEXT, standard output is empty.
fails() {
  local want=$1 text=$2
  shift 2
  run "$want" "$@"
  grep -q -- "$text" err || die "emx $*: the message does not say '$text'"
  [ ! -s out ] || die "emx $*: data on standard output"
}
# holds FILTER: jq's FILTER is true of every line of out, and there is a line.
holds() {
  [ -s out ] || die "no output for: $1"
  jq -es "map($1) | all" out >/dev/null || die "not true of the output: $1"
}
# all_hold FILTER: true of the array of all lines.
all_hold() {
  jq -es "$1" out >/dev/null || die "not true of the output: $1"
}
# wait_for SECONDS COMMAND...: polls until COMMAND succeeds.
wait_for() {
  local tries=$(($1 * 20))
  shift
  while ! "$@"; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || return 1
    sleep 0.05
  done
}
# interrupt PID: Ctrl-C, and the program must end with 130.
interrupt() {
  kill -INT "$1"
  wait "$1"
  local got=$?
  [ $got = 130 ] || die "Ctrl-C: ended with $got, expected 130"
}
SHAPE="--layers 2 --hidden 64 --heads 2 --kv-heads 1 --head-dim 32 --ffn 96 --alibi-heads 1 --length 64 --batch 4 --warmup 2"
