#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the CUDA extension, runs the tests marked
# `cuda`, runs the kernels under compute-sanitizer where that is installed, prints a table of times.
#
#     PYTHON=.venv/bin/python benchmarks/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: torch sees no CUDA device; run this on a machine with a GPU" >&2
    exit 2
fi

"$PYTHON" setup_cuda.py build_ext --inplace
"$PYTHON" -m pytest -m cuda -rs tests

if command -v compute-sanitizer > /dev/null; then
    cases='(test_setup or test_mul or test_update or times) and not 1024'
    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" -m pytest -m cuda tests/test_hinv_cuda.py -k "$cases"
    done
else
    echo "compute-sanitizer is not installed: its checks were left out"
fi

"$PYTHON" benchmarks/gpu_step.py
"$PYTHON" benchmarks/gpu_rows.py --json benchmarks/results/gpu_rows.json
