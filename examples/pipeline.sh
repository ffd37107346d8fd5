#!/usr/bin/env bash
# A first pipeline for CI: a tiny random model goes through profile, train, place, split and generate; every step's
# exit code and JSON is checked. Takes well under a minute, needs no network.
#
#   examples/pipeline.sh [FOLDER]       FOLDER keeps the files; without it they go with the script
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
if [ $# -gt 0 ]; then work=$1; mkdir -p "$work"; else work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; fi
python=${PYTHON:-python3}
powerinfer=${POWERINFER:-powerinfer}

# check EXPRESSION: the JSON document on stdin, called `d`, satisfies it.
check() {
    "$python" -c 'import json, sys; d = json.load(sys.stdin); assert eval(sys.argv[1]), (sys.argv[1], d)' "$1"
}

# refused CODE COMMAND...: the command ends with this exit code, one line on stderr and nothing on stdout.
refused() {
    local expected=$1 code=0; shift
    "$@" > "$work/stdout" 2> "$work/stderr" || code=$?
    [ "$code" = "$expected" ] || { echo "$*: expected exit code $expected, found $code" >&2; exit 1; }
    [ ! -s "$work/stdout" ] && [ "$(wc -l < "$work/stderr")" = 1 ] || { echo "$*: more than an error" >&2; exit 1; }
}

"$python" "$here/tiny_model.py" "$work/model" >&2
head -c 20000 "$here/corpus/sotu.txt" > "$work/corpus.txt"

$powerinfer profile "$work/model" --corpus "$work/corpus.txt" --tokens 4096 --samples 1024 --json \
    -o "$work/tiny.activations" | check 'd["tokens"] == 4096 and len(d["layers"]) == 3'
# --top1 0 --perplexity 1: random weights have no answers that a predictor could spoil
$powerinfer train "$work/model" --activations "$work/tiny.activations" --top1 0 --perplexity 1 --quant q8_0 --json \
    -o "$work/tiny.predictors" | check 'len(d["layers"]) == 3'
$powerinfer place "$work/model" --activations "$work/tiny.activations" --predictors "$work/tiny.predictors" \
    --quant q8_0 --json -o "$work/tiny.placement" | check 'd["ram"] == [256] * 3'
$powerinfer split "$work/model" --activations "$work/tiny.activations" --predictors "$work/tiny.predictors" \
    --placement "$work/tiny.placement" --quant q8_0 --json -o "$work/tiny.gguf" | check 'd["modes"] == ["predictor"] * 3'
$powerinfer inspect "$work/tiny.gguf" --verify --json | check 'd["kind"] == "artifact"'
$powerinfer generate "$work/tiny.gguf" -p "The state of the" -n 16 --temp 0 --json > "$work/first.json"
check 'len(d["tokens"]) <= 16 and d["finish_reason"] in ("length", "stop")' < "$work/first.json"

# The same input gives the same tokens, whatever the number of threads.
$powerinfer generate "$work/tiny.gguf" -p "The state of the" -n 16 --temp 0 -t 1 --json > "$work/second.json"
check "d['tokens'] == json.load(open('$work/first.json'))['tokens']" < "$work/second.json"

refused 2 $powerinfer split "$work/model" --activations "$work/tiny.activations" -o "$work/tiny.gguf"  # exists
refused 2 $powerinfer generate "$work/missing.gguf" -p "Hello"

echo "pipeline: passed"
