"""Running text as tokens, a part at a time: a tokenizer takes some 150 bytes for each character that it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SHARED = 2**14
"""Characters that a window on a text shares with the next."""
WINDOW = SHARED + 250_007
"""Characters of a window. The difference is a prime: a run of one character that is longer than what two windows share
is cut into tokens of one length from its start or its end, and these would match in both by chance."""


def token_parts(processor: Any, rows: Sequence[str], end: Sequence[int]) -> Iterator[Sequence[int]]:
    """The tokens of all rows in a row, parted by `end`, each part made when it is asked for. They are the tokens that
    each row has when it is tokenized as a whole."""
    begun = False
    for batch in _batches(rows):
        many = [_windows(processor, batch[0])] if len(batch) == 1 else ([row] for row in _ids(processor, batch))
        for parts in many:
            if begun:
                yield end
            for part in parts:
                begun = begun or len(part) > 0
                yield part


def _batches(rows: Sequence[str]) -> Iterator[list[str]]:
    """Rows that have as many characters as a window at most, or one that has more."""
    batch: list[str] = []
    size = 0
    for row in rows:
        if batch and size + len(row) > WINDOW:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row) + 1
    if batch:
        yield batch


def _ids(processor: Any, texts: list[str]) -> list[list[int]]:
    return _called(processor, texts)["input_ids"]


def _windows(processor: Any, text: str) -> Iterator[Sequence[int]]:
    """The tokens of one text. Those near the ends of a window can be others than in the text, so two windows are
    joined where both have the same tokens at the same places, far from the end of one and the start of the other."""
    if len(text) <= WINDOW or not _parts_alike(processor):
        yield _ids(processor, [text])[0]
        return
    start, stop, taken = 0, WINDOW, 0
    tokens = _placed(processor, text, start, stop)
    while stop < len(text):
        low, high = stop - SHARED * 3 // 4, stop - SHARED // 4
        following = _placed(processor, text, stop - SHARED, stop - SHARED + WINDOW)
        shared = _between(tokens, low, high)
        if len(shared) and np.array_equal(shared, _between(following, low, high)):
            yield _between(tokens, taken, low)[:, 0].tolist()
            start, stop, taken, tokens = stop - SHARED, stop - SHARED + WINDOW, low, following
        else:
            stop += stop - start
            tokens = _placed(processor, text, start, stop)
    yield _between(tokens, taken, len(text) + 1)[:, 0].tolist()


def _parts_alike(processor: Any) -> bool:
    """Whether a tokenizer says where its tokens are, and makes the same ones wherever in a text they are: Unigram's
    sums of logarithms are rounded by what came before, which decides between ways that are as likely."""
    from tokenizers.models import Unigram

    backend = getattr(processor, "backend_tokenizer", None)
    return backend is not None and not isinstance(backend.model, Unigram)


def _placed(processor: Any, text: str, start: int, stop: int) -> np.ndarray:
    """The tokens of a part of a text, one a row: its id, and where in the text it begins and ends."""
    found = _called(processor, text[start:stop], return_offsets_mapping=True)
    places = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2) + start
    return np.column_stack((np.array(found["input_ids"], dtype=np.int64), places))


def _between(tokens: np.ndarray, low: int, high: int) -> np.ndarray:
    """Those that begin there."""
    return tokens[(low <= tokens[:, 1]) & (tokens[:, 1] < high)]


def _called(processor: Any, texts: str | list[str], **also: Any) -> Any:
    return processor(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **also,
    )
