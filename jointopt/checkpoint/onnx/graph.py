"""From an extracted model to an ONNX graph: named inputs and outputs, dynamic batch and lengths, a cache of keys."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from jointopt.batches import sample_count
from jointopt.checkpoint.onnx.convolutions import write_convolutions
from jointopt.checkpoint.onnx.layers import OnnxConv2d, OnnxEmbedding, OnnxLayer, OnnxLinear
from jointopt.checkpoint.onnx.shared_weights import write_shared_weights
from jointopt.outputs import logits_or_states
from quant.errors import DOES_NOT_RUN, JointoptError, in_one_line
from quant.layers import QuantizedLayer
from search_spaces.clones import exchange, structural_clone, without_chunks

OPSET = 21
"""The first with 4-bit and FP8 types throughout; ONNX Runtime 1.20 and later run it."""
FREE_PATCHES = (4, 6)
"""Patches, or squares of 16 pixels, of the image that a model of any size is traced with; the two sides differ, so that
they are told apart."""
TWINS = {nn.Embedding: OnnxEmbedding, nn.Linear: OnnxLinear, nn.Conv2d: OnnxConv2d}


class ImageGraph(nn.Module):
    """pixels -> logits."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return logits_or_hidden_states(self.model(pixels))


class TextGraph(nn.Module):
    """Token ids and masks -> logits, without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if getattr(self.model.config, "use_cache", False):
            given["use_cache"] = False
        return logits_or_hidden_states(self.model(input_ids=input_ids, attention_mask=attention_mask, **given))


class DecoderGraph(nn.Module):
    """Token ids and the keys and values of earlier ones -> logits, and keys and values of all."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[list[Tensor]]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache([(keys, values) for keys, values in past_key_values]),
            use_cache=True,
        )
        cached = [each for layer in output.past_key_values.layers for each in (layer.keys, layer.values)]
        return (output.logits, *cached)


def logits_or_hidden_states(output: Any) -> Tensor:
    """The logits, or what a model without a head gives in their place. Raises JointoptError where there is neither."""
    if (held := logits_or_states(output)) is not None:
        return held
    found = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
    raise JointoptError(f"target onnxruntime: the model returns {found}; allowed: logits, or last_hidden_state")


RETURNS, ARGUMENTS, FIXED = "returns", "arguments", "fixed"
"""Keys of a file's metadata: "tensor" where the model gives one, and not several by name; of a model of no library, the
names that its forward takes, in their order, and the values among them that are no tensors."""


def onnx_program(model: nn.Module, processor: Any = None, example: Mapping[str, Any] | None = None) -> Any:
    """The model as a `torch.onnx.ONNXProgram`, its quantized layers as the operators of `layers`.

    Inputs are called as the model's own (`pixel_values`; `x` for timm), for models that generate text those of
    Optimum: past_key_values.0.key, present.0.key and so on for each attention layer that there is.

    Args:
        processor: the tokenizer that makes a text model's inputs, which are the graph's.
        example: inputs of a model of no library, by their names; only the number of samples is left open.

    Raises:
        JointoptError: a model of no library returns something else than tensors, or cannot be traced.
    """
    if example is not None:
        return _own_program(model, example)
    graph, inputs, names = _graph(without_chunks(with_twins(model)).eval(), processor)
    shapes = _dynamic_shapes(inputs, _image_size(model) is None)
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in names if name.startswith("past"))]
    program = _traced_of(model, graph, inputs, dynamic_shapes=shapes, input_names=names, output_names=outputs)
    if names == ["x"]:
        program.model.metadata_props[RETURNS] = "tensor"
    return program


def _own_program(model: nn.Module, example: Mapping[str, Any]) -> Any:
    kind = type(model).__name__
    accepted = list(inspect.signature(model.forward).parameters)
    given = sorted(example, key=lambda name: accepted.index(name) if name in accepted else len(accepted))
    tensors = [name for name in given if isinstance(example[name], Tensor)]
    fixed = {name: example[name] for name in given if name not in tensors}
    for name, value in fixed.items():
        if not isinstance(value, bool | int | float | str | None):
            found = type(value).__name__
            raise JointoptError(f"export: {name} is a {found}; allowed: tensors, and numbers, text or None, which stay")
    batched = [name for name in tensors if example[name].dim() and len(example[name]) == sample_count(example)]
    # One sample would be taken for the only number there is.
    inputs = {name: torch.cat([example[name]] * 2)[:2] if name in batched else example[name] for name in given}
    shapes = {name: {0: "batch"} if name in batched else None for name in given}
    graph = with_twins(model).eval()
    try:
        with torch.no_grad():
            output = graph(**inputs)
    except DOES_NOT_RUN as error:
        raise JointoptError(f"export: {kind} does not run on two samples: {in_one_line(error)}") from error
    names = _output_names(output)
    if both := sorted({*names} & {*tensors}):
        raise JointoptError(f"export: {both[0]} is an input and an output; allowed: names of their own")
    program = _traced_of(model, graph, inputs, dynamic_shapes=shapes, input_names=tensors, output_names=names)
    if isinstance(output, Tensor):
        program.model.metadata_props[RETURNS] = "tensor"
    program.model.metadata_props[ARGUMENTS] = json.dumps(accepted)
    program.model.metadata_props[FIXED] = json.dumps(fixed)
    return program


def _traced_of(model: nn.Module, graph: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    try:
        return traced(graph, (), inputs, **options)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        told = f"torch.onnx cannot trace {type(model).__name__}: {in_one_line(cause)}"
        raise JointoptError(f"export: {told}") from error


def _output_names(output: Any) -> list[str]:
    if isinstance(output, Tensor):
        return ["output"]
    if not isinstance(output, Mapping | tuple | list):
        kind = type(output).__name__
        raise JointoptError(f"export: the model returns a {kind}; allowed: a tensor, or a tuple or dict of tensors")
    named = dict(output) if isinstance(output, Mapping) else {f"output.{at}": each for at, each in enumerate(output)}
    if not named or not all(isinstance(each, Tensor) for each in named.values()):
        found = {name: type(each).__name__ for name, each in named.items()}
        raise JointoptError(f"export: the model returns {found}; allowed: a tensor, or a tuple or dict of tensors")
    return list(named)


def traced(graph: nn.Module, arguments: tuple, inputs: dict[str, Any] | None = None, **options: Any) -> Any:
    """A module that holds ONNX layers as a `torch.onnx.ONNXProgram`; `options` are those of `torch.onnx.export`."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)  # whole graphs, where one cannot be traced
        try:
            program = torch.onnx.export(
                graph,
                arguments,
                kwargs=inputs,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
                **options,
            )
        except RuntimeError as error:
            if (refused := _refusal(error)) is not None:
                raise refused from None
            raise
        finally:
            logging.disable(before)
    assert program is not None
    _name_types(program.model.graph)
    write_convolutions(program.model)
    write_shared_weights(program.model)
    for node in program.model.graph:
        # Where in the source each node came from: several times the size of a small model's weights.
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    return program


def _name_types(graph: ir.Graph) -> None:
    """Writes each CastLike as the Cast that it is, where the type is known: ONNX Runtime, which has no kernel for it,
    would warn of every constant that it cannot fold when it loads the file."""
    for node in [each for each in graph if each.op_type == "CastLike"]:
        value, like = node.inputs
        assert like is not None
        constant = ir.convenience.get_const_tensor(like)
        dtype = like.dtype or (constant.dtype if constant is not None else None)
        if dtype is not None:
            cast = ir.node("Cast", [value], {"to": dtype})
            ir.convenience.replace_nodes_and_values(graph, node, [node], [cast], node.outputs, cast.outputs)


def _refusal(error: BaseException | None) -> JointoptError | None:
    """Our own error among those that led to another."""
    while error is not None and not isinstance(error, JointoptError):
        error = error.__cause__ or error.__context__
    return error


def with_twins(model: nn.Module) -> nn.Module:
    """The model with an ONNX layer in place of each quantized one; tied ones share their codes."""
    shell = structural_clone(model)
    made: dict[int, OnnxLayer] = {}
    others: dict[int, OnnxLayer] = {}
    for path, layer in list(shell.named_modules()):
        if not isinstance(layer, QuantizedLayer):
            continue
        kind = next(twin for stock, twin in TWINS.items() if isinstance(layer, stock))
        weight = id(layer._parameters["weight"])
        holder, _, name = path.rpartition(".")
        twin = kind(layer, made.get(weight))
        made.setdefault(weight, twin)
        shell.get_submodule(holder)._modules[name] = others[id(layer)] = twin
    exchange(shell.modules(), others)
    return shell


def _graph(model: Any, processor: Any) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """The module that is traced, an example of its inputs, and the names of these in the file."""
    if not hasattr(model, "config"):
        first: Any = next(m for m in model.modules() if isinstance(m, nn.Conv2d | OnnxConv2d))
        pixels = torch.zeros(2, first.in_channels, *_traced_size(model), dtype=torch.float32)
        return ImageGraph(model), {"pixels": pixels}, ["x"]
    if hasattr(model.config, "image_size") or model.main_input_name == "pixel_values":
        pixels = torch.zeros(2, model.config.num_channels, *_traced_size(model), dtype=torch.float32)
        return ImageGraph(model), {"pixels": pixels}, ["pixel_values"]
    ids = torch.ones(2, 3, dtype=torch.long)
    caches = cache_shapes(model)
    if caches and model.can_generate():
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones(2, 8, dtype=torch.long),
            "position_ids": torch.arange(5, 8).expand(2, 3),
            "past_key_values": [
                [torch.zeros(2, heads, 5, size, dtype=torch.float32) for _ in range(2)] for heads, size in caches
            ],
        }
        past = [f"past_key_values.{at}.{part}" for at in range(len(caches)) for part in ("key", "value")]
        return DecoderGraph(model), inputs, [*list(inputs)[:3], *past]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if _takes_types(model, processor):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return TextGraph(model), inputs, list(inputs)


def _takes_types(model: Any, processor: Any) -> bool:
    """Whether token_type_ids are an input. ONNX Runtime demands each there is, and RoBERTa's tokenizer makes none of
    these; without a tokenizer, they are where there are several types."""
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return False
    made = getattr(processor, "model_input_names", None)
    return getattr(model.config, "type_vocab_size", 1) > 1 if made is None else "token_type_ids" in made


def _image_size(model: Any) -> tuple[int, ...] | None:
    """Height and width of the images that a model takes; None for any."""
    if hasattr(model, "patch_embed"):
        return None if model.dynamic_img_size else tuple(model.patch_embed.img_size)
    size = getattr(getattr(model, "config", None), "image_size", None)
    return (size, size) if isinstance(size, int) else size and tuple(size)


def check_images(model: Any, example: Mapping[str, Any]) -> None:
    """Raises JointoptError for images of another size than the one that the graph takes, as a model sees them that
    interpolates its position embeddings."""
    images, size = example.get(getattr(model, "main_input_name", "x")), _image_size(model)
    if size is None or not isinstance(images, Tensor) or images.dim() != 4 or images.shape[2:] == size:
        return
    found, taken = (" x ".join(map(str, each)) for each in (images.shape[2:], size))
    raise JointoptError(
        f"target onnxruntime: the images of the calibration are {found}, and the graph takes the {taken} of the "
        "model's config; allowed: images of that size, or target transformers"
    )


def _traced_size(model: Any) -> tuple[int, ...]:
    patch = model.patch_embed.patch_size if hasattr(model, "patch_embed") else (16, 16)
    return _image_size(model) or tuple(count * side for count, side in zip(FREE_PATCHES, patch, strict=True))


def cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(KV heads, head size) of each attention layer that has a cache, in order."""
    found = []
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "layer_idx") and hasattr(module, "k_proj"):
            found.append((module.k_proj.out_features // module.head_dim, module.head_dim))
    return found


def _dynamic_shapes(inputs: dict[str, Any], any_size: bool) -> dict[str, Any]:
    batch = "batch"
    known = {
        "pixels": {0: batch, 2: "height", 3: "width"} if any_size else {0: batch},
        "input_ids": {0: batch, 1: "sequence"},
        "token_type_ids": {0: batch, 1: "sequence"},
        "position_ids": {0: batch, 1: "sequence"},
        "attention_mask": {0: batch, 1: "total" if "past_key_values" in inputs else "sequence"},
    }
    shapes: dict[str, Any] = {name: known[name] for name in inputs if name in known}
    if "past_key_values" in inputs:
        pasts: Sequence[Any] = inputs["past_key_values"]
        shapes["past_key_values"] = [[{0: batch, 2: "past"}, {0: batch, 2: "past"}] for _ in pasts]
    return shapes
