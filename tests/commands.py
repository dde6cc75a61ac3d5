"""`python -m jointopt` as a test runs it: in a process of its own, or in this one, which has its libraries loaded."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

from jointopt.cli import main

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
