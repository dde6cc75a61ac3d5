"""A user's paths; files that a reader sees whole or not at all, and that one process at a time writes to."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from quant.errors import JointoptError, in_one_line, named_line

if TYPE_CHECKING:
    from torch import Tensor

_SPEAKING: tuple[type[Exception], ...] = (OSError, ValueError, SafetensorError)
"""Exceptions whose own message can be shown unchanged."""
_NOT_SPEAKING = (AttributeError, LookupError, NotImplementedError, OverflowError, RecursionError, TypeError)
DAMAGED: tuple[type[Exception], ...] = (*_SPEAKING, *_NOT_SPEAKING)
"""What reading a file raises that is cut short, was edited, or is of another kind than its name says."""


def from_home(path: str) -> str:
    """A path as a user writes it, with the home folder in place of a leading ~, which no shell has replaced in a file
    or behind an =. Raises JointoptError for the ~ of an unknown user, and for a variable, which nothing fills in."""
    if re.search(r"(^|/)\$(\w+|\{\w+\})(/|$)", path):
        raise JointoptError(f"{path!r}; allowed: a path without variables; ~ is your home")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise JointoptError(f"{path!r}, which is nobody's home; allowed: ./{path} for a folder of that name") from None


def check_path(path: str | Path, what: str) -> None:
    """Raises JointoptError where it cannot even be told whether a path is there: its name is too long, or it is in a
    folder that is closed to the user.

    Args:
        what: an error begins with: the config's key, or the command.
    """
    try:
        os.stat(path)  # pathlib tells of some that they are not there
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # ValueError: a character that no path has
        raise JointoptError(f"{what}: {str(path)!r} cannot be looked up: {getattr(error, 'strerror', error)}") from None


@contextmanager
def reading(what: str, allowed: str = "", *also: type[Exception]) -> Iterator[None]:
    """What a damaged file raises within as one line: `JointoptError`.

    Args:
        what: is read, as the error begins: the config's key or the command, and the path.
        allowed: in place of a damaged one.
        also: what the file's own reader raises beside `DAMAGED`.
    """
    try:
        yield
    except JointoptError:
        raise
    except (*DAMAGED, *also) as error:
        told = in_one_line(error) if isinstance(error, (*_SPEAKING, *also)) else named_line(error)
        # An OSError is the system's, as of permissions or a broken disk: the file itself may be whole.
        instead = f"; allowed: {allowed}" if allowed and not isinstance(error, OSError) else ""
        raise JointoptError(f"{what} cannot be read: {told}{instead}") from None


@contextmanager
def writing(what: str) -> Iterator[None]:
    """What the system refuses within, as on a full disk, as one line: `JointoptError`.

    Args:
        what: is written, as the error begins: the config's key or the command, and the path.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or in_one_line(error)
        raise JointoptError(f"{what} cannot be written: {told}") from None


def write_whole(path: Path, text: str, what: str) -> None:
    """Writes a file beside its place, then moves it there. A link stays one.

    Args:
        what: an error begins with: the config's key, or the command.

    Raises:
        JointoptError: it cannot be written, or is a device or a pipe; nothing is left beside.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(f"{what}: {str(path)!r}"):
            _check_replaceable(path)
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file of safetensors, written beside its place and moved there; readable to whom the umask says: safetensors
    alone makes it readable to its owner only. A link stays one. What a killed process left beside is written over, for
    which the name beside is one alone: these files are large.

    Raises:
        OSError, SafetensorError: it cannot be written; nothing is left beside.
    """
    from safetensors.torch import save_file

    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}")
    try:
        _check_replaceable(path)
        beside.unlink(missing_ok=True)
        beside.touch()
        mode = beside.stat().st_mode
        save_file(tensors, beside, metadata=metadata)
        beside.chmod(mode)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _check_replaceable(path: Path) -> None:
    """Raises OSError for a device or a pipe: root would put the file in the place of /dev/null, for all the machine."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe")


def locked(path: Path, what: str, wait: float = 0.0) -> sqlite3.Connection:
    """A lock on a file of its own, which dies with the process: an exclusive transaction. Closing it lets others in.

    Args:
        what: is locked, as an error names it.
        wait: seconds for another process to be done.

    Raises:
        JointoptError: another process holds it, the file cannot be opened or is something else.
    """
    try:
        lock = sqlite3.connect(path, timeout=wait, isolation_level=None)
    except sqlite3.Error as error:
        raise JointoptError(f"{what}: {error}") from None
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.DatabaseError as error:
        lock.close()
        if "locked" not in str(error):
            raise JointoptError(f"{what}: {error}") from None
        raise JointoptError(f"{what}: another process is writing to it; reports can be read meanwhile") from None
    return lock
