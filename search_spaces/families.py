"""Finds the declaration of a model: the one list of known families."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from quant.errors import JointoptError
from search_spaces import bert, llama, resnet, vit
from search_spaces.family import Family, check, structural_clone

Declare = Callable[[nn.Module], Family]

_TRANSFORMERS: dict[str, Declare] = {
    kind: module.declare for module in (llama, bert, vit, resnet) for kind in module.MODEL_TYPES
}
_TIMM: dict[str, Declare] = {"VisionTransformer": vit.declare_timm, "ResNet": resnet.declare_timm}


def declare(model: nn.Module, family: Declare | None = None) -> tuple[nn.Module, Family]:
    """The model's own declaration, checked against its shapes.

    Args:
        model: any model; it is left as it is.
        family: a user's own declaration (model -> Family), for a model that none of the known ones describes.

    Returns:
        A structural clone of the model, which shares its tensors and has the layout that the declaration describes
        (timm's fused qkv layers, for one, are split), and the declaration.

    Raises:
        JointoptError: no known family describes the model, or the declaration does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise JointoptError(f"model: found {type(model).__name__}; allowed: a torch.nn.Module")
    known = family or _known(model)
    clone = structural_clone(model)
    declared = known(clone)
    check(declared, clone)
    return clone, declared


def _known(model: nn.Module) -> Declare:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind in _TRANSFORMERS:
        return _TRANSFORMERS[kind]
    if type(model).__module__.startswith("timm.") and type(model).__name__ in _TIMM:
        return _TIMM[type(model).__name__]
    raise JointoptError(
        f"model: {kind or type(model).__name__!r} belongs to no known family; known: {', '.join(_TRANSFORMERS)} "
        f"of transformers, {', '.join(_TIMM)} of timm; or declare it: family=my_declaration"
    )
