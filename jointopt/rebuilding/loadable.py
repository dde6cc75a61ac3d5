"""Whether transformers or timm can build a model again: known from the model alone, before anything is run on it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from jointopt.rebuilding.block_sizes import settle_sizes
from jointopt.rebuilding.structure import on_meta, rebuild_spec
from jointopt.rebuilding.timm_recipe import from_recipe, recipe_of
from quant.errors import JointoptError

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForPreTraining",
    "AutoModel",
)


def check_loadable(model: Any) -> None:
    """Raises JointoptError, as `export` would, where no library builds such a model from its settings.

    Args:
        model: whole and unquantized, as a super-network holds it.
    """
    if not hasattr(model, "config"):
        rebuild_spec(model, from_recipe(recipe_of(model)), pack=False)
        return
    config = copy.deepcopy(model.config)
    auto_class(type(model), config)
    settle_sizes(model, config)
    rebuild_spec(model, on_meta(type(model), config), pack=False)


def auto_class(stock: type[nn.Module], config: Any) -> str:
    """The auto class of transformers that makes a model of class `stock` from its config."""
    for name in AUTO_CLASSES:
        if made_by(name, stock, config):
            return name
    raise JointoptError(
        f"export: no auto class of transformers makes a {stock.__name__}; known: {', '.join(AUTO_CLASSES)}"
    )


def made_by(auto: str, stock: type[nn.Module], config: Any) -> bool:
    """Whether this auto class of transformers makes a model of class `stock` from its config."""
    import transformers

    known = getattr(transformers, auto)._model_mapping.get(type(config), None)
    return stock in (known if isinstance(known, tuple) else (known,))
