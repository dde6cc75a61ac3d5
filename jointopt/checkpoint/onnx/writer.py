"""Writes a sub-network as model.onnx, which stock ONNX Runtime runs, with what goes beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from jointopt.batches import on_device
from jointopt.rebuilding.block_sizes import save_configs
from jointopt.rebuilding.structure import check_formats
from jointopt.rebuilding.timm_recipe import by_library, by_timm, preprocessing, recipe_of
from quant.errors import JointoptError
from quant.layers import QuantizedLayer
from search_spaces.llama import CHANGING

MODEL = "model.onnx"


def _check_positions(model: Any) -> None:
    """Raises JointoptError where positions are encoded by the length of the input at hand, which is not traced."""
    rope = (getattr(getattr(model, "config", None), "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in CHANGING:
        raise JointoptError(
            f"target onnxruntime: found rope_type {rope}; allowed: such as default, llama3, yarn, linear"
        )


def write(place: Path, model: Any, processor: Any, example: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """model.onnx and config.json in a folder, see `writers.Writer`.

    Args:
        processor: the tokenizer whose outputs are the inputs of a text model's graph.
        example: by which a model is traced that is neither of transformers nor of timm.

    Raises:
        JointoptError: a number format without a form in ONNX, a bfloat16 model, a quantized cache, images
            of another size than the model's, a model of no library that cannot be traced.
    """
    check(model)
    from jointopt.checkpoint.onnx.graph import OPSET, check_images, onnx_program

    own = not by_library(model)
    if not own:
        check_images(model, example)
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model).cpu()
        example = on_device(example, torch.device("cpu"))
    program = onnx_program(model, processor, example if own else None)
    program.save(str(place / MODEL))
    if isinstance(model, PreTrainedModel):
        save_configs(model, place)
    else:
        described: dict[str, Any] = {"class": type(model).__name__}
        if not own:
            described = {"timm": recipe_of(model), "pretrained_cfg": preprocessing(model)}
        (place / "config.json").write_text(json.dumps(described, indent=1))
    noted = {"target": "onnxruntime", "opset": OPSET, "stored": onnx_bytes(place / MODEL)}
    return noted, snippet(place.name, model)


def check(model: Any, processor: Any = None) -> None:
    """Raises JointoptError for what cannot be written: see `write`."""
    _check_positions(model)
    check_formats(model, "onnxruntime")
    for path, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise JointoptError(
                f"target onnxruntime: {path} is {parameter.dtype}; allowed: float32, as of dtype: float32"
            )
    held = next((path for path, module in model.named_modules() if "cache_record" in module.__dict__), None)
    if held is not None:
        raise JointoptError(f"export: {held} has a quantized cache; allowed for onnxruntime: none")


def onnx_bytes(path: Path) -> int:
    """Bytes of all tensors that an ONNX file stores, wherever they are."""
    import onnx

    total = 0
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        total += prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return total


def snippet(folder: str, model: Any) -> str:
    """How to load the folder, and how timm would prepare the images of a model of its own."""
    images = _IMAGES.format(folder=folder) if by_timm(model) and preprocessing(model) else ""
    exact = _EXACT if any(_multiplies_integers(module) for module in model.modules()) else ""
    return _SNIPPET.format(folder=folder, exact=exact, options=", options" if exact else "") + images


def _multiplies_integers(module: nn.Module) -> bool:
    given = module.scheme.activations if isinstance(module, QuantizedLayer) else None
    return given is not None and not given.kind.is_float


_SNIPPET = """Needs ONNX Runtime alone.

```python
import onnxruntime

{exact}session = onnxruntime.InferenceSession("{folder}/model.onnx"{options})
print({{each.name: each.shape for each in session.get_inputs()}})
```"""
_EXACT = """options = onnxruntime.SessionOptions()
# Without VNNI a processor's sums of 8-bit products saturate, unless they are told to be exact; with it, leave this out.
options.add_session_config_entry("session.x64quantprecision", "1")
"""
_IMAGES = """

Mean, standard deviation and size of its images are in config.json, where timm makes the transform from:

```python
import json

from timm.data import create_transform, resolve_data_config

prepared = json.load(open("{folder}/config.json"))["pretrained_cfg"]
transform = create_transform(**resolve_data_config(pretrained_cfg=prepared), is_training=False)
```"""
