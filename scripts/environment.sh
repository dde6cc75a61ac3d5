# Makes .venv with this package and its development tools, once; made anew when pyproject.toml changes. Sourced.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! command -v "$python" > /dev/null; then
    echo "needs Python 3.11 or newer as '$python'; set PYTHON to its name" >&2
    exit 2
fi
stamp=.venv/.installed
if [ ! -f "$stamp" ] || ! cmp -s pyproject.toml "$stamp"; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing into .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
    cp pyproject.toml "$stamp"
fi
