"""Causal language modelling: text, cut into pieces of one length."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.rows import TEXT, DataSource, check_named, column, read_columns, read_text, texts
from jointopt.tasks.problems import NEXT_TOKEN
from jointopt.tasks.running_text import token_parts
from jointopt.tasks.task import Samples, Task, place_of, text_length
from jointopt.tokenizer_settings import settings_kept
from quant.errors import JointoptError


def samples(source: DataSource, processor: Any, model: nn.Module) -> Samples:
    """All text in a row, rows of a table parted by the end-of-text token, in pieces of 512 tokens (or as many as the
    model and its tokenizer take, or `length`); what is left at the end is not used."""
    text = read_text(source)
    check_named(source, ("text",) if text is None else ())
    if text is not None:
        given = [text]
    else:
        columns = read_columns(replace(source, samples=None))
        given = texts(column(columns, source.text, TEXT, f"{source.key}.text"), f"{source.key}.text")
    end = [] if processor.eos_token_id is None else [processor.eos_token_id]
    length = text_length(source, processor, model)
    tokens = array("i")
    with settings_kept(processor):
        for part in token_parts(processor, given, end):
            tokens.extend(part)
            if source.samples is not None and len(tokens) >= source.samples * length:
                break
    pieces = torch.from_numpy(np.array(tokens[: len(tokens) // length * length])).reshape(-1, length)
    pieces = pieces[: source.samples]
    if not len(pieces):
        raise JointoptError(
            f"{source.key}: {source.path!r} has {len(tokens)} tokens; allowed: one piece of {length} or more "
            "(data.length makes it shorter)"
        )

    def collate(indices: Sequence[int]) -> Mapping[str, Tensor]:
        part = pieces[list(indices)].long()
        return {"input_ids": part, "labels": part}

    def mark(index: int) -> bytes:
        return pieces[index].long().numpy().tobytes()

    return Samples(len(pieces), collate, range(len(pieces)), place_of(model), mark)


TASK = Task("causal-lm", "AutoModelForCausalLM", {None: NEXT_TOKEN}, 4, 16, samples)
