"""Changes of a super-network's weights that leave its function as it is and make it easier to quantize.

They are made once on the whole, before anything is sliced or quantized, so that every sub-network, its extraction and
its export have them without knowing. What may be scaled or rotated is declared by the family (`Link`, `Stream`).

- `rotate` turns the residual stream by one orthogonal matrix, so that no channel holds what others do not (QuaRot,
  arXiv 2404.00456; R1 of SpinQuant, 2405.16406). Normalizations' weights and biases go into the layers that read them.
- `rotate_heads` turns the channels of each head between value and output projection (R2).
- `smooth` moves the range of activations into weights (SmoothQuant, arXiv 2211.10438), `awq` the importance of
  channels (AWQ, 2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.supernet.importance import CalibrationPass
from quant.errors import JointoptError, check_choice
from quant.formats import Format, Scheme
from quant.rotations import mean_keeping_rotation, rotation
from quant.smoothing import awq_scale, smooth_scale
from search_spaces.family import Family, Link

TRANSFORMS = ("rotate", "rotate_heads", "smooth", "awq")
TOKENS = 256
"""Inputs of each layer that AWQ's search compares outputs on."""


def checked(transforms: Iterable[str], family: Family) -> tuple[str, ...]:
    """The transforms in the order in which they are made.

    Raises:
        JointoptError: an unknown name, both scalings, or one that the family does not allow, with the reason.
    """
    asked = tuple(transforms)
    for name in asked:
        check_choice("transforms", name, TRANSFORMS)
    if {"smooth", "awq"} <= set(asked):
        raise JointoptError("transforms: smooth and awq both choose the scales of the same channels; allowed: one")
    allowed = possible(family)
    for name in asked:
        if name not in allowed:
            raise JointoptError(
                f"transforms: {name}: this {family.name} model has {_LACKING[name]}; "
                f"allowed here: {', '.join(allowed) or 'none'}"
            )
    return tuple(name for name in TRANSFORMS if name in asked)


_LACKING = {
    "rotate": "no residual stream that normalizations alone read, up to a last layer of its own",
    "rotate_heads": "no heads declared between value and output projection",
    "smooth": "no links between layers that a scale could move along",
    "awq": "no links between layers that a scale could move along",
}


def possible(family: Family) -> tuple[str, ...]:
    """The transforms that a family's declaration allows."""
    heads = any(link.head_dim for link in family.links)
    there = {"rotate": family.stream is not None, "rotate_heads": heads}
    return tuple(name for name in TRANSFORMS if there.get(name, bool(family.links)))


def rotated(
    model: nn.Module,
    family: Family,
    transforms: Sequence[str],
    declared: Callable[[nn.Module], tuple[nn.Module, Family]],
) -> tuple[nn.Module, Family]:
    """The model and its declaration after the rotations among `transforms`, the model's weights changed in place.

    A head that was tied is declared anew as a layer of its own, which keeps to the embedding's number format.

    Args:
        declared: gives a model's declaration, as `search_spaces.families.declare` does.
    """
    if "rotate" in transforms:
        assert family.stream is not None
        if family.stream.untie is not None:
            owner = {path: layer.projection for layer in family.layers for path in layer.tied}
            family.stream.untie(model)
            model, family = declared(model)
            layers = (replace(layer, projection=owner.get(layer.path, layer.projection)) for layer in family.layers)
            family = replace(family, layers=tuple(layers))
        rotate_stream(model, family)
    if "rotate_heads" in transforms:
        rotate_heads(model, family)
    return model, family


