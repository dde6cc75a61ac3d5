"""What a model's outputs are: logits of one class of several, of several at once, or measured values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.batches import Batch
from quant.errors import JointoptError

MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"
"""What transformers calls outputs that are not one class of several: `config.problem_type`."""
CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
"""How the names of the classes end of which transformers asks it."""

IGNORED = -100
"""The label of what counts for nothing, torch's and transformers'."""

TOGETHER = 2**18
"""Logits that are worked on at a time: of a large vocabulary, more would leave a CPU's cache between two passes over
them. Elsewhere AT_ONCE, which bounds the memory."""
AT_ONCE = 2**26


def row_groups(rows: int, classes: int, device: torch.device) -> Iterator[slice]:
    """Rows of logits [rows, classes] in groups that are worked on one after the other."""
    count = max(1, (TOGETHER if device.type == "cpu" else AT_ONCE) // classes)
    return (slice(at, at + count) for at in range(0, rows, count))


def problem_of(model: Any) -> str | None:
    """What a classifier of transformers says that its outputs are, where they are not one class of several; of one
    output that says nothing they are measured values, as transformers has it. What models of other kinds have under
    `problem_type` means nothing, to transformers either."""
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is None and getattr(config, "num_labels", None) == 1:
        problem = REGRESSION
    classifies = any(each.__name__.endswith(CLASSIFIERS) for each in type(model).__mro__)
    return problem if classifies and problem in (MULTI_LABEL, REGRESSION) else None


def first_output(output: Any) -> Any:
    """What a module returns, or the first of several: a block's hidden state, before its weights of attention."""
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple | list) else output


def named_output(output: Any, *names: str) -> Any:
    """What an output holds by the first of these names, whether as an attribute or a key; None where by none. Of a
    tensor, itself: a model may return nothing else."""
    if isinstance(output, Tensor):
        return output
    found = (output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in names)
    return next((each for each in found if each is not None), None)


def logits_or_states(output: Any) -> Any:
    """The logits, or what a model without a head gives in their place; None where there is neither."""
    return named_output(output, "logits", "last_hidden_state")


def logits_of(model: nn.Module, inputs: Batch) -> Tensor:
    """The logits, whether the model returns a tensor (timm) or an output or dict that has them (transformers)."""
    output = model(**inputs)
    logits = named_output(output, "logits")
    if not isinstance(logits, Tensor):
        raise JointoptError(
            f"the model returned a {type(output).__name__} without logits; allowed: a tensor, or an output or dict "
            "with logits"
        )
    return logits


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """A model computes no keys and values for later tokens, beside which samples that are packed into one row would
    attend to each other. Its config is afterwards as it was."""
    config: Any = getattr(model, "config", None)
    known = hasattr(config, "use_cache")
    before = getattr(config, "use_cache", None)
    if known:
        config.use_cache = False
    try:
        yield
    finally:
        if known:
            config.use_cache = before
        elif hasattr(config, "use_cache"):  # by transformers' Trainer
            del config.use_cache
