"""What `ElasticTrainer` puts beside the Trainer's own files of a checkpoint, and how it reads a checkpoint again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from jointopt.files import reading, write_tensors, write_whole, writing
from quant.errors import JointoptError

RECORD, ADDED = "supernet.json", "added.safetensors"


def write_beside(folder: Path, record: Mapping[str, Any], added: Mapping[str, Tensor]) -> None:
    """Writes parameters that the model's own class does not know and, to vouch for all, what a resumed training must
    have in common."""
    if added:
        whole = {name: each.detach().cpu().contiguous() for name, each in added.items()}
        write_tensors(folder / ADDED, whole, {"format": "pt"})
    write_whole(folder / RECORD, json.dumps(record, default=str), "train")


def restore(model: nn.Module, folder: str, record: Mapping[str, Any], added: Mapping[str, Tensor]) -> None:
    """Puts back the weights of a checkpoint, and the parameters that `added` has, in place.

    Raises:
        JointoptError: it holds no record, or one of another training, or is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise JointoptError(f"train: {folder!r} holds no {RECORD}; allowed: what this class saved")
    own = json.loads(json.dumps(record, default=str))
    kinds = {"space": "space", "leaving": "calibration", "added": "recipe or lora", "trained": "set of parameters"}
    with reading(f"train: {str(path)!r}", "what this class saved"):
        saved_by = json.loads(path.read_text())
        differing = [kind for key, kind in kinds.items() if saved_by.get(key) != own[key]]
    if differing:
        raise JointoptError(f"train: {folder!r} is of another {differing[0]}; allowed: the same")
    kept = _kept(path.with_name(ADDED), added) if added else {}
    with reading(f"train: the weights in {folder!r}", "what this class saved"):
        saved = _saved(model, Path(folder))
        for name, each in model.state_dict().items():
            if name not in added and (name not in saved or saved[name].shape != each.shape):
                raise ValueError(f"{name} is missing, or of another shape than {list(each.shape)}")
    model.load_state_dict(saved, strict=False)
    for name, parameter in added.items():
        parameter.data.copy_(kept[name])


def _saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What a checkpoint's folder holds of a model's weights, by their names in memory."""
    if not isinstance(model, PreTrainedModel):
        return load_file(folder / SAFE_WEIGHTS_NAME)
    # The Trainer reads names as they are in memory; `save_pretrained` writes those of the checkpoints.
    whole, told = type(model).from_pretrained(
        folder, dtype=model.dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    drawn = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    return {name: each for name, each in whole.state_dict().items() if name not in drawn}


def _kept(path: Path, added: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was saved of the parameters that the model's own class does not know."""
    with reading(f"train: {str(path)!r}", "what this class saved"):
        kept = load_file(path)
        for name, parameter in added.items():
            if kept[name].shape != parameter.shape:
                raise ValueError(f"{name} is {list(kept[name].shape)}, where {list(parameter.shape)} is trained")
    return kept


@contextmanager
def writing_all(folder: Path) -> Iterator[None]:
    """`writing`, of torch.save's files too."""
    try:
        with writing(f"train: {str(folder)!r}"):
            yield
    except RuntimeError as error:
        if "inline_container" not in str(error):  # where torch.save writes
            raise
        raise JointoptError(
            f"train: {str(folder)!r} cannot be written: torch.save fails, as it does on a full disk"
        ) from error
