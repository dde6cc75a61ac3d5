"""Attention on a quantized cache. Needs torch alone; goes into the modelling file of what has such a cache.

An attention layer is handed a stand-in for its cache (or for none), which holds keys and values, or the layer's input,
in their format. A growing cache of transformers stores codes and scales; any other stores the values they stand for.
"""

import torch

from jointopt.rebuilding.runtime import FLOATS, FP4, RANGES, divided, nearest, straight_through


def hold_caches(model, records):
    """Has attention layers hold their caches as `records` says: path -> cache format; constants are loaded later."""
    for path, record in records.items():
        attention = model.get_submodule(path)
        for name, (dtype, shape) in record["tensors"].items():
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device=attention.k_proj.weight.device)
            attention.register_buffer(name, empty)
        hold_cache(attention, record)


def hold_cache(attention, record):
    """Has one attention layer hold its cache in a format: `element`, `inputs`, `group` (of cached inputs)."""
    attention.cache_record = record
    if record["inputs"]:
        for projection in (attention.k_proj, attention.v_proj):
            projection.cache_record = record
            projection.register_forward_pre_hook(held_input)
    else:
        attention.register_forward_pre_hook(held_keys_and_values, with_kwargs=True)


def held_input(projection, args):
    record = projection.cache_record
    groups = args[0].detach().unflatten(-1, (-1, record["group"]))
    held = unpacked(record["element"], *packed(groups, record["element"])).flatten(-2).to(args[0].dtype)
    return (straight_through(args[0], held),)


def held_keys_and_values(attention, args, kwargs):
    """Puts the stand-in where attention looks for its cache."""
    name = cache_name(kwargs)
    return args, {**kwargs, name: HeldCache(attention, kwargs.get(name))}


def cache_name(kwargs):
    """What the installed transformers calls the cache among an attention layer's arguments."""
    return "past_key_values" if "past_key_values" in kwargs else "cache"


class HeldCache:
    """An attention layer's view of a cache, through which its keys and values go."""

    def __init__(self, attention, inner):
        self.attention, self.inner = attention, inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def update(self, keys, values, layer_idx, *args, **kwargs):
        element, constants = self.attention.cache_record["element"], key_constants(self.attention)
        if self.inner is not None and store_codes(self.inner, layer_idx, element, constants):
            return self.inner.update(keys, values, layer_idx, *args, **kwargs)
        held_keys = held_last(keys, unpacked(element, *packed(keys.detach(), element, *constants)))
        held_values = held_last(values, unpacked(element, *packed(values.detach(), element)))
        if self.inner is None:
            return held_keys, held_values
        return self.inner.update(held_keys, held_values, layer_idx, *args, **kwargs)


def key_constants(attention):
    """Scale and zero point of each channel of the keys, [heads, 1, head_dim], float32."""
    zero_point = getattr(attention, "key_zero_point", None)
    zero_point = 0.0 if zero_point is None else zero_point.float()[:, None]
    return attention.key_scale.float()[:, None], zero_point


def store_codes(cache, layer_idx, element, constants):
    """Whether this layer of the cache stores codes: one that grows and is still empty is made to."""
    made = getattr(cache, "layer_class_to_replicate", None)
    while made is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(made())
    layer = cache.layers[layer_idx] if layer_idx < len(getattr(cache, "layers", ())) else None
    if isinstance(layer, CodesLayer):
        return True
    if layer is None or type(layer).__name__ != "DynamicLayer" or layer.is_initialized:
        return False
    cache.layers[layer_idx] = codes_layer(type(layer))
    cache.layers[layer_idx].hold(element, constants)
    return True


def codes_layer(kind):
    """An empty layer that stores codes in a cache of layers of a `kind`."""
    return type("DynamicCodesLayer", (CodesLayer, kind), {})()


