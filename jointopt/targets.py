"""What a sub-network is exported for: the number formats that it may have there, and what else is not allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quant.errors import JointoptError, did_you_mean
from quant.formats import SCHEMES, scheme


@dataclass(frozen=True)
class Target:
    """A library that loads exports.

    Attributes:
        schemes: names of the number formats that it computes; group sizes are left open.
        default_schemes: those of a space that names none; None for the usual ones.
        caches: whether quantized caches can be exported for it.
        dtypes: of models.
        uniform: whether all blocks must be of one size, so that of the architecture only depth can be searched.
        fused: whether it computes q, k, v as one layer, and gate, up as another, so that these share a format.
        unquantized: layers that keep their numbers as they are.
    """

    name: str
    schemes: tuple[str, ...]
    default_schemes: tuple[str, ...] | None = None
    caches: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    uniform: bool = False
    fused: bool = False
    unquantized: tuple[str, ...] = ()


TARGETS = {
    each.name: each
    for each in (
        Target("transformers", tuple(SCHEMES)),
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
        ),
        Target(
            "gguf",
            ("none", "W8A16_G32", "W4A16_G32"),
            default_schemes=("none", "W8A16_G32", "W4A16_G32"),
            caches=False,
            uniform=True,
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
            uniform=True,
            fused=True,
            unquantized=("embedding", "head"),
        ),
    )
}


def target(name: str) -> Target:
    """The target of that name. Raises JointoptError where there is none."""
    if name not in TARGETS:
        raise JointoptError(f"target: found {name!r}{did_you_mean(name, TARGETS)}; allowed: {', '.join(TARGETS)}")
    return TARGETS[name]


def check_schemes(wanted: Target, schemes: Iterable[str]) -> None:
    """Raises JointoptError for a number format that the target does not compute."""
    for name in schemes:
        scheme(name)
        base = name if name in SCHEMES else name.rpartition("_G")[0]
        if name not in wanted.schemes and base not in wanted.schemes:
            raise JointoptError(f"target {wanted.name}: {name} has no form there; allowed: {', '.join(wanted.schemes)}")
