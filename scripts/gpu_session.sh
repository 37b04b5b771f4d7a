#!/usr/bin/env bash
# What needs an accelerator, measured on one H100 or H200 in at most 12 minutes, most valuable first.
#
#     scripts/gpu_session.sh OUT.jsonl [NAME...]      # the four below, or those named
#     python scripts/gpu_table.py OUT.jsonl --plan PLAN.json
#
# OUT.jsonl gets the lines of scripts/benchmark.py; the second command makes the table of benchmarks/RESULTS.md of them, beside what
# `jaxdg plan --compile_for` predicts. SECONDS_IN_ALL (720) is the time for everything: what no longer fits is cut or left out, and what was
# measured stays. DATA_ROOT, where it is given, holds camvid/ for a training on real images.
# Needs jax, flax, optax, orbax-checkpoint, jaxtyping, pydantic, safetensors, opencv and pillow; for the peer torch, timm, transformers and
# scipy; for real images all that jaxdg needs. On a card of less than 100 GB the peer's step does not fit beside what JAX keeps for reuse. In
# this comparison JAX then keeps nothing, which slows ours a little.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?OUT.jsonl}"); shift
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-720}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -1)

vltseg="--config configs/gta5_eva02.py --dtype bfloat16"
windows="--image 512 1024 --windows_per_call 24 --batch_size 8"
# Most seconds, and the mode and its options.
declare -A lines=(
  [step]="300 train_step $vltseg --unroll --peer torch --rounds 6"
  [windows]="150 inference $vltseg $windows --peer torch --rounds 6"
  [real]="150 command --config configs/camvid_vit_tiny.py --run 60 --override data.root=${DATA_ROOT:-absent} --override model.weights=None"
  [breakdown]="240 breakdown $vltseg --unroll --rounds 4"
  [encoder]="150 train_step $vltseg --unroll --part encoder"
  [input]="240 train_step $vltseg --unroll --with_input"
  [images]="240 inference $vltseg --batch_size 16 --windows_per_call 16 --peer torch"
  [large]="300 train_step $vltseg --crop 1024 1024 --batch_size 8 --remat --rounds 5"
  [precision]="480 precision --config configs/gta5_eva02.py --batch_size 4 --run 300"
  [compile]="300 compile $vltseg"
  [scaling]="300 scaling --config configs/camvid_vit_tiny.py --dtype bfloat16 --batches 8 16 32 64 --rounds 5 --plot ${out%.jsonl}_scaling.svg"
)
[ $# -gt 0 ] || set -- step windows real breakdown
for name; do
  read -r limit arguments <<<"${lines[$name]:?not one of: ${!lines[*]}}"
  left=$((in_all - SECONDS))
  if [ "$name" = real ] && [ -z "${DATA_ROOT:-}" ]; then
    echo "== real is left out: DATA_ROOT is not given" >&2
    continue
  fi
  if [ "$left" -lt 30 ]; then
    echo "== $name is left out: $left s are left of $in_all" >&2
    continue
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  echo "== $name, at most $limit s: $arguments" >&2
  start=$SECONDS
  allocator=()
  [ "$name" = step ] && [ "${memory:-0}" -lt 100000 ] && allocator=(XLA_PYTHON_CLIENT_ALLOCATOR=platform)
  # shellcheck disable=SC2086
  env "${allocator[@]}" timeout --kill-after=10 "$limit" "$python" scripts/benchmark.py $arguments --out "$out" ||
    echo "== $name ended with code $?" >&2
  echo "== $name took $((SECONDS - start)) s" >&2
done
