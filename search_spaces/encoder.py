"""What the blocks of transformer encoders have alike: heads, an MLP of two layers, and the layers of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from search_spaces.family import Block, Branch, Family, Layer, Link, Model, Part, Width


@dataclass
class Encoder:
    """The declaration of an encoder in the making, block by block.

    Attributes:
        layers: those before the blocks, then theirs.
        readers, writers: of the residual stream, see `Stream`.
    """

    model: Model
    layers: list[Layer]
    blocks: list[Block] = field(default_factory=list)
    widths: list[Width] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    readers: list[Link] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)

    def add(
        self,
        path: str,
        branches: tuple[Branch, ...],
        inputs: tuple[str, ...],
        out: str,
        up: str,
        down: str,
        heads: int,
        head_dim: int,
        attributes: tuple[tuple[str, str, int], ...],
        norms: tuple[str, str] | None = None,
    ) -> None:
        """One block.

        Args:
            inputs: paths of the layers that make queries, keys and values; `out` reads what attention makes of these.
            up, down: paths of the MLP's layers.
            attributes: see `Width`, of the heads.
            norms: paths of the normalizations before attention and MLP, which alone read the residual stream; None
                where they are behind these, and feed it as well.
        """
        block = f"block{len(self.blocks)}"
        self.blocks.append(Block(block, path, branches=branches))
        size = self.model.get_submodule(up).out_features
        self.widths += [
            Width(
                f"{block}.heads",
                "heads",
                heads,
                producers=tuple(Part(member, head_dim) for member in inputs),
                consumers=(Part(out, head_dim),),
                attributes=attributes,
                block=block,
                attention=True,
            ),
            Width(f"{block}.mlp", "mlp", size, producers=(Part(up),), consumers=(Part(down),), block=block),
        ]
        for short, member in zip("qkv", inputs, strict=True):
            self.layers.append(Layer(f"{block}.{short}", member, f"{block}.qkv", block, "attention"))
        for short, member, branch in (("out", out, "attention"), ("up", up, "mlp"), ("down", down, "mlp")):
            self.layers.append(Layer(f"{block}.{short}", member, f"{block}.{short}", block, branch))
        self.links.append(Link(inputs[2], (out,), head_dim))
        self.writers += [out, down]
        if norms is not None:
            self.readers += [Link(norms[0], inputs), Link(norms[1], (up,))]

    def family(self, name: str, **more: Any) -> Family:
        """What was declared, and what else `Family` has."""
        return Family(
            name,
            tuple(self.blocks),
            tuple(self.widths),
            tuple(self.layers),
            sequential=True,
            links=(*self.links, *self.readers),
            **more,
        )
