"""Loads the model that a config names, with its tokenizer or image processor: a local folder, a hub id, timm/NAME.

Weights come from safetensors (or GGUF) only, and no code that comes with a model is run. Nothing is downloaded for a
name that is a path.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from jointopt.files import check_path
from jointopt.names import DEVICES, MODELS
from jointopt.rows import looks_like_hub_id
from jointopt.tasks import TASKS
from quant.errors import JointoptError, check_choice, did_you_mean, in_one_line, named_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_WORDS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
_TASK_OF = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: as the config has it.
        location: the folder, the hub id, or timm's name of the model.
        gguf: name of the GGUF file in the folder.
    """

    name: str
    kind: Literal["folder", "gguf", "timm folder", "timm", "hub"]
    location: str
    gguf: str | None = None

    @property
    def local(self) -> bool:
        return self.kind not in ("hub", "timm")

    @property
    def timm(self) -> bool:
        return self.kind.startswith("timm")

    def options(self) -> dict[str, Any]:
        """Keywords for every `from_pretrained` of transformers."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        return {"local_files_only": self.local, "trust_remote_code": False, **gguf}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what prepares its inputs.

    Attributes:
        processor: a tokenizer, an image processor of transformers, or timm's transform (PIL image -> tensor).
        untrained: names of weights that the checkpoint lacks (a new classification head).
    """

    model: nn.Module
    processor: Any
    task: str
    source: ModelSource
    untrained: tuple[str, ...] = ()

    @property
    def saved_processor(self) -> Any:
        """What an export has beside the model: not timm's transform, whose settings the model has itself."""
        return None if self.source.timm else self.processor


def find_source(name: str) -> ModelSource:
    """What a config's `model` names. Raises JointoptError for a path that does not exist or holds no model."""
    check_path(name, "model")
    path = Path(name)
    if path.is_dir():
        return _folder(name, path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, "gguf", str(path.parent), path.name)
    if path.exists():
        raise JointoptError(f"model: {name!r} is a file; allowed: {MODELS}")
    if name.startswith("timm/"):
        return ModelSource(name, "timm", _timm_name(name.removeprefix("timm/")))
    if looks_like_hub_id(name):
        return ModelSource(name, "hub", name)
    raise JointoptError(f"model: no folder {name!r}, and it is no hub id; allowed: {MODELS}")


def _folder(name: str, path: Path) -> ModelSource:
    files = sorted(file.name for file in path.glob("*.gguf"))
    if (path / "config.json").is_file():
        timm_like = "architecture" in _read_config(path)
        if timm_like or any(path.glob("*.safetensors")) or not files:
            return ModelSource(name, "timm folder" if timm_like else "folder", str(path))
    if len(files) == 1:
        return ModelSource(name, "gguf", str(path), files[0])
    found = f"{len(files)} GGUF files" if files else "no config.json"
    raise JointoptError(f"model: the folder {name!r} holds {found}; allowed: config.json and safetensors, or one GGUF")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JointoptError(f"model: {folder / 'config.json'} cannot be read: {in_one_line(error)}") from None
    if not isinstance(found, dict):
        raise JointoptError(f"model: {folder / 'config.json'} holds no object")
    return found


def _timm_name(name: str) -> str:
    import timm

    known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:
        raise JointoptError(f"model: timm has no {name!r}{did_you_mean(name, known)}")
    return name


def model_task(source: ModelSource) -> str:
    """The task that a model was made for, read off its config alone. Raises JointoptError where that does not say."""
    if source.timm:
        return "image-classification"
    if source.kind == "gguf":  # which names no head, and has none but this
        return "causal-lm"
    architectures = getattr(model_config(source), "architectures", None) or []
    if task := _task_of(architectures):
        return task
    said = ", ".join(architectures) or "no architecture"
    raise JointoptError(
        f"task: {source.name!r} names {said}, which is no model of {', '.join(TASKS)}; allowed: one with a head for "
        "these, or a config whose task says which"
    )


def exported_task(folder: Path) -> str | None:
    """The task of an export, read off its config.json; None where that does not say or cannot be read."""
    try:
        config = _read_config(folder)
    except JointoptError:  # what is wrong with the folder is verify's to say
        return None
    if "timm" in config:
        return "image-classification"
    architectures = config.get("architectures")
    return _task_of(map(str, architectures)) if isinstance(architectures, list) else None


def _task_of(architectures: Iterable[str]) -> str | None:
    named = (task for name in architectures for suffix, task in _TASK_OF.items() if name.endswith(suffix))
    return next(named, None)


def model_config(source: ModelSource) -> Any:
    """The transformers config of a source that is not timm's."""
    from transformers import AutoConfig

    with _explained(source):
        return AutoConfig.from_pretrained(source.location, **source.options())


