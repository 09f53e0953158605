# Sourced by the scripts of this folder, not run: `make_venv` or `make_venv dev` makes .venv in the
# repository's root, with the package and its dependencies, and sets `python` to its interpreter. It
# returns at once if nothing that affects the installation has changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$PWD/.venv/bin/python

make_venv() {
    local extra=${1:-} base=${PYTHON:-python3} stamp package=.

    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "'$base' is not Python 3.11 or newer: install one, or set PYTHON to its path." >&2
        exit 1
    fi
    # startup.py is the one source file that an editable installation copies.
    stamp=$(cat pyproject.toml constraints.txt lm_eval_bh/harness/plugin/startup.* | "$base" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.argv[1].encode()).hexdigest())' \
        "$PWD")
    # The dev extra contains everything that the plain installation has.
    if "$python" -c 'import lm_eval_bh' 2>/dev/null && { [ "$(cat .venv/stamp-dev 2>/dev/null)" = "$stamp" ] ||
        { [ -z "$extra" ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; }; }; then
        return
    fi

    echo "Installing into $PWD/.venv; the first time takes a few minutes."
    if ! "$python" -c 'import pip' 2>/dev/null; then
        if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "'$base' cannot make virtual environments: install its venv package" \
                "(Debian and Ubuntu: sudo apt install python3-venv), or set PYTHON to another Python." >&2
            exit 1
        fi
        "$base" -m venv --clear .venv
    fi
    [ -z "$extra" ] || package=".[$extra]"
    # torch first and alone: whatever asks for it later finds it.
    "$python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$package"
    echo "$stamp" >".venv/stamp${extra:+-$extra}"
}
