#!/usr/bin/env bash
# Unpack the kit and run one part of the checks. In the repository's root: bash .kit/check.sh 1|2 [ARGUMENT ...]
# If OUT is set, all results of a part go there as one archive, part-1.tar.gz or part-2.tar.gz, which is written
# again after each section; else they go to results/.
set -euo pipefail
part=$1
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${KIT_SITE:-/tmp/think-vllm-kit}
python=${PYTHON:-python3}
shift
if [ ! -e "$site/unpacked" ]; then
    mkdir -p "$site"
    tar -C "$site" -xJf "$kit/vllm.tar.xz"
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$kit"/*.whl
    touch "$site/unpacked"
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/think-vllm-triton}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
if [ -n "${OUT:-}" ]; then
    set -- --out "/tmp/think-vllm-results/part-$part" --archive "$OUT/part-$part.tar.gz" "$@"
fi
exec "$python" -m bench.gpu_check "$part" "$@"
