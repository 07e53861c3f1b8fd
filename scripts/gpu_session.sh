#!/usr/bin/env bash
# Everything that needs a GPU, in one go and within ten minutes, without a network: the tests
# marked gpu, then the benchmark with the shipped trio and with its oracle widened to GPT-2-L's
# shape (the same function at a large model's cost).
#
#   scripts/gpu_session.sh [OUT]              results in OUT (default: runs/gpu)
#   DRY_RUN=1 scripts/gpu_session.sh [OUT]    the same on a CPU, with tiny models, in a minute
#
# PYTHON names the interpreter (default: .venv/bin/python if there is one). PROMPTS and LIMIT
# choose the prompts (default: 40 of the package's own).
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
prompts=${PROMPTS:-heldout}
if [ -n "${DRY_RUN:-}" ]; then
  export JAX_PLATFORMS=cpu
  trio=checkpoints/python-tiny width=128 layers=4 limit=${LIMIT:-1} tokens=24
else
  export JAX_PLATFORMS=cuda
  trio=checkpoints/python-small width=1280 layers=36 limit=${LIMIT:-40} tokens=128
fi
mkdir -p "$out"
wide="$out/wide"

echo "== tests marked gpu"
"$python" -m pytest -q -m gpu tests/test_gpu.py 2>&1 | tee "$out/tests.txt"

measure() { # a name, then further arguments
  echo "== benchmark: $1"
  "$python" scripts/benchmark.py --prompts "$prompts" --limit "$limit" --max-new-tokens "$tokens" \
    --sampling greedy,topk50 --dtype bfloat16 --no-other-baseline --out "$out/$1" "${@:2}" |
    tee "$out/$1.txt"
}

measure trio --checkpoint "$trio"
"$python" scripts/train.py widen --model "$trio/oracle" --width "$width" --layers "$layers" --out "$wide"
measure widened --oracle "$wide" --draft "$trio/draft" --ngram "$trio/ngram.safetensors"
rm -r "$wide" # gigabytes that can be made again
echo "== results in $out"
