"""Rebuilds a searched sub-network and its quantized layers. Needs torch alone."""

import math

import torch
from torch import nn

from search_spaces.stand_ins import STAND_INS

FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
RANGES = {
    "int8": (-128, 127),
    "int4": (-8, 7),
    "fp8_e4m3": (-448, 448),
    "fp8_e5m2": (-57344, 57344),
    "fp4_e2m1": (-6, 6),
}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ROW_COUNTS = ("out_features", "out_channels", "num_features", "embedding_dim")
COLUMN_COUNTS = ("in_features", "in_channels")


def rebuild(model, spec):
    """Applies `spec`, the "jointopt" entry of config.json, to a freshly built model, in place.

    A model is first built by its library as usual; this then gives modules the sizes that `spec` lists, puts quantized
    layers where they belong, and leaves out what the search left out. Quantized weights stay packed in the file and are
    unpacked when a layer first runs. A layer with other rows than the file has, since other labels were asked for,
    stays the library's, which is to tell that its weights are new.
    """
    for path, kind in spec.get("replaced", {}).items():
        replace(model, path, None if kind == "None" else STAND_INS[kind](model.get_submodule(path)))
    for path, shapes in spec.get("shapes", {}).items():
        resize(model.get_submodule(path), shapes)
    for path, values in spec.get("attributes", {}).items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, tuple(value) if isinstance(value, list) else value)
    for path, record in spec.get("quantized", {}).items():
        layer = model.get_submodule(path)
        if len(layer.weight) == record["shape"][0]:
            replace(model, path, Quantized(layer, record))
    for path, source in spec.get("tied", {}).items():
        layer = model.get_submodule(path)
        if isinstance(layer, Quantized):
            layer.tie(model.get_submodule(source))
    return model


def spec_within(spec, path):
    """The part of `spec` for a module of the model that is built alone, with the paths in that module."""
    start = f"{path}."
    found = {
        entry: {name[len(start) :]: value for name, value in listed.items() if f"{name}.".startswith(start)}
        for entry, listed in spec.items()
    }
    if "tied" in found:
        found["tied"] = {name: source[len(start) :] for name, source in found["tied"].items()}
    return found


def replace(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def resize(module, shapes):
    """New, empty tensors of the listed shapes, None where a side stays; the counts that the module keeps follow."""
    for name, sides in shapes.items():
        old = getattr(module, name)
        sizes = [size if side is None else side for side, size in zip(sides, old.shape, strict=True)]
        new = torch.empty(sizes, dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new))
        else:
            module._buffers[name] = new
    weight = getattr(module, "weight", None)
    shape = new.shape if weight is None else weight.shape
    rows, columns = shape[0], shape[1] if len(shape) > 1 else None
    if isinstance(module, nn.Embedding):
        rows, columns = columns, None
    for name in ROW_COUNTS:
        if hasattr(module, name):
            setattr(module, name, rows)
    for name in COLUMN_COUNTS:
        if hasattr(module, name) and columns is not None:
            setattr(module, name, columns)
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (rows,)


class Quantized(nn.Module):
    """A linear layer, convolution or embedding with a packed weight, and with its input rounded to its format."""

    def __init__(self, layer, record):
        super().__init__()
        self.shape, self.weights, self.activations = record["shape"], record["weights"], record["activations"]
        for name, value in vars(layer).items():  # which code around a layer may read: stride, in_features
            if isinstance(value, (int, tuple, str)) and not name.startswith("_"):
                setattr(self, name, value)
        self.kind, self.options, self.around = type(layer).__name__, {}, None
        if isinstance(layer, nn.Conv2d):
            self.options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            if layer.padding_mode != "zeros":
                self.around = list(layer._reversed_padding_repeated_twice), layer.padding_mode
                self.options["padding"] = 0
        if isinstance(layer, nn.Embedding):
            self.options = {"padding_idx": layer.padding_idx}
        for name, (dtype, shape) in record["tensors"].items():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device=layer.weight.device))
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))
        self.dtype = layer.weight.dtype
        self._source, self._values = [], None

    def tie(self, source):
        """Takes the packed weight of another layer (an embedding's, for the head)."""
        self._source = [source]

    @property
    def weight(self):
        if self._source:
            return self._source[0].weight
        if self._values is None or self._values.device != self.weight_scale.device:
            with torch.inference_mode(False), torch.no_grad():  # so that it can be trained around afterwards
                self._values = unpack(self).to(self.dtype)
        return self._values

    def _apply(self, fn, recurse=True):
        """Codes and scales keep their types where the model is put into another one: what they stand for takes it."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._values = None
        return self

    def _load_from_state_dict(self, *args, **options):
        self._values = None
        super()._load_from_state_dict(*args, **options)

    def forward(self, x):
        if self.kind == "Embedding":
            return nn.functional.embedding(x, self.weight, **self.options)
        if self.activations is not None:
            constants = (getattr(self, f"input_{name}", None) for name in ("scale", "zero_point", "global_scale"))
            tokens = x.flatten(0, 2) if x.dim() == 4 and self.kind == "Linear" else x
            x = straight_through(x, hold(tokens.detach(), self.activations, *constants).reshape(x.shape))
        if self.around is not None:
            pads, mode = self.around
            x = nn.functional.pad(x, pads, mode=mode)
        run = nn.functional.conv2d if self.kind == "Conv2d" else nn.functional.linear
        return run(x, self.weight, self.bias, **self.options)


class StraightThrough(torch.autograd.Function):
    """The identity's gradient for a step function (Bengio, Leonard and Courville, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, x, held):
        return held.view_as(held)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def straight_through(x, held):
    """`held`, with the gradient of the identity where x takes part in one: so the model can be trained further."""
    return StraightThrough.apply(x, held) if x.requires_grad and torch.is_grad_enabled() else held


