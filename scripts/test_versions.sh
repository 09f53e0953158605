#!/usr/bin/env bash
# Runs the tests with the oldest releases that pyproject.toml allows (transformers 5.19, which vLLM 0.32 wants), with
# transformers 5.21, and with the newest (5.24), each in an environment of its own under .venv-versions, and prints
# a table. Arguments go to pytest; without any, all tests run:
#
#     bash scripts/test_versions.sh tests/routing tests/analysis tests/harness/test_model.py
#
# TORCH is what is installed as torch in all, by default the version of constraints.txt, since its builds are
# large and come from several places: TORCH=torch==2.7.0 tests the oldest. PYTHON is the interpreter.
# Warnings are no errors here: they announce what other releases change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=${PYTHON:-python3}
torch=${TORCH:-$(grep '^torch==' constraints.txt)}
home=$PWD/.venv-versions
if [ -n "${PIP_FIND_LINKS:-}" ]; then # uv does not read pip's variables
    export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}
fi

[ -x "$home/uv/bin/uv" ] || {
    "$base" -m venv "$home/uv"
    "$home/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
}
uv=$home/uv/bin/uv

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset HF_DATASETS_CACHE
failed=0
table="| versions | python | torch | transformers | lm-eval | numpy | result |"$'\n'"|---|---|---|---|---|---|---|"
for row in "5.19 lowest-direct" "5.21 highest" "5.24 highest"; do
    read -r release resolution <<<"$row"
    python=$home/$release/bin/python
    version() { "$python" -c 'import sys, importlib.metadata as m; print(m.version(sys.argv[1]))' "$1"; }
    echo "transformers $release, else $resolution: installing into $home/$release" >&2
    "$uv" venv --quiet --clear --python "$base" "$home/$release"
    # torch first and alone: lowest-direct would take another build of the same version.
    "$uv" pip install --quiet --python "$python" "$torch"
    "$uv" pip install --quiet --python "$python" --resolution "$resolution" \
        "torch==$(version torch)" "transformers==$release.*" -e '.[dev]'
    "$uv" pip freeze --quiet --python "$python" >"$home/$release.txt"
    "$python" -m pytest -W default "$@" 2>&1 | tee "$home/$release.log" || failed=1
    result=$(grep -E '(passed|failed|error).* in [0-9.]+s' "$home/$release.log" | tail -n 1 | tr -d =) ||
        result= # a quiet pytest prints no such line
    table+=$'\n'"| $resolution | $("$python" -c 'import platform; print(platform.python_version())')"
    for name in torch transformers lm-eval numpy; do table+=" | $(version "$name")"; done
    table+=" | ${result:-no test ran} |"
done
echo
echo "$table"
echo "All versions and what the tests said: $home/*.txt, *.log"
exit "$failed"
