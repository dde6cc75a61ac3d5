"""What a sub-network is exported for: the number formats that it may have there, and what else is not allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jointopt.installed import lacking
from quant.errors import JointoptError, check_choice
from quant.formats import SCHEMES, scheme
from search_spaces.defaults import KEEPS, WIDTHS, presets, with_extremes
from search_spaces.space import SearchSpace

UNEVEN = (*WIDTHS, *KEEPS)
"""Keys of a space by which blocks can differ."""


@dataclass(frozen=True)
class Target:
    """A library that loads exports.

    Attributes:
        schemes: names of the number formats that it computes, group sizes left open; None for all, one's own included.
        default_schemes: those of a space that names none; None for the usual ones.
        caches: whether quantized caches can be exported for it.
        dtypes: of models.
        closed: keys of a space that cannot be searched for it.
        open: keys, with their choices, of a space that names nothing of the architecture; empty for the usual ones.
        uneven: model types whose blocks may differ; None for all. For others what makes blocks differ is closed.
        fused: whether it computes q, k, v as one layer, and gate, up as another, so that these share a format.
        unquantized: layers that keep their numbers as they are.
        without: genes that no space has for it: what they would choose stays.
        cpu_alone: whether its exports are verified on the CPU, whatever the search computed on.
        backend: what its exports run in on this machine (`jointopt.timing.backend`), None where that is not timed.
        extra: by which what writes and reads them is installed (`jointopt.installed`), None where nothing is needed.
    """

    name: str
    schemes: tuple[str, ...] | None
    default_schemes: tuple[str, ...] | None = None
    caches: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    closed: tuple[str, ...] = ()
    open: Mapping[str, Any] = field(default_factory=dict)
    uneven: tuple[str, ...] | None = None
    fused: bool = False
    unquantized: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    cpu_alone: bool = False
    backend: str | None = None
    extra: str | None = None


TARGETS = {
    each.name: each
    for each in (
        Target("transformers", None, backend="torch"),
        Target(
            "onnxruntime",
            (
                "none",
                "W8A8",
                "W8A8_STATIC",
                "W8A8_STATIC_ASYM",
                "W8A16_CHANNEL",
                "W4A16",
                "W4A16_ASYM",
                "W4A16_CHANNEL",
                "FP8",
                "FP8_DYNAMIC",
                "FP8A16",
            ),
            default_schemes=("none", "W8A8", "W4A16"),
            caches=False,
            dtypes=("float32",),
            cpu_alone=True,
            backend="onnxruntime",
            extra="onnx",
        ),
        Target(
            "gguf",
            ("none", "W8A16_G32", "W4A16_G32"),
            default_schemes=("none", "W8A16_G32", "W4A16_G32"),
            caches=False,
            closed=UNEVEN,
            open={"preset": "fixed"},
            extra="gguf",
        ),
        Target(
            "vllm",
            # Where weights have one scale a tensor (FP8, NVFP4), vLLM makes those of q, k, v one: that was not scored.
            (
                "none",
                "W8A8",
                "W8A8_STATIC",
                "W8A8_STATIC_ASYM",
                "W8A8_ASYM",
                "W8A16",
                "W8A16_CHANNEL",
                "W4A16",
                "W4A16_CHANNEL",
                "FP8_DYNAMIC",
            ),
            default_schemes=("none", "W8A8", "W4A16", "FP8_DYNAMIC"),
            caches=False,
            closed=("heads",),
            open={"depth": [0.5, 0.67, 0.83, 1.0], "mlp": [0.5, 0.75, 1.0]},
            uneven=("llama",),
            fused=True,
            unquantized=("embedding", "head"),
            without=("block0.attention.keep",),  # a model of its DeciLM begins with attention
        ),
    )
}


def target(name: str) -> Target:
    """The target of that name. Raises JointoptError where there is none."""
    check_choice("target", name, TARGETS)
    return TARGETS[name]


def check_installed(wanted: Target) -> None:
    """Raises JointoptError where a package is missing that its exports need."""
    if wanted.extra and (told := lacking(wanted.extra)):
        raise JointoptError(f"target {wanted.name}: found {told}")


def of_kind(wanted: Target, kind: str | None) -> Target:
    """The target as it is for models of a type (None: of none that has a name)."""
    if wanted.uneven is None or kind in wanted.uneven:
        return wanted
    opened = {key: choices for key, choices in wanted.open.items() if key not in UNEVEN}
    return replace(wanted, closed=UNEVEN, open=opened)


def check_schemes(wanted: Target, schemes: Iterable[str]) -> None:
    """Raises JointoptError for a number format that the target does not compute."""
    for name in schemes:
        scheme(name)
        base = name if name in SCHEMES else name.rpartition("_G")[0]
        if wanted.schemes is not None and name not in wanted.schemes and base not in wanted.schemes:
            raise JointoptError(f"target {wanted.name}: {name} has no form there; allowed: {', '.join(wanted.schemes)}")


def closed_key(wanted: Target, options: Mapping[str, Any]) -> str | None:
    """What a space's options, or their preset, search that cannot be searched for the target."""
    preset = options.get("preset")
    named = (presets().get(preset) or {}) if preset else {}
    if any(key in named for key in wanted.closed):
        return f"preset {preset}"
    return next((key for key in wanted.closed if options.get(key)), None)


def narrowed(wanted: Target, space: SearchSpace) -> SearchSpace:
    """The space without the genes that the target has no place for."""
    if not set(wanted.without) & set(space.names):
        return space
    kept = []
    for gene in space.genes:
        if gene.name not in wanted.without:
            requires = {name: choices for name, choices in gene.requires.items() if name not in wanted.without}
            kept.append(replace(gene, requires=requires))
    return with_extremes(SearchSpace(kept))
