#!/usr/bin/env bash
# All that waits for a GPU, on a bare machine that reaches nothing, in so many minutes of its time.
#
#   bash bench/gpu_session.sh OUT [MINUTES] [OPTION...]
#
# OUT: folder for gpu.tar.gz, which always holds all results so far, and session.log. MINUTES: from now to the end; default 9.
# OPTION: of bench/on_gpu.py. The same command on the same machine goes on; on another one it goes on with what is in
# bench/results/gpu, after `tar xzf OUT/gpu.tar.gz -C bench/results/gpu`. In 15 minutes: 6.5, then at once 4.5, then 2.5, as
# bench/on_gpu.py says.
#
# Packages that the machine lacks are taken as wheels from .whl/, or the folder in WHEELS:
#   python -m pip download --no-deps -d .whl diffusers==0.42.1 importlib_metadata
# PYTHON: the one that holds PyTorch; default python3. SCRATCH: for caches and results; default a folder in TMPDIR.
set -euo pipefail
SECONDS=0
fail() { echo "gpu_session: $1" >&2; exit 2; }

[ $# -ge 1 ] || fail "expected the folder to write to, found no argument"
mkdir -p "$1"
out=$(cd "$1" && pwd)
minutes=${2:-9}
shift $(($# < 2 ? $# : 2))
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "expected minutes as the second argument, found '$minutes'"
exec > >(tee -a "$out/session.log") 2>&1

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
scratch=${SCRATCH:-${TMPDIR:-/tmp}/agd_fast_gpu}
mkdir -p "$scratch"
export PYTHONUNBUFFERED=1 PYTHONPATH="$scratch/site:$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" AGD_FAST_CACHE="$scratch/agd_fast"

missing() {
  "$python" - <<'EOF'
from importlib.util import find_spec
names = "torch triton diffusers importlib_metadata accelerate safetensors transformers torchmetrics sklearn matplotlib rich typer yaml jinja2"
print(*(name for name in names.split() if find_spec(name) is None))
EOF
}

command -v "$python" >/dev/null || fail "expected a python that holds PyTorch, found no $python; set PYTHON"
lacking=$(missing)
if [ -n "$lacking" ]; then
  wheels=${WHEELS:-.whl}
  compgen -G "$wheels/*.whl" >/dev/null || fail "expected wheels in $wheels, found none; there is no $lacking here; see the top of this file"
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$scratch/site" "$wheels"/*.whl
  lacking=$(missing)
  [ -z "$lacking" ] || fail "expected wheels of all that is missing in $wheels, found none of $lacking"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || fail "expected a GPU, found no nvidia-smi that runs"

export AGD_FAST_CUDA_ARCHS=${AGD_FAST_CUDA_ARCHS:-90} AGD_FAST_BUILD_EXT=1
"$python" setup.py -q build_ext --inplace >"$out/build.log" 2>&1 && compgen -G "agd_fast/_cuda*.so" >/dev/null || echo "gpu_session: agd_fast._cuda was not built, see build.log: what needs it will be red"

left=$("$python" -c "print($minutes - $SECONDS / 60)")
echo "gpu_session: ready after $SECONDS s"
"$python" bench/on_gpu.py --output "$scratch/results" --tar "$out/gpu.tar.gz" --minutes "$left" "$@"
