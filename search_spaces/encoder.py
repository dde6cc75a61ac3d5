"""What the blocks of transformer encoders have alike: heads, an MLP of two layers, and the layers of both."""

from __future__ import annotations

from search_spaces.family import Layer, Model, Part, Width


def heads_width(
    block: str,
    heads: int,
    head_dim: int,
    inputs: tuple[str, ...],
    out: str,
    attributes: tuple[tuple[str, str, int], ...],
) -> Width:
    """The heads that the layers `inputs` (queries, keys, values) produce and `out` consumes."""
    return Width(
        f"{block}.heads",
        "heads",
        heads,
        producers=tuple(Part(member, head_dim) for member in inputs),
        consumers=(Part(out, head_dim),),
        attributes=attributes,
        block=block,
        attention=True,
    )


def mlp_width(model: Model, block: str, up: str, down: str) -> Width:
    size = model.get_submodule(up).out_features
    return Width(f"{block}.mlp", "mlp", size, producers=(Part(up),), consumers=(Part(down),), block=block)


def block_layers(block: str, inputs: tuple[str, ...], out: str, up: str, down: str) -> list[Layer]:
    layers = [
        Layer(f"{block}.{short}", member, f"{block}.qkv", block, "attention")
        for short, member in zip("qkv", inputs, strict=True)
    ]
    layers.append(Layer(f"{block}.out", out, f"{block}.out", block, "attention"))
    layers.append(Layer(f"{block}.up", up, f"{block}.up", block, "mlp"))
    layers.append(Layer(f"{block}.down", down, f"{block}.down", block, "mlp"))
    return layers