class CodesLayer:
    """One layer of a growing cache, as bytes: `keys` [batch, heads, tokens, codes of a head], `values` the same, behind
    each head's codes its scale and zero point. What reorders, repeats or crops tokens works on these as on numbers."""

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool

    def __reduce__(self):
        return codes_layer, (type(self).__bases__[1],), self.__dict__

    def hold(self, element, constants):
        self.element, self.constants = element, constants

    def update(self, key_states, value_states, *args, **kwargs):
        scale, zero_point = self.constants
        keys, _, _ = packed(key_states.detach(), self.element, scale, zero_point)
        values = joined(*packed(value_states.detach(), self.element))
        if self.is_initialized:
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = keys, values
        held_keys = unpacked(self.element, keys, scale, zero_point)
        held_values = unpacked(self.element, *split(values, self.element))
        return held_last(key_states, held_keys), held_last(value_states, held_values)


def held_last(states, held):
    """`held` in the type of `states`, which are its last tokens and get their gradients."""
    held = held.to(states.dtype)
    if held.shape == states.shape or not states.requires_grad:
        return straight_through(states, held)
    past = held.shape[-2] - states.shape[-2]
    return torch.cat([held[..., :past, :], straight_through(states, held[..., past:, :])], dim=-2)


def packed(x, element, scale=None, zero_point=0.0):
    """Codes of the last dimension as bytes, 4-bit ones two in a byte; scale and zero point, float32, found for each
    vector of the last dimension where they are not given."""
    low, high = RANGES[element]
    x = x.float()
    if scale is None:
        scale, zero_point = vector_scale(x, element, low, high)
    scaled = nearest((x / scale + zero_point).clamp(low, high), element)
    if element in FLOATS:
        return scaled.to(FLOATS[element]).view(torch.uint8), scale, zero_point
    if element == "int8":
        return scaled.to(torch.int8).view(torch.uint8), scale, zero_point
    if element == "int4":
        codes = (scaled - low).to(torch.uint8)
    else:
        table = torch.tensor(FP4, dtype=torch.float32, device=x.device)
        sizes = torch.searchsorted(table, scaled.abs().contiguous()).to(torch.uint8)
        codes = sizes | (torch.signbit(scaled).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale, zero_point


def vector_scale(x, element, low, high):
    """bfloat16 values; integers have zero points."""
    tiny = torch.finfo(torch.bfloat16).eps
    if element in FLOATS or element == "fp4_e2m1":
        scale = divided(x.abs().amax(-1, keepdim=True), (high - low) / 2).bfloat16()
        return torch.where(scale == 0, tiny, scale).float(), 0.0
    least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = divided(most - least, high - low).bfloat16()
    scale = torch.where(scale == 0, tiny, scale).float()
    return scale, (low - least / scale).clamp(low, high).round()


def unpacked(element, codes, scale, zero_point):
    """The values that codes stand for, float32."""
    if element in FLOATS:
        return codes.view(FLOATS[element]).float() * scale
    if element == "int8":
        return (codes.view(torch.int8).float() - zero_point) * scale
    codes = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)
    if element == "int4":
        return (codes.float() + RANGES[element][0] - zero_point) * scale
    table = torch.tensor([*FP4, *(-value for value in FP4)], dtype=torch.float32, device=codes.device)
    return table[codes.long()] * scale


def joined(codes, scale, zero_point):
    """Codes with their scale and zero point behind them, bytes."""
    parts = [codes, scale.bfloat16().view(torch.uint8)]
    if torch.is_tensor(zero_point):
        parts.append(zero_point.to(torch.int8).view(torch.uint8))
    return torch.cat(parts, dim=-1)


def of_bytes(pairs):
    """bfloat16 numbers from two bytes each, as float32. `contiguous` would leave odd strides of sides of 1."""
    return pairs.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()


def split(values, element):
    """What `joined` put together: codes, scale and zero point."""
    if element in FLOATS or element == "fp4_e2m1":
        return values[..., :-2].contiguous(), of_bytes(values[..., -2:]), 0.0
    scale = of_bytes(values[..., -3:-1])
    return values[..., :-3].contiguous(), scale, values[..., -1:].contiguous().view(torch.int8).float()
