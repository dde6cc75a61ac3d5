"""Does the tokenizer or image processor in an export prepare data as the original's does?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jointopt.batches import Batch
from jointopt.tokenizer_settings import SETTINGS, settings_of
from quant.errors import DOES_NOT_RUN, JointoptError, in_one_line

if TYPE_CHECKING:
    from jointopt.models import LoadedModel


def processor_differences(
    folder: Path, loaded: LoadedModel, expected: Sequence[Batch], prepare: Callable[[Any], Sequence[Batch]]
) -> list[str]:
    """What an export's processor, loaded by transformers, does otherwise than the original's; one line each.

    Args:
        loaded: the original. One of timm has its settings in config.json, and no processor to compare.
        expected: batches that its processor made.
        prepare: processor -> the same samples, as it makes batches of them.
    """
    from jointopt.models import load_processor

    if loaded.saved_processor is None:
        return []
    try:
        shipped = load_processor(folder, loaded.task)
        found = prepare(shipped)
    except JointoptError as error:
        return [f"processor: {str(error).removeprefix('model: ')}"]
    except DOES_NOT_RUN as error:
        return [f"processor: the export's cannot prepare the calibration data: {in_one_line(error)}"]
    differences = []
    for key, mine, theirs in zip(SETTINGS, settings_of(shipped), settings_of(loaded.processor), strict=True):
        if mine != theirs:
            differences.append(f"processor: {key} {mine} in the export, {theirs} in the original; export it again")
    if (name := _first_apart(found, expected)) is not None:
        kind = type(shipped).__name__
        differences.append(f"processor: {name} that the export's {kind} makes of the calibration data are others")
    return differences


def _first_apart(found: Sequence[Batch], expected: Sequence[Batch]) -> str | None:
    """The name of the first input that is not the same; of two unequal lists of names the one that is not in both."""
    for mine, theirs in zip(found, expected, strict=False):
        if other := sorted(mine.keys() ^ theirs.keys()):
            return other[0]
        for name, tensor in mine.items():
            if not torch.equal(tensor, theirs[name]):
                return name
    return None if len(found) == len(expected) else "batches"
