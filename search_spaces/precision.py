"""Which scheme a layer can take, at every width it can have; and which gene says so."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from quant.errors import JointoptError, said_of
from quant.formats import Scheme, scheme
from search_spaces.family import Family, Layer

BITSANDBYTES_ROWS = 32
"""Outputs of a layer that its 4-bit kernel for CPUs goes through together; it refuses other numbers of them."""
PRECISION_PER = ("layer", "projection", "block")


def gene_names(layer: Layer) -> tuple[str, str, str]:
    """The names a layer's precision gene can have: its own, its projection group's, its block's."""
    group = layer.block or layer.projection
    return f"{layer.name}.precision", f"{layer.projection}.precision", f"{group}.precision"


def is_precision(gene: str) -> bool:
    """Whether a gene of this name chooses the scheme of layers."""
    return gene.endswith(".precision")


def is_cache(gene: str) -> bool:
    """Whether a gene of this name chooses the format of a cache."""
    return gene.endswith(".cache")


def columns_per_input(module: nn.Module) -> int:
    """Weight columns that one input channel takes: 1, or the kernel's area."""
    return module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1


def fitted_scheme(name: str, layer: Layer, module: nn.Module, columns: Collection[int]) -> Scheme:
    """The scheme with the group size that divides every one of `columns`, the widths the layer's weight can have.

    Raises:
        JointoptError: the layer cannot take the scheme; the message names the layer, the scheme and the reason.
    """
    wanted = scheme(name)
    if wanted.weights is None:
        return wanted
    if wanted.bitsandbytes and not isinstance(module, nn.Linear):
        kind = type(module).__name__
        raise JointoptError(f"{layer.path}: {name} is bitsandbytes', which has it for Linear layers; found {kind}")
    outputs = module.get_parameter("weight").shape[0]
    if wanted.bitsandbytes in ("nf4", "fp4") and outputs % BITSANDBYTES_ROWS:
        raise JointoptError(
            f"{layer.path}: has {outputs} outputs; allowed in {name}: multiples of {BITSANDBYTES_ROWS}, as "
            "bitsandbytes' kernel for CPUs takes them"
        )
    if wanted.activations is not None and not isinstance(module, nn.Embedding):
        if not layer.tokens:
            raise JointoptError(
                f"{layer.path}: {name} quantizes activations, and this layer sees one vector a sample; "
                "allowed here: schemes of weights only"
            )
        group = wanted.activations.group_size or 1
        channels = [count // columns_per_input(module) for count in columns]
        if any(count % group for count in channels):
            raise JointoptError(
                f"{layer.path}: {name} quantizes activations in groups of {group}; found {channels} input channels"
            )
    with said_of(layer.path):
        return wanted.fitted(columns)


def check_whole_model(offered: Mapping[str, Iterable[str]], model: nn.Module) -> None:
    """Refuses bitsandbytes' formats beside others, since it takes a model whole: in one format, or not at all; and for
    models that transformers does not load.

    Args:
        offered: where schemes are chosen (a key, or names of genes) -> the names that are offered there.

    Raises:
        JointoptError: two schemes are offered of which one is bitsandbytes' and none is "none", or one for a model that
            is none of transformers.
    """
    pairs = [(name, where) for where, names in offered.items() for name in names if scheme(name).weights]
    whole = next((pair for pair in pairs if scheme(pair[0]).bitsandbytes), None)
    if whole and not hasattr(model, "config"):
        raise JointoptError(
            f"{whole[1]}: found {whole[0]}, which bitsandbytes has for models of transformers, and the model is a "
            f"{type(model).__module__.partition('.')[0]} {type(model).__name__}; allowed: schemes other than BNB_..."
        )
    other = next((pair for pair in pairs if whole and pair[0] != whole[0]), None)
    if whole and other:
        raise JointoptError(
            f"{other[1]}: found {other[0]}, and {whole[0]} in {whole[1]}, which bitsandbytes has for whole models; "
            f"allowed beside {whole[0]}: none"
        )


def full_columns(module: nn.Module) -> int:
    """Columns of the layer's weight, seen as a matrix [rows, columns]."""
    weight = module.get_parameter("weight")
    return weight[0].numel()


def possible_columns(family: Family, layer: Layer, module: nn.Module, choices: dict[str, tuple]) -> list[int]:
    """Every number of weight columns that the layer can have, given the choices of the width genes."""
    for width in family.widths:
        for part in width.consumers:
            if part.module == layer.path:
                sizes = choices.get(width.gene, (width.size,))
                return [size // width.unit * part.channels * columns_per_input(module) for size in sizes]
    return [full_columns(module)]
