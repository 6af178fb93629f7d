#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of `emx generate` on one NVIDIA GPU: models, contexts and selectors, interleaved.

    python3 bench/gpu/generate.py --emx build/emx --text BOOKS --out rows.jsonl

Each run reads the first N bytes of BOOKS into an empty cache and goes on for --steps tokens; every round has one run of each case. A row is
what `emx generate --json` says and model, n, round, wall (seconds of the whole run: start, reading the model, prefill, steps). With --eval
there is also a row of `emx eval` for each model, bits per byte of BOOKS. Rows go to --out, medians to standard output as a table.
"""
import argparse
import json
import statistics
import subprocess
import tempfile
import time


def run(command):
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout), time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emx", default="build/emx")
    parser.add_argument("--text", required=True)
    parser.add_argument("--models", default="models/text-entmax,models/text-softmax")
    parser.add_argument("--select", default="all,topk,gaussian,certified", help="for the first model; the others have all")
    parser.add_argument("--n", default="1024,16384,65536,262144")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--out", required=True)
    o = parser.parse_args()
    with open(o.text, "rb") as f:
        text = f.read()
    models = o.models.split(",")
    rows = []
    with tempfile.NamedTemporaryFile() as prompt, open(o.out, "w") as out:

        def keep(row):
            rows.append(row)
            print(json.dumps(row), file=out, flush=True)

        for r in range(o.rounds):
            for n in map(int, o.n.split(",")):
                if n > len(text):
                    raise SystemExit(f"{o.text} has {len(text)} bytes, {n} are needed")
                prompt.seek(0)
                prompt.truncate()
                prompt.write(text[:n])
                prompt.flush()
                for model in models:
                    for select in o.select.split(",") if model == models[0] else ["all"]:
                        row, wall = run([o.emx, "generate", "-m", model, "-f", prompt.name, "-n", str(o.steps), "--device", o.device,
                                         "--select", select, "--json"])
                        keep({"model": model, "device": o.device, "n": n, "round": r, "wall": round(wall, 3), **row})
        for model in models if o.eval else []:
            row, wall = run([o.emx, "eval", "-m", model, "-f", o.text, "--device", o.device, "--json"])
            keep({"device": o.device, "wall": round(wall, 3), **row})
            print(f"{model}: {row['bits_per_byte']:.5f} bits per byte over {row['bytes']} bytes")

    cases = {}
    for row in rows:
        if "select" in row:
            cases.setdefault((row["model"], row["n"], row["select"]), []).append(row)
    print(f"{'model':24} {'n':>7} {'select':10} {'tok/s':>8} {'range':>15} {'attn ms':>8} {'read %':>7} {'support':>8} {'wall s':>7}")
    for (model, n, select), same in cases.items():
        speed = sorted(row["tok_per_s"] for row in same)
        middle = lambda key: statistics.median(row[key] for row in same)
        print(f"{model:24} {n:7} {select:10} {statistics.median(speed):8.0f} {speed[0]:7.0f}-{speed[-1]:<7.0f} "
              f"{middle('attn_ms_per_tok'):8.4f} {100 * middle('bytes_share'):7.2f} {middle('support_mean'):8.1f} {middle('wall'):7.2f}")


if __name__ == "__main__":
    main()