@torch.no_grad()
def rotate_stream(model: nn.Module, family: Family) -> None:
    """x -> x Q for everything that is written to the residual stream, W -> W Q for what reads it.

    RMSNorm commutes with Q once its weight is in its readers (QuaRot, section 3); LayerNorm where Q keeps the mean.

    Raises:
        JointoptError: a LayerNorm has a bias, and a layer behind it none to take it.
    """
    stream = family.stream
    assert stream is not None
    norms = [model.get_submodule(link.producer) for link in stream.readers]
    centered = any(isinstance(norm, nn.LayerNorm) for norm in norms)
    size = norms[0].get_parameter("weight").numel()
    turn = (mean_keeping_rotation if centered else rotation)(size)
    for link in stream.readers:
        _fold_norm(model, link)
        for path in link.consumers:
            _change(model.get_submodule(path).weight, lambda weight: weight @ _like(turn, weight))
    for path in stream.writers:
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            _change(module.weight, lambda weight: weight @ _like(turn, weight))
            continue
        _change(module.weight, lambda weight: (_like(turn, weight).T @ weight.flatten(1)).reshape(weight.shape))
        if module.bias is not None:
            _change(module.bias, lambda bias: bias @ _like(turn, bias))
    for path in stream.constants:
        _change(model.get_parameter(path), lambda constant: constant @ _like(turn, constant))


def _fold_norm(model: nn.Module, link: Link) -> None:
    """A normalization's weight and bias into the layers that read it: it has weight 1 and bias 0 then."""
    norm: Any = model.get_submodule(link.producer)
    weight, bias = norm.weight.detach().double(), getattr(norm, "bias", None)
    for path in link.consumers:
        layer: Any = model.get_submodule(path)
        if bias is not None and not bias.is_meta and bool(bias.any()):
            if layer.bias is None:
                raise JointoptError(f"transforms: rotate: {path} has no bias to take that of {link.producer}")
            layer.bias.add_((layer.weight.double() @ bias.double()).to(layer.bias))
        _change(layer.weight, lambda own: own * weight.to(own))
    norm.weight.fill_(1)
    if bias is not None:
        bias.zero_()


@torch.no_grad()
def rotate_heads(model: nn.Module, family: Family) -> None:
    """Each head's values by one orthogonal matrix, and back where the output projection reads them."""
    for link in family.links:
        if link.head_dim is None:
            continue
        size, turn = link.head_dim, rotation(link.head_dim)
        producer: Any = model.get_submodule(link.producer)

        def by_row(tensor: Tensor, size: int = size, turn: Tensor = turn) -> Tensor:
            heads = tensor.reshape(-1, size, *tensor.shape[1:])
            return torch.einsum("hd...,de->he...", heads, _like(turn, heads)).reshape(tensor.shape)

        def by_column(tensor: Tensor, size: int = size, turn: Tensor = turn) -> Tensor:
            return (tensor.unflatten(1, (-1, size)) @ _like(turn, tensor)).flatten(1)

        for tensor in (producer.weight, producer.bias):
            if tensor is not None:
                _change(tensor, by_row)
        for path in link.consumers:
            _change(model.get_submodule(path).weight, by_column)


def _change(tensor: Any, function: Callable[[Tensor], Tensor]) -> None:
    """In place, computed in float64 and rounded once."""
    tensor.copy_(function(tensor.detach().double()).to(tensor.dtype))


def _like(turn: Tensor, tensor: Tensor) -> Tensor:
    return turn.to(tensor.device, tensor.dtype)


@torch.no_grad()
def scale_link(model: nn.Module, link: Link, scale: Tensor) -> None:
    """What the producer makes is divided by `scale` [channels, positive], what reads it is multiplied with it."""
    producer: Any = model.get_submodule(link.producer)
    for tensor in (producer.weight, producer.bias if hasattr(producer, "bias") else None):
        if tensor is not None:
            _change(tensor, lambda own: own / scale.to(own).reshape(-1, *[1] * (own.dim() - 1)))
    read = scale[link.read(len(scale)).to(scale.device)]
    for path in link.consumers:
        weight = model.get_submodule(path).weight
        _change(weight, lambda own: own * read.to(own).reshape(-1, *[1] * (own.dim() - 2)))


