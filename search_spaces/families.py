"""Finds the declaration of a model: the one list of known families."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from quant.errors import JointoptError, check_kind
from search_spaces import bert, distilbert, llama, resnet, vit
from search_spaces.checks import check
from search_spaces.clones import structural_clone
from search_spaces.family import Family

WRAPPERS = ("PeftModel", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")

Declare = Callable[[nn.Module], Family]

_TRANSFORMERS: dict[str, Declare] = {
    kind: module.declare for module in (llama, bert, distilbert, vit, resnet) for kind in module.MODEL_TYPES
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
        JointoptError: no known family describes the model, it is in a wrapper, or the declaration does not fit it.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    wrapper = next((each.__name__ for each in type(model).__mro__ if each.__name__ in WRAPPERS), None)
    if wrapper is not None:
        merged = " (merge_and_unload() gives it)" if wrapper == "PeftModel" else ""
        raise JointoptError(f"model: found it in a {wrapper}; allowed: the model itself{merged}")
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise JointoptError(f"model: {path or 'it'} is what torch.compile made; allowed: what was given to it")
    for path, parameter in model.named_parameters():
        if not parameter.numel():
            raise JointoptError(f"model: {path} is of shape {list(parameter.shape)}; allowed: sizes from 1")
    known = family or _known(model)
    if family is None:
        _check_tie(model)
    clone = structural_clone(model)
    declared = known(clone)
    check_kind("family", declared, Family, "a function that returns a Family")
    check(declared, clone)
    return clone, declared


def _check_tie(model: nn.Module) -> None:
    """Raises JointoptError where a config says otherwise than the model whether its head has the embedding's weight:
    what is built from that config is another model."""
    said = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if said is None or head is None or head.weight.is_meta:  # moved there, ties are lost
        return
    shared = head.weight is model.get_input_embeddings().weight  # type: ignore[operator]
    if shared != said:
        raise JointoptError(
            f"model: config.tie_word_embeddings is {said}, and the head {'shares' if shared else 'does not share'} the "
            f"embedding's weight; allowed: config.tie_word_embeddings = {shared}"
        )


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
