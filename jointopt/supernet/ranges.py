"""What calibration observes for the constants of static formats: ranges of layers' inputs, and of attention's keys."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from jointopt.supernet.importance import Listener
from jointopt.supernet.subnetwork import MeasuredConstants
from quant.cache import CACHE_FORMATS, CacheFormat, KeyObserver
from quant.calibration import ActivationObserver
from quant.errors import said_of
from quant.formats import Scheme
from search_spaces.family import Family, Width
from search_spaces.space import SearchSpace


class Ranges:
    """One observer for each layer and scheme whose activation format is static, and for each cache that is quantized.

    Args:
        schemes: (layer path, choice) -> the scheme as that layer stores it.
        method: how a range of inputs is chosen (`quant.calibration.ActivationObserver`).

    Attributes:
        keys: path of an attention layer -> observer of its keys.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        space: SearchSpace,
        schemes: Mapping[tuple[str, str], Scheme],
        method: str,
    ):
        self._family = family
        self._inputs: dict[tuple[str, str], ActivationObserver] = {}
        holders = {layer.path: layer.paths for layer in family.layers}
        for (path, _), wanted in schemes.items():
            if wanted.activations is None or not wanted.needs_constants:
                continue
            for each in holders[path]:
                if isinstance(model.get_submodule(each), nn.Linear | nn.Conv2d):
                    self._inputs[each, wanted.name] = ActivationObserver(wanted.activations, method)
        choices = {gene.name: gene.choices for gene in space.genes}
        self._caches: dict[str, list[CacheFormat]] = {}
        for cache in family.caches:
            forms = [CACHE_FORMATS[str(choice)] for choice in choices.get(cache.name, ())]
            if static := [form for form in forms if form.element is not None and not form.inputs]:
                self._caches[cache.attention] = static
        self.keys = {path: KeyObserver() for path in self._caches}

    def listeners(self) -> list[Listener]:
        return [(path, observer.observe) for (path, _), observer in self._inputs.items()]

    def reorder(self, width: Width, order: Tensor) -> None:
        """A width's units were sorted: the heads of its attention layer come in another order."""
        for cache in self._family.caches:
            if cache.heads == width.gene and cache.attention in self.keys:
                self.keys[cache.attention].reorder(order)

    def constants(self) -> MeasuredConstants:
        """(path, name of the scheme or of the cache's format) -> constants by their names.

        Raises:
            JointoptError: what was observed gives none; with the path.
        """
        found = {}
        for (path, name), observer in self._inputs.items():
            with said_of(path):
                found[path, name] = observer.constants()
        for path, forms in self._caches.items():
            for form in forms:
                with said_of(path):
                    found[path, form.name] = self.keys[path].constants(form)
        return found