@torch.no_grad()
def scale_links(
    model: nn.Module,
    family: Family,
    method: str,
    batches: Iterable[Mapping[str, Any]],
    schemes: Mapping[tuple[str, str], Scheme],
) -> None:
    """One pass over the data, then the scales of every link by "smooth" or "awq".

    Links whose readers share their weight with another layer (a tied head) are left as they are.

    Args:
        schemes: (layer path, choice) -> scheme; AWQ's search rounds a layer to the format of fewest bits among its own,
            and does not scale layers without one.

    Raises:
        JointoptError: there is no batch, or what a layer reads is not finite.
    """
    tied = {path for layer in family.layers if layer.tied for path in layer.paths}
    links = [link for link in family.links if not tied & set(link.consumers)]
    formats: dict[str, Format] = {}
    for (path, _), scheme in sorted(schemes.items(), key=lambda item: item[1].bits):
        if scheme.weights is not None:
            formats.setdefault(path, scheme.weights)
    if method == "awq":
        links = [link for link in links if set(link.consumers) <= set(formats)]
    observers = {link.consumers[0]: ChannelObserver() for link in links}
    listeners = [(path, observer.observe) for path, observer in observers.items()]
    if not CalibrationPass(model, family, listeners).run(batches):
        raise JointoptError("calibrate: found no batch; allowed: one or more dicts of the model's inputs")
    for path, seen in observers.items():
        if seen.count and not seen.largest.isfinite().all():
            raise JointoptError(f"{path}: calibration saw inputs that are not finite")
    for link in links:
        seen = observers[link.consumers[0]]
        readers = [model.get_submodule(path).get_parameter("weight").detach() for path in link.consumers]
        read = link.read(readers[0].shape[1] // link.repeats).to(readers[0].device)
        if not seen.count:
            continue
        if method == "smooth":
            columns = torch.stack([w.transpose(0, 1).flatten(1).abs().amax(1) for w in readers]).amax(0)
            scale = smooth_scale(_by_channel(seen.largest, read), _by_channel(columns, read))
        else:
            magnitudes = _by_channel(seen.total / seen.count, read, "mean")
            inputs = torch.cat(seen.kept)
            known = [(weight, inputs, formats[path]) for weight, path in zip(readers, link.consumers, strict=True)]
            scale = awq_scale(magnitudes, read, known)
        scale_link(model, link, scale)


def _by_channel(columns: Tensor, read: Tensor, reduce: str = "amax") -> Tensor:
    """From the input columns of a consumer to the channels that they read."""
    channels = columns.new_zeros(int(read.max()) + 1)
    return channels.scatter_reduce(0, read, columns, reduce, include_self=False)


class ChannelObserver:
    """Largest and mean magnitude of each channel of a layer's input, and some of the inputs themselves."""

    def __init__(self) -> None:
        self.count = 0
        self.largest = self.total = torch.zeros((), dtype=torch.float32)
        self.kept: list[Tensor] = []

    def observe(self, hidden: Tensor) -> None:
        """Takes in a layer's inputs: [rows, channels], of a convolution [N, C, H, W]."""
        flat = hidden.permute(0, 2, 3, 1).flatten(0, 2) if hidden.dim() == 4 else hidden
        flat = flat.detach().float()
        if not len(flat):
            return
        magnitudes = flat.abs()
        self.largest = torch.maximum(self.largest.to(flat.device), magnitudes.amax(0))
        self.total = self.total.to(flat.device) + magnitudes.sum(0)
        self.count += len(flat)
        room = TOKENS - sum(len(each) for each in self.kept)
        if room > 0:
            step = max(1, len(flat) // min(room, TOKENS // 4))
            self.kept.append(flat[::step][:room].clone())


def reread(batches: Iterable[Any], transforms: Sequence[str]) -> None:
    """Raises JointoptError for batches that can be read once, where scales need a pass of their own."""
    if iter(batches) is batches:
        raise JointoptError(
            f"calibrate: {', '.join(transforms)} reads the batches twice; found a {type(batches).__name__}; "
            "allowed: a list"
        )