def empty_model(source: ModelSource, task: str, dtype: str = "auto") -> nn.Module:
    """The model's architecture on the meta device, without any weight: for a space and its costs to be read off."""
    if source.timm:
        import timm

        with _explained(source), torch.device("meta"):
            model = timm.create_model(_timm_location(source), pretrained=False)
            return model.to(_dtype(dtype, _stored(source, None)))
    config = model_config(source)
    with _explained(source), torch.device("meta"):
        return _auto_class(task).from_config(config, dtype=_dtype(dtype, _stored(source, config)))


def load_model(name: str, task: str | None, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """The model at `name`: a local folder, a GGUF file or a folder with one, a hub id, or timm/NAME.

    Args:
        task: which head is loaded; None reads it off the model's config.
        device: "cpu", "cuda", "cuda:1", or "auto": cuda where it is there, else cpu.
        dtype: "float32", "bfloat16", or "auto": the checkpoint's own if it is one of these, else float32.

    Raises:
        JointoptError: no such model, weights that cannot be read, are quantized already or are another head's, no
            tokenizer or image processor, a device that is not there.
    """
    place = chosen_device(device)
    check_choice("dtype", dtype, ("auto", *DTYPES))
    source = find_source(name)
    task = task or model_task(source)
    check_choice("task", task, TASKS)
    loaded = (_load_timm if source.timm else _load_transformers)(source, task, dtype)
    loaded.model.eval().to(place)
    return loaded


def chosen_device(device: str) -> torch.device:
    """The device of a name. Raises JointoptError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind in there if there[kind]))
    kind, _, index = device.partition(":")
    if kind not in there or (index and not index.isdigit()):
        raise JointoptError(f"device: found {device!r}; allowed: {DEVICES}")
    if not there[kind] or int(index or 0) >= max(1, torch.cuda.device_count()):
        raise JointoptError(
            f"device: {device} is not available here; there is {', '.join(k for k in there if there[k])}"
        )
    return torch.device(device)


def _auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, TASKS[task].auto_class)


def _load_transformers(source: ModelSource, task: str, dtype: str) -> LoadedModel:
    from transformers.utils import logging

    config = model_config(source)
    if getattr(config, "jointopt", None):
        raise JointoptError(
            f"model: {source.name!r} is an export that only its own modeling_jointopt.py loads; allowed: the model "
            "that it was made of, or an export whose blocks are all alike and not quantized"
        )
    if source.kind != "gguf" and getattr(config, "quantization_config", None):
        raise JointoptError(f"model: {source.name!r} is quantized already; allowed: float32 or bfloat16 weights")
    weights = {} if source.kind == "gguf" else {"use_safetensors": True}
    logging.disable_progress_bar()
    with _explained(source):
        read_as = _dtype(dtype, _stored(source, config))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _explained(source), _one_seed():
            model, report = _auto_class(task).from_pretrained(
                source.location,
                dtype=read_as,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_whole` names them
                **weights,
                **source.options(),
            )
    finally:
        logging.set_verbosity(verbosity)
    _check_whole(source, model, report)
    _check_used(source, model, report)
    if source.kind == "gguf":
        _forget_gguf(model)
    return LoadedModel(model, _processor(source, task), task, source, tuple(sorted(report["missing_keys"])))


def _check_whole(source: ModelSource, model: Any, report: Mapping[str, Any]) -> None:
    """Raises JointoptError for weights of other shapes than the config says, and where there are none for a part of the
    model below its head: a pooler alone may be new as well, since encoders are often trained without."""
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise JointoptError(
            f"model: {source.name!r} holds {name} of shape {tuple(found)}; allowed by its config: {tuple(wanted)}"
        )
    body = f"{model.base_model_prefix}."
    weights = {name for name, _ in model.named_parameters()}
    lacking = sorted(
        name for name in weights & {*report["missing_keys"]} if name.startswith(body) and ".pooler." not in name
    )
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        odd = min(report["unexpected_keys"], default=None)
        held = f" (it holds {odd})" if odd is not None else ""
        raise JointoptError(
            f"model: {source.name!r} has no weights for {lacking[0]}{more}{held}; allowed: all but those of a head"
        )


def _check_used(source: ModelSource, model: Any, report: Mapping[str, Any]) -> None:
    """Warns of a checkpoint's weights that the model has no place for, unless it has a new head to be trained.

    Raises:
        JointoptError: they are of a layer that it has, and would compute otherwise: another head's of the same name.
    """
    kind, held = type(model).__name__, model.state_dict().keys() - report["missing_keys"]
    named = ", ".join(getattr(model.config, "architectures", None) or ())
    # Encoders are trained with a pooler, which RoBERTa's and ViT's classifiers have always left out.
    left = sorted(name for name in report["unexpected_keys"] if ".pooler." not in f".{name}")
    for name in left:
        layer = name.rpartition(".")[0]
        if f"{layer}.weight" in held:
            told = f" (its config names {named})" if named not in ("", kind) else ""
            raise JointoptError(
                f"model: {source.name!r} holds {name}{told}, without which {kind} would compute {layer}; allowed: "
                f"weights of a {kind}"
            )
    if left and not report["missing_keys"]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(f"model: {source.name!r} holds {left[0]}{more}, which {kind} leaves out", stacklevel=2)


def _stored(source: ModelSource, config: Any) -> torch.dtype | str | None:
    """How a checkpoint's weights are stored, as far as its config says, or most of those in a folder's file."""
    if source.kind == "gguf":
        return "GGUF"
    return getattr(config, "dtype", None) or (_stored_in(Path(source.location)) if source.local else None)


def _stored_in(folder: Path) -> torch.dtype | None:
    from safetensors import safe_open

    # The name that transformers and timm look for first; of several files, one is like the others.
    file = next(iter([*folder.glob("model.safetensors"), *sorted(folder.glob("*.safetensors"))]), None)
    if file is None:
        return None
    weights: Counter[str] = Counter()
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - safetensors' own
            tensor = opened.get_slice(name)
            weights[tensor.get_dtype()] += math.prod(tensor.get_shape())
    most = max(weights, key=weights.__getitem__, default=None)
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(most or "")


def _dtype(wanted: str, stored: torch.dtype | str | None) -> torch.dtype:
    """The type that weights are read as. Warns where it is wider than the stored one, since sizes count the wider."""
    if wanted != "auto":
        return DTYPES[wanted]
    if stored in ("GGUF", torch.float16):
        name = str(stored).removeprefix("torch.")
        warnings.warn(
            f"dtype: the weights are stored as {name} and read as float32, so that sizes, the original's too, count "
            "4 bytes for each that is not quantized; dtype: bfloat16 counts 2",
            stacklevel=2,
        )
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float32


def _forget_gguf(model: nn.Module) -> None:
    """The weights were read into floating point; what says that they are still packed would refuse to be saved."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if name in vars(holder):
            delattr(holder, name)


def load_processor(folder: Path, task: str) -> Any:
    """The tokenizer or image processor of a folder, by transformers alone. Raises JointoptError where there is none."""
    return _processor(ModelSource(str(folder), "folder", str(folder)), task)


def _processor(source: ModelSource, task: str) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    images = task == "image-classification"
    kind, needed = (AutoImageProcessor, "preprocessor_config.json") if images else (AutoTokenizer, "tokenizer")
    # Without its files transformers makes up a tokenizer without words.
    if source.kind == "folder" and not images and not any((Path(source.location) / name).is_file() for name in _WORDS):
        raise JointoptError(
            f"model: the folder {source.name!r} holds no tokenizer; allowed: one of {', '.join(_WORDS)}"
        )
    try:
        return kind.from_pretrained(source.location, **source.options())
    except Exception as error:
        raise JointoptError(
            f"model: {source.name!r} comes without a usable {needed} ({in_one_line(error)}); "
            "save the one it was trained with beside it"
        ) from None


def _load_timm(source: ModelSource, task: str, dtype: str) -> LoadedModel:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    if task != "image-classification":
        raise JointoptError(f"task: found {task}; {source.name!r} is a timm model: image-classification")
    if source.kind == "timm folder" and not any(Path(source.location).glob("*.safetensors")):
        raise JointoptError(f"model: the folder {source.name!r} holds no safetensors file")
    with _explained(source), _one_seed():
        model = timm.create_model(_timm_location(source), pretrained=True)
        model.to(_dtype(dtype, _stored(source, None)))
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return LoadedModel(model, transform, task, source)


def _timm_location(source: ModelSource) -> str:
    return f"local-dir:{source.location}" if source.kind == "timm folder" else source.location


@contextmanager
def _one_seed() -> Iterator[None]:
    """A head that the checkpoint lacks is drawn at random: a run that goes on in another process must have the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    """What transformers, timm, safetensors and the hub raise for a model that cannot be loaded, as one line: of a
    config.json whose values are of wrong types or sizes, that may be anything."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        meant = isinstance(error, OSError | ValueError | RuntimeError | ImportError | SafetensorError)
        told = in_one_line(error) if meant else named_line(error)
        where = "" if source.local else " (no folder of this name is here, so it was looked for on the hub)"
        raise JointoptError(f"model: {source.name!r} cannot be loaded{where}: {told}") from None
