"""Files that a reader never sees half of, and that a process which dies leaves as they were."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from quant.errors import JointoptError


def write_whole(path: Path, text: str, what: str) -> None:
    """Writes a file beside its place, then moves it there.

    Args:
        what: an error begins with: the config's key, or the command.

    Raises:
        JointoptError: it cannot be written; nothing is left beside.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise JointoptError(f"{what}: {str(path)!r} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            beside.unlink()