def unpack(layer):
    """The weight's values, float32, in its shape."""
    form, (rows, *rest) = layer.weights, layer.shape
    columns = 1
    for size in rest:
        columns *= size
    if form["layout"] == "words":
        values = words(layer.weight_packed, form["bits"])[:, :columns]
    elif form["layout"] == "nibbles":
        held = form["grid"] if isinstance(form["grid"], list) else [*FP4, *(-value for value in FP4)]
        table = torch.tensor(held, dtype=torch.float32, device=layer.weight_packed.device)
        halves = torch.stack((layer.weight_packed & 0xF, layer.weight_packed >> 4), -1)
        values = table[halves.flatten(1)[:, :columns].long()]
    else:
        values = layer.weight_codes.reshape(rows, columns).float()
    scale = layer.weight_scale
    scale = torch.exp2(scale.float() - 127) if form["scale"] == "e8m0" else scale.float()
    scale = scale / form["range"][1] if form["scale"] == "absmax" else scale
    if hasattr(layer, "weight_global_scale"):
        scale = scale / layer.weight_global_scale
    grouped = values.unflatten(1, (scale.shape[-1], -1)) if scale.dim() == 2 else values[:, None]
    if hasattr(layer, "weight_zero_point"):
        packed = form["layout"] == "words" and layer.weight_zero_point.dim() == 2
        zero_point = words(layer.weight_zero_point.T, form["bits"])[:, :rows].T if packed else layer.weight_zero_point
        grouped = grouped - zero_point[..., None]
    return (grouped * (scale[..., None] if scale.dim() == 2 else scale)).reshape(layer.shape)


def words(packed, bits):
    """Signed integers from int32 words, lowest bits first, float32."""
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    return (((packed.long()[..., None] >> shifts) & ((1 << bits) - 1)) - (1 << (bits - 1))).flatten(1).float()


def hold(x, form, scale=None, zero_point=None, global_scale=None):
    """x as the activation format holds it."""
    if form["granularity"] == "group":
        last = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        held = held_groups(last.unflatten(-1, (-1, form["group_size"])), form, scale, zero_point, global_scale)
        held = held.reshape(last.shape)
        return (held.permute(0, 3, 1, 2) if x.dim() == 4 else held).to(x.dtype)
    return held_groups(x, form, scale, zero_point, global_scale).to(x.dtype)


def held_groups(x, form, scale, zero_point, global_scale):
    low, high = form["range"]
    if form["dynamic"]:
        scale, zero_point = dynamic_scale(x, form, global_scale, low, high)
    scale = scale.to(x.dtype) if global_scale is None else scale / global_scale
    scaled = x / scale
    if zero_point is not None:
        scaled = scaled + zero_point.to(x.dtype)
    rounded = nearest(scaled.clamp(low, high), form["grid"]).to(scale.dtype)
    if zero_point is not None:
        rounded = rounded - zero_point.to(scale.dtype)
    return rounded * scale


def dynamic_scale(x, form, global_scale, low, high):
    dims = [1, 2, 3] if form["granularity"] == "token" and x.dim() == 4 else [-1]
    dims = list(range(x.dim())) if form["granularity"] == "tensor" else dims
    if not form["symmetric"]:
        least, most = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
        scale = divided(most - least, high - low)
        zero_point = (low - least / scale).clamp(low, high).nan_to_num(0.0).round()
        return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale).to(scale.dtype), zero_point
    largest = x.abs().amax(dims, keepdim=True)
    if form["scale"] == "e8m0":
        power = (largest.float().contiguous().view(torch.int32) + (1 << 21)) & 0x7F800000
        exponent_max = math.frexp(high)[1] - 1
        scale = torch.exp2(((power >> 23) - exponent_max).clamp(0, 254).float() - 127).to(x.dtype)
        return torch.where(scale == 0, 1, scale), None
    scale = divided(largest, (high - low) / 2)
    if global_scale is not None:
        scale = (global_scale * scale).clamp(max=448).to(torch.float8_e4m3fn).to(torch.float32)
        return torch.where(scale == 0, 0.125, scale), None
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale).to(scale.dtype), None


def divided(x, number):
    """By a number that is a tensor, in float32 at least: CUDA multiplies by the reciprocal of any other, which may move
    a scale by its last bit."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.full((), number, dtype=wide.dtype, device=x.device)).to(x.dtype)


def nearest(x, grid):
    """The nearest value of an element type, ties to even; or of a list, ties to the lower."""
    if isinstance(grid, list):
        values = torch.tensor(sorted(grid), dtype=torch.float32, device=x.device)
        return values[torch.bucketize(x.float().contiguous(), (values[:-1] + values[1:]) / 2)].to(x.dtype)
    if grid in FLOATS:
        return x.to(FLOATS[grid]).to(x.dtype)
    if grid != "fp4_e2m1":
        return x.round()
    size = x.abs()
    steps = torch.where(size < 2, (size * 2).round() / 2, torch.where(size < 4, size.round(), (size / 2).round() * 2))
    return steps.copysign(x)
