"""A tokenizer's truncation and padding: each call leaves its own in the object, and so in a tokenizer.json saved of it.

transformers says so of `set_truncation_and_padding` (tokenization_utils_tokenizers.py, 5.x).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jointopt.files import reading
from jointopt.rows import looks_like_hub_id

FILE = "tokenizer.json"
SETTINGS = ("truncation", "padding")


def settings_of(processor: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Truncation and padding; None where there is none, and for what is no tokenizer with settings of its own."""
    backend = _backend(processor)
    return getattr(backend, "truncation", None), getattr(backend, "padding", None)


@contextmanager
def settings_kept(processor: Any) -> Iterator[None]:
    """The block may call the tokenizer; it ends with the truncation and padding that it began with."""
    found = settings_of(processor)
    try:
        yield
    finally:
        if (backend := _backend(processor)) is not None:
            _set(backend, *found)


@contextmanager
def settings_of_its_files(processor: Any) -> Iterator[None]:
    """Within the block the tokenizer has the truncation and padding of the tokenizer.json that it was loaded from;
    where that is not here, those that it has."""
    with settings_kept(processor):
        backend = _backend(processor)
        file = None if backend is None else _file_of(processor)
        if file is not None:
            from tokenizers import Tokenizer

            with reading(f"processor: {str(file)!r}", "what it was loaded from", Exception):  # all that tokenizers has
                loaded = Tokenizer.from_file(str(file))
            _set(backend, loaded.truncation, loaded.padding)
        yield


def _backend(processor: Any) -> Any:
    """The tokenizer of the tokenizers library that is inside, None where there is none."""
    return getattr(processor, "backend_tokenizer", None)


def _set(backend: Any, truncation: dict[str, Any] | None, padding: dict[str, Any] | None) -> None:
    if truncation is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(**truncation)
    if padding is None:
        backend.no_padding()
    else:
        backend.enable_padding(**padding)


def _file_of(processor: Any) -> Path | None:
    """The tokenizer.json of a folder, or of a hub's model in its cache; nothing is downloaded."""
    from transformers.utils import cached_file

    name = str(getattr(processor, "name_or_path", "") or "")
    if not name or not (Path(name).is_dir() or looks_like_hub_id(name)):
        return None
    found = cached_file(
        name,
        FILE,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
