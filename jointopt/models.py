"""Loads the model that a config names, with what turns data into its inputs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jointopt.tasks import TASKS
from quant.errors import JointoptError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and its tokenizer, image processor or timm transform (None where there is none)."""

    model: nn.Module
    processor: Any
    name: str


def load_model(
    name: str, task: str | None, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """The model at `name`: a local folder, a .gguf file, a hub id, or timm/NAME.

    Args:
        task: a key of `TASKS`; None loads the class that the folder's config names.
        device: auto takes cuda, then mps, then cpu.
        dtype: auto takes what the weights are stored in, if that is float32 or bfloat16.

    Raises:
        JointoptError: nothing there, a model without a known class, a device that is not there, another dtype.
    """
    place = chosen_device(device)
    if dtype not in ("auto", *DTYPES):
        raise JointoptError(f"dtype: found {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    path = Path(name)
    if name.startswith("timm/") or _is_timm_folder(path):
        loaded = _load_timm(name)
    elif path.exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        loaded = _load_transformers(name, path, task, dtype, trust_remote_code)
    else:
        raise JointoptError(f"model: {name!r} does not exist, and is neither a hub id nor timm/NAME")
    model = loaded.model.to(place)
    if dtype != "auto":
        model = model.to(DTYPES[dtype])
    found = next(model.parameters()).dtype
    if found not in DTYPES.values():
        raise JointoptError(f"dtype: {name} is stored in {str(found)[6:]}; choose one: {', '.join(DTYPES)}")
    return LoadedModel(model.eval(), loaded.processor, loaded.name)


def chosen_device(device: str) -> torch.device:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device not in DEVICES:
        raise JointoptError(f"device: found {device!r}; allowed: {', '.join(DEVICES)}")
    if device == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there[device]:
        raise JointoptError(
            f"device: {device} is not available here; there is {', '.join(k for k, v in there.items() if v)}"
        )
    return torch.device(device)


def _is_timm_folder(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and "architecture" in json.loads(config.read_text())


def _load_timm(name: str) -> LoadedModel:
    import timm

    wanted = name.removeprefix("timm/")
    source = f"local-dir:{name}" if Path(name).is_dir() else wanted
    try:
        model = timm.create_model(source, pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise JointoptError(f"model: timm cannot load {name!r}: {str(error).splitlines()[0]}") from error
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    return LoadedModel(model, transform, name)


def _load_transformers(name: str, path: Path, task: str | None, dtype: str, trust: bool) -> LoadedModel:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "trust_remote_code": trust}
    where = name
    if path.suffix == ".gguf":
        where, options["gguf_file"] = str(path.parent), path.name
        options["dtype"] = DTYPES.get(dtype, torch.float32)
    elif path.exists() and not (path / "config.json").is_file():
        raise JointoptError(f"model: {name!r} has no config.json")
    if task is not None and task not in TASKS:
        raise JointoptError(f"task: found {task!r}; allowed: {', '.join(TASKS)}")
    try:
        kind = getattr(transformers, TASKS[task].auto_class) if task else _named_class(transformers, where, options)
        model = kind.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        raise JointoptError(f"model: {name!r} cannot be loaded: {str(error).splitlines()[0][:300]}") from error
    if path.suffix == ".gguf":
        _forget_gguf(model)
    return LoadedModel(model, _processor(transformers, where, options), name)


def _forget_gguf(model: nn.Module) -> None:
    """The weights were read into floating point; what says that they are still packed would refuse to be saved."""
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if name in vars(holder):
            delattr(holder, name)


def _named_class(transformers: Any, where: str, options: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=options["trust_remote_code"])
    named = (config.architectures or [None])[0]
    if named is None or not hasattr(transformers, named):
        raise JointoptError(f"task: the model names no known architecture ({named}); allowed: {', '.join(TASKS)}")
    return getattr(transformers, named)


def _processor(transformers: Any, where: str, options: dict[str, Any]) -> Any:
    """The tokenizer or image processor beside the model, None where there is neither."""
    extra = {k: v for k, v in options.items() if k in ("gguf_file", "trust_remote_code")}
    for kind in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        try:
            return kind.from_pretrained(where, **extra)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
