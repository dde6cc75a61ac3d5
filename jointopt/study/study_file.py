"""The SQLite file of a study: which file is one, who may write to it, and what is wrong with it in one line."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.errors import JointoptError

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS generations (number INTEGER PRIMARY KEY, genomes TEXT NOT NULL, predicted TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (
    number INTEGER PRIMARY KEY, generation INTEGER NOT NULL, genome TEXT NOT NULL UNIQUE,
    metrics TEXT, failed TEXT, seconds REAL NOT NULL);
"""
TABLES = ("facts", "generations", "evaluations")


@contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """SQLite's errors (a full disk, a damaged file, one that is no database) as one line."""
    try:
        yield
    except (sqlite3.Error, json.JSONDecodeError) as error:
        raise JointoptError(f"study {str(path)!r}: {error}") from None


def connect(path: Path | None, new: bool) -> sqlite3.Connection:
    """Raises JointoptError before it writes anything into another program's database, or into none where not `new`."""
    file = None if path is None else path.resolve()  # beside which sqlite3 keeps its log, if this is a link
    writable = file is None or new or (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK))
    with explained(path):
        connection = sqlite3.connect(_address(file, writable), timeout=30, uri=True)
        with closed_if_refused(connection):
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables - set(TABLES) or not (new or "facts" in tables):
                found, allowed = ", ".join(sorted(tables)) or "none", ", ".join(TABLES)
                raise JointoptError(f"study: {str(path)!r} is no study; found tables {found}; allowed: {allowed}")
            if writable:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(_TABLES)
    return connection


def _address(path: Path | None, writable: bool) -> str:
    """As sqlite3 takes it. What cannot be written to is read as it is, unless a writer has it open, or left its log."""
    if path is None:
        return ":memory:"
    log, index = Path(f"{path}-wal"), Path(f"{path}-shm")
    written = index.exists() or (log.exists() and log.stat().st_size > 0)
    return path.as_uri() + ("" if writable else "?mode=ro" if written else "?immutable=1")


@contextmanager
def closed_if_refused(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise
