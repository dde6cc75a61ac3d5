"""How an extracted model differs from what its library builds from its config: what a reload has to be told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from jointopt.rebuilding.runtime import COLUMN_COUNTS, ROW_COUNTS
from jointopt.targets import TARGETS, check_schemes
from quant.errors import JointoptError, said_of
from quant.formats import Element, Format, dtype_name
from quant.layers import QuantizedLayer
from quant.packing import layout, packed_tensors
from quant.reference import LLM_INT8_OUTLIER
from search_spaces.family import within
from search_spaces.stand_ins import STAND_INS, SplitQKV

_SET_BY_SIZE = (*ROW_COUNTS, *COLUMN_COUNTS, "normalized_shape")
_WITHOUT_EFFECT = ("training", "gradient_checkpointing", "grad_checkpointing", "p", "drop_prob")
"""Settings that no evaluated output depends on: those of training."""
_IN_TRAINING = ("DropPath", "DropBlock2d", "PatchDropout")
"""timm's modules that change nothing otherwise; its recipes leave out the rates that they are made by."""


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Path -> layer, of all that hold codes; a tied head comes after the embedding it takes them from."""
    return {path: module for path, module in _embeddings_first(model) if isinstance(module, QuantizedLayer)}


def _embeddings_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules by path; some models have a head before the embedding whose weight it shares."""
    return sorted(model.named_modules(), key=lambda each: not isinstance(each[1], nn.Embedding))


def by_compressed_tensors(model: nn.Module) -> bool:
    """Whether compressed-tensors can store and reload every quantized layer exactly as it computes here: of models of
    transformers, which calls it.

    It takes Linear layers that are not tied; it cannot scale each row of an input of rows alone (`flat_inputs_noted`).
    Its fp4 weights unpack to bfloat16, so a float32 model cannot have them; packed zero points of weights do not load
    in transformers 5.23 (they meet a parameter of unpacked shape).
    """
    if not hasattr(model, "config"):
        return False
    layers = quantized_layers(model)
    tied = _tied(model)
    for path, module in layers.items():
        scheme, weights = module.scheme, module.quantized.format
        if not isinstance(module, nn.Linear) or path in tied or path in tied.values() or scheme.compressed is None:
            return False
        if not weights.symmetric:
            return False
        by_row = scheme.activations is not None and scheme.activations.granularity == "token"
        if by_row and "flat_input" in module.__dict__:
            return False
        if weights.element == "fp4_e2m1" and module.weight.dtype != torch.bfloat16:
            return False
    return True


@contextmanager
def flat_inputs_noted(model: nn.Module) -> Iterator[None]:
    """Notes at each quantized layer whether the model, run meanwhile, gives it rows alone: [rows, inputs].

    compressed-tensors has one scale for all rows of such an input where each is to have its own.
    """

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        value = next(iter((*given, *named.values())), None)
        if isinstance(value, torch.Tensor) and value.dim() < 3:
            module.__dict__["flat_input"] = True

    with ExitStack() as hooks:
        for layer in quantized_layers(model).values():
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        yield


def check_language_model(model: Any, target: str, kinds: Sequence[str]) -> None:
    """Raises JointoptError for what is no language model of these kinds with a cache as it was."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in kinds or not hasattr(model, "lm_head"):
        raise JointoptError(f"target {target}: found a {kind}; allowed: language models of {', '.join(kinds)}")
    if any("cache_record" in module.__dict__ for module in model.modules()):
        raise JointoptError(f"target {target}: found a quantized cache; allowed: none (it has its own)")


def check_formats(model: nn.Module, target: str) -> None:
    """Raises JointoptError for a layer in a number format that the target does not compute, with its name."""
    for path, layer in quantized_layers(model).items():
        with said_of(f"export: {path}"):
            check_schemes(TARGETS[target], [layer.scheme.name])


def by_bitsandbytes(model: nn.Module) -> str | None:
    """The name of the one bitsandbytes format that all quantized layers are in, None where none is.

    Raises:
        JointoptError: beside such a layer there is one in another format, or a cache of inputs.
    """
    found = {path: layer.scheme for path, layer in quantized_layers(model).items()}
    first = next((path for path, scheme in found.items() if scheme.bitsandbytes), None)
    if first is None:
        return None
    wanted = found[first]
    for path, scheme in found.items():
        if scheme != wanted:
            raise JointoptError(
                f"export: {path} is {scheme.name} and {first} {wanted.name}, which is for the whole model; "
                f"allowed beside it: none"
            )
    for path, module in model.named_modules():
        if module.__dict__.get("cache_record", {}).get("inputs"):
            raise JointoptError(
                f"export: {path} caches its input, and bitsandbytes replaces the layers that would hold it; "
                "allowed beside bitsandbytes: caches of keys and values"
            )
    return wanted.bitsandbytes


def bitsandbytes_config(model: nn.Module, kind: str) -> dict[str, Any]:
    """The `quantization_config` by which transformers loads the layers into bitsandbytes' own."""
    from transformers import BitsAndBytesConfig

    layers = quantized_layers(model)
    plain = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in layers]
    if kind == "llm_int8":
        options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": LLM_INT8_OUTLIER}
    else:
        dtype = next(model.parameters()).dtype
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype}
    # transformers skips whatever ends with a name in this list, but for patterns of the whole path.
    skipped, rest = _with_or_without_prefix(model, plain)
    skipped += [f"^{re.escape(path)}$" if any(each.endswith(path) for each in layers) else path for path in rest]
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped).to_dict()


