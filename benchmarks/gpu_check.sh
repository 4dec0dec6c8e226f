#!/usr/bin/env bash
# Everything that needs a GPU, in one command: see benchmarks/gpu_check.py.
#
#     PYTHON=.venv/bin/python benchmarks/gpu_check.sh
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
