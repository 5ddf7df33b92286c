#!/usr/bin/env bash
# Makes a Python 3.12 environment that COMPILES programs for an NVIDIA H200 without a GPU; nothing runs there.
#   tests/h200/setup.sh [DIR]      about 1.5 GB, one to three minutes; DIR defaults to ~/.cache/h200-compile
# Then: pytest -m h200             (with another DIR: H200_COMPILE=DIR pytest -m h200)
set -euo pipefail
env=${1:-$HOME/.cache/h200-compile}
python=$(ls -d "$HOME"/.pyenv/versions/3.12.*/bin/python 2>/dev/null | tail -n 1 || true)
python=${python:-python3.12}
"$python" -m venv "$env"
# jax 0.11.2 is the version of which the facts in benchmarks/h200 were noted; the rest is what jaxinfer imports.
"$env/bin/pip" install -q jax==0.11.2 jaxlib==0.11.2 flax numpy tokenizers huggingface_hub jinja2
# The CUDA plugin compiles with these alone; its other dependencies (cuDNN, NCCL, ...) are only needed to run.
"$env/bin/pip" install -q --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
echo "ready: $env/bin/python"