def _tied(model: nn.Module) -> dict[str, str]:
    """Path of a layer -> path of the earlier one whose weight it shares."""
    first: dict[int, str] = {}
    tied = {}
    for path, module in _embeddings_first(model):
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if id(weight) in first:
            tied[path] = first[id(weight)]
        else:
            first[id(weight)] = path
    return tied


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the checkpoint holds: every tensor once, quantized weights as their packed codes and scales.

    Where the folder's own file reloads them, unpacked codes are called `weight_codes`: a layer's `weight` stays what
    code around it takes it for, a tensor of floating point.
    """
    layers, tied = quantized_layers(model), _tied(model)
    by_library = by_bitsandbytes(model) or by_compressed_tensors(model)
    renamed = {} if by_library else {"weight": "weight_codes"}
    found: dict[str, torch.Tensor] = {}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again -= {name for name, _ in model.named_parameters()} | {f"{path}.weight" for path in tied.values()}
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if name in again or (last == "weight" and (path in layers or path in tied)):
            continue
        found[name] = tensor.detach().cpu().contiguous()
    for path, layer in layers.items():
        constants = {} if isinstance(layer, nn.Embedding) else layer.constants()
        packed = packed_tensors(layer.quantized, layer.scheme, constants, layer.weight.dtype)
        if path in tied:
            packed = {name: tensor for name, tensor in packed.items() if name.startswith("input_")}
        found.update({f"{path}.{renamed.get(name, name)}": tensor for name, tensor in packed.items()})
    return found


def rebuild_spec(model: nn.Module, built: nn.Module, pack: bool) -> dict[str, Any]:
    """What turns `built` into the layout of `model`; empty where nothing does. See `runtime.rebuild`.

    Args:
        built: what the library makes of the model's config, on any device.
        pack: whether quantized layers are part of it (else compressed-tensors brings them).
    """
    spec: dict[str, dict[str, Any]] = {"replaced": {}, "shapes": {}, "attributes": {}, "quantized": {}, "tied": {}}
    there = dict(built.named_modules())
    for path, module in model.named_modules():
        kind = type(module).__name__
        plain = kind.removeprefix("Quantized") if isinstance(module, QuantizedLayer) else kind
        if path not in there or type(there[path]).__name__ != plain:
            if plain in _IN_TRAINING and isinstance(there.get(path), nn.Identity | None):
                continue  # which it is otherwise
            if plain not in STAND_INS and not any(within(path, done) for done in spec["replaced"]):
                raise JointoptError(
                    f"export: {path or 'the model'} is a {kind}; the library builds {there.get(path)!s:.60}"
                )
            if plain in STAND_INS:
                spec["replaced"][path] = plain
                there.update(
                    {f"{path}.{name}": each for name, each in _made(module, there.get(path)).named_modules() if name}
                )
            continue
        _compare(path, module, there[path], spec)
    _left_out(model, there, spec)
    if pack:
        _add_quantized(model, spec)
    spec["caches"] = _caches(model)
    return {key: value for key, value in spec.items() if value}


def _caches(model: nn.Module) -> dict[str, Any]:
    """Path of each attention layer whose cache is quantized -> how, and the constants of its keys."""
    found = {}
    for path, module in model.named_modules():
        if "cache_record" in module.__dict__ and "k_proj" in module._modules:
            tensors = {name: each for name, each in module._buffers.items() if name.startswith("key_")}
            found[path] = {**module.__dict__["cache_record"], "tensors": _kinds(tensors)}
    return found


def _kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Name -> type and shape of what a reload makes room for."""
    return {name: [dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}


def _made(module: nn.Module, replaced: nn.Module | None) -> nn.Module:
    """The stand-in as `runtime.rebuild` makes it, before it is resized."""
    if type(module).__name__ != "SplitQKV" or not isinstance(replaced, nn.Linear):
        return nn.Module()
    return SplitQKV(replaced)


def _compare(path: str, module: nn.Module, built: nn.Module, spec: dict[str, dict[str, Any]]) -> None:
    """Notes what a reload has to set on the module that the library builds: shapes, settings, tensors that are not."""
    shapes: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for name in [*module._parameters, *module._buffers]:
        tensor, other = getattr(module, name), getattr(built, name, None)
        if tensor is None and other is not None:
            attributes[name] = None
        elif tensor is not None and other is not None and tensor.shape != other.shape:
            sides = zip(tensor.shape, other.shape, strict=True)
            shapes[name] = [None if size == usual else size for size, usual in sides]
        elif tensor is not None and other is None and name in _stored(module):
            raise JointoptError(
                f"export: {path or 'the model'} has a {name}; the {type(module).__name__} that the library builds from "
                "the model's settings has none, and would not load it"
            )
    for name, value in vars(module).items():
        if name.startswith("_") or name in _WITHOUT_EFFECT or name not in vars(built):
            continue
        if shapes and name in _SET_BY_SIZE:
            continue
        if _is_setting(value) and vars(built)[name] != value:
            attributes[name] = value
    if shapes:
        spec["shapes"][path] = shapes
    if attributes:
        spec["attributes"][path] = attributes


def _stored(module: nn.Module) -> set[str]:
    """Names of the module's own tensors that a checkpoint holds, the constants of a quantized cache aside."""
    cache = "cache_record" in module.__dict__
    kept = {name for name in module._buffers if not (cache and name.startswith("key_"))}
    return {*module._parameters, *(kept - module._non_persistent_buffers_set)}


def _is_setting(value: object) -> bool:
    """Whether JSON holds it and `runtime.rebuild` sets it."""
    if isinstance(value, tuple):
        return all(isinstance(each, bool | int | float | str | None) for each in value)
    return isinstance(value, bool | int | float | str | None)


def _left_out(model: nn.Module, there: Mapping[str, nn.Module], spec: dict[str, dict[str, Any]]) -> None:
    """Notes modules that are None in the model and that the library builds (a pooling layer).

    Raises:
        JointoptError: the model lacks one altogether.
    """
    ours = dict(model.named_modules())
    for path in there:
        holder, _, name = path.rpartition(".")
        if path in ours or holder not in ours or holder in spec["replaced"]:
            continue
        if getattr(ours[holder], name, there[path]) is not None:
            raise JointoptError(f"export: the library builds {path}, {there[path]!s:.60}; the model has none")
        spec["replaced"][path] = "None"


def _add_quantized(model: nn.Module, spec: dict[str, dict[str, Any]]) -> None:
    tensors, tied = tensors_of(model), _tied(model)
    for path, layer in quantized_layers(model).items():
        own = {name[len(path) + 1 :]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == path}
        spec["quantized"][path] = {
            "shape": list(layer.quantized.shape),
            "weights": {**(format_record(layer.scheme.weights) or {}), "layout": layout(layer.scheme)},
            "activations": None if isinstance(layer, nn.Embedding) else format_record(layer.scheme.activations),
            "scheme": layer.scheme.name,
            "tensors": _kinds({name: tensor for name, tensor in own.items() if name != "bias"}),
        }
        if path in tied:
            spec["tied"][path] = tied[path]


def format_record(format: Format | None) -> dict[str, Any] | None:
    """What `runtime` reads of a format, as JSON can hold it."""
    if format is None:
        return None
    names = ("element", "granularity", "group_size", "symmetric", "scale", "dynamic", "bits")
    kind = format.kind
    return {**{name: getattr(format, name) for name in names}, "range": [kind.min, kind.max], "grid": _grid(kind)}


def _grid(kind: Element) -> str | list[float]:
    """What `runtime.nearest` rounds to, which has no list of elements: one of these steps that it knows, or values."""
    if kind.values is not None:
        return list(kind.values)
    return {None: "int8", 3: "fp8_e4m3", 2: "fp8_e5m2", 1: "fp4_e2m1"}[kind.mantissa]


def _with_or_without_prefix(model: Any, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """(patterns, paths): one pattern, if any, of the layers that the model's base has too; the others as they are.

    AutoModel builds the base alone, where paths lack a prefix (`encoder.layer.0`, not `bert.encoder.layer.0`); a class
    with a head that is given a base's folder puts it before them.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return [], list(paths)
    start, alone = f"{prefix}.", model.base_model is model
    shared = [path for path in paths if alone or path.startswith(start)]
    names = "|".join(re.escape(path.removeprefix(start)) for path in shared)
    patterns = [f"^({re.escape(start)})?({names})$"] if shared else []
    return patterns, [path for path in paths if path not in shared]


def compressed_config(model: nn.Module, names: bool) -> dict[str, Any]:
    """The `quantization_config` by which transformers, and others who know compressed-tensors, load the layers.

    Args:
        names: whether each quantized layer is listed by its name, which any reader takes; AutoModel, which calls them
            otherwise, then does not find them.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    groups: dict[str, list[str]] = {}
    schemes = {}
    layers = quantized_layers(model)
    for path, layer in layers.items():
        groups.setdefault(layer.scheme.name, []).append(path)
        schemes[layer.scheme.name] = layer.scheme
    config_groups = {}
    for at, (name, paths) in enumerate(groups.items()):
        scheme = schemes[name]
        patterns, rest = ([], paths) if names else _with_or_without_prefix(model, paths)
        config_groups[f"group_{at}"] = QuantizationScheme(
            targets=[*(f"re:{pattern}" for pattern in patterns), *rest],
            weights=_arguments(scheme.weights, False),
            input_activations=_arguments(scheme.activations, True),
            format=scheme.compressed,
        )
    formats = {scheme.compressed for scheme in schemes.values()}
    plain = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in layers]
    config = QuantizationConfig(
        config_groups=config_groups,
        quant_method="compressed-tensors",
        quantization_status="compressed",
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        ignore=plain,
    )
    return config.to_dict()


def _arguments(format: Format | None, activations: bool) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    if format is None:
        return None
    kind = format.kind
    options: dict[str, Any] = {"dynamic": format.dynamic}
    if format.scale == "e4m3":
        options = {"dynamic": "local" if activations else False, "scale_dtype": torch.float8_e4m3fn}
        options["zp_dtype"] = torch.float8_e4m3fn
    elif format.scale == "e8m0":
        options.update(scale_dtype=torch.uint8, zp_dtype=torch.uint8)
    strategy = "tensor_group" if format.scale == "e4m3" else format.granularity
    return QuantizationArgs(
        num_bits=kind.bits,
        type="float" if kind.is_float else "int",
        strategy=strategy,
        group_size=format.group_size,
        symmetric=format.symmetric,
        **options,
    )


def on_meta(make: Any, *arguments: Any, **options: Any) -> nn.Module:
    """A model without storage."""
    with torch.device("meta"):
        return make(*arguments, **options)
