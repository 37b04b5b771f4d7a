#!/usr/bin/env bash
# All measurements that need an accelerator, on one H100 or H200 in about 25 minutes: JSON lines of scripts/benchmark.py.
#
#     scripts/gpu_session.sh OUT.jsonl [NAME...]      # all of them in this order, or those named
#
# Needs jax, flax, optax, orbax-checkpoint, jaxtyping, safetensors, opencv and pillow, and for the peer torch, timm, transformers and scipy;
# no data, no weights. One that fails or takes longer than its limit is reported and does not stop the others.
# On a card of less than 100 GB the peer's training step does not fit beside what JAX keeps for reuse. In this comparison JAX then keeps
# nothing, which slows ours a little; MFU is read from `step`, without the peer.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?OUT.jsonl}"); shift
python=${PYTHON:-python3}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)

vltseg="--config configs/gta5_eva02.py --dtype bfloat16"
windows="--image 512 1024 --windows_per_call 24 --batch_size 8"
declare -A lines=(
  [encoder]="train_step $vltseg --part encoder"
  [step]="train_step $vltseg --with_input"
  [peer]="train_step $vltseg --peer torch --rounds 6"
  [windows]="inference $vltseg $windows --peer torch"
  [images]="inference $vltseg --batch_size 16 --windows_per_call 16 --peer torch"
  [large]="train_step $vltseg --crop 1024 1024 --batch_size 8 --remat --rounds 5"
  [breakdown]="breakdown $vltseg --rounds 5"
  [precision]="precision --config configs/gta5_eva02.py --batch_size 4 --run 300"
  [compile]="compile $vltseg"
  [scaling]="scaling --config configs/camvid_vit_tiny.py --dtype bfloat16 --batches 8 16 32 64 --rounds 5 --plot ${out%.jsonl}_scaling.svg"
)
[ $# -gt 0 ] || set -- encoder step peer windows images large breakdown precision compile scaling
for name; do
  echo "== $name: ${lines[$name]}" >&2
  start=$SECONDS
  allocator=()
  [ "$name" = peer ] && [ "$memory" -lt 100000 ] && allocator=(XLA_PYTHON_CLIENT_ALLOCATOR=platform)
  # shellcheck disable=SC2086
  env "${allocator[@]}" timeout 480 "$python" scripts/benchmark.py ${lines[$name]} --out "$out" || echo "== $name ended with code $?" >&2
  echo "== $name took $((SECONDS - start)) s" >&2
done
