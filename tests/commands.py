"""`python -m jointopt` as a test runs it: in a process of its own, or in this one, which has its libraries loaded."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from jointopt.cli import main
from tests.saved import save_vit, write_images

ROOT = Path(__file__).parents[1]


def command(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    """In a process of its own, on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    words = [sys.executable, "-m", "jointopt", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, **options)


def at_once(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """In this process, where what starts and ends one is not what is tested."""
    words, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "200"
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def heed_ctrl_c() -> None:
    """Whoever runs the tests in the background may have had them ignore it, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def user_place(folder: Path) -> Path:
    """The folder with a model and its data, as a user has them."""
    save_vit(folder / "vit")
    write_images(folder / "images")
    return folder


def write_config(folder: Path, **changes: object) -> Path:
    """`config.yaml` of a short run in such a place; a change to None leaves its key out."""
    content: dict = {
        "model": "vit",
        "task": "image-classification",
        "data": {"calibrate": "images", "evaluate": "images", "batch_size": 12},
        "space": {"depth": [1, 2], "mlp": [64, 128], "schemes": ["none", "W8A8", "W4A16"]},
        "objectives": ["accuracy", "size"],
        "search": {"evaluations": 12},
        "device": "cpu",
        "output": "runs/vit",
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def finished_run(place: Path) -> Path:
    """The output of a run of that config."""
    write_config(place)
    done = at_once("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs/vit"


def refused(capsys, place: Path, monkeypatch, *words: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    monkeypatch.chdir(place)
    capsys.readouterr()  # what the test itself has printed, such as progress while it saved a model
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("jointopt: error: ")
    return lines[0]
