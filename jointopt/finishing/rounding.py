"""Rounds the weights of one sub-network anew: layer after layer, and block after block.

Each layer gets the inputs that the layers rounded before it give, and is rounded towards the outputs that it has where
nothing is quantized. Learned rounding then goes on from there, block after block (`reconstruction`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from jointopt.arithmetic import own_arithmetic
from jointopt.batches import check_batch, on_device, without_labels
from jointopt.finishing.lockstep import Arrived, in_step, starting
from jointopt.finishing.reconstruction import reconstruct
from jointopt.finishing.shared_moments import SharedMoments
from jointopt.outputs import without_cache
from jointopt.supernet.subnetwork import Plan, detach, quantize_layer, renaming
from jointopt.supernet.weight_bank import BankedWeight
from quant.errors import JointoptError, said_of
from quant.formats import Format, Scheme
from quant.reference import Clip
from quant.rounding.compensated import gptq
from quant.rounding.coordinate_descent import descent
from quant.rounding.moments import NEVER_REACHED, Halves, joined
from quant.rounding.recovery import recovered
from quant.tensors import QuantizedTensor
from search_spaces.family import within

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

Method = Callable[[Tensor, Tensor, Format, Clip | None], QuantizedTensor]
ROUNDINGS: dict[str, Method] = {"gptq": gptq, "descent": descent, "learned": gptq}
"""Name -> how each layer is rounded. What is learned goes on from there, a block at a time."""


@own_arithmetic()
def rounded_anew(supernet: Supernet, plan: Plan, batches: Iterable[Mapping[str, Any]], rounding: str) -> nn.Module:
    """The quantized sub-network of a plan, its weights rounded by a method of `ROUNDINGS`. See `finish`."""
    moved = []
    for batch in batches:
        check_batch("finish", batch)
        moved.append(starting(without_labels(on_device(batch, supernet.device))))
    if not moved:
        raise JointoptError("finish: found no batch; allowed: one or more dicts of the model's inputs")
    alone = _rounded_alone(supernet)
    rounded = {p: s for p, s in plan.schemes.items() if p in alone}
    bare = replace(plan, schemes={p: s for p, s in plan.schemes.items() if p not in rounded})
    shell = supernet.renormalized(supernet.built(bare), plan)
    original = supernet.view(replace(plan, schemes={}, caches={}))
    renamed = renaming(supernet.family, plan)
    rounder = _Rounder(supernet, plan, rounding, original, {renamed(p): p for p in rounded})
    with without_cache(shell), without_cache(original):  # of layers that are done, which would fill the memory
        in_step(shell, moved, rounder.modules, rounder.change, original)
    if rounder.left:
        raise JointoptError(f"finish: {next(iter(rounder.left.values()))}: {NEVER_REACHED}")
    return detach(supernet.renormalized(shell, plan))


def _rounded_alone(supernet: Supernet) -> set[str]:
    """Paths of the layers that multiply by a weight of their own. The others stay rounded to nearest: an embedding is
    read as a table, and of a weight that several layers share, each has other inputs."""
    own = {layer.path for layer in supernet.family.layers if not layer.tied}
    return {path for path in own if not isinstance(supernet.model.get_submodule(path), nn.Embedding)}


class _Rounder:
    """Rounds what `in_step` comes to: a layer, or all layers of a block.

    Attributes:
        left: name in the sub-network of each layer that is still to be rounded -> its path in the super-network.
        blocks: name of each block that is learned as a whole -> the names of its layers in it.
        modules: the names of all that is to be changed.
    """

    def __init__(self, supernet: Supernet, plan: Plan, rounding: str, original: nn.Module, names: Mapping[str, str]):
        self.supernet, self.plan, self.rounding, self.original = supernet, plan, rounding, original
        self.left, self.shared = dict(names), SharedMoments()
        self.blocks: dict[str, list[str]] = {}
        renamed = renaming(supernet.family, plan)
        paths = [renamed(block.path) for block in plan.blocks]
        for name in names if rounding == "learned" else ():
            block = next((path for path in paths if within(name, path)), None)
            if block is not None:
                self.blocks.setdefault(block, []).append(name[len(block) + 1 :])
        inside = {f"{block}.{part}" for block, parts in self.blocks.items() for part in parts}
        self.modules = [*self.blocks, *(name for name in names if name not in inside)]

    def change(self, name: str, module: nn.Module, arrived: list[Arrived]) -> None:
        if name not in self.blocks:
            self._change_layer(name, module, arrived)
            return
        beside = self.original.get_submodule(name)
        targets: dict[str, Tensor] = {}

        def change_part(part: str, layer: nn.Module, there: list[Arrived]) -> None:
            target = self._change_layer(f"{name}.{part}", layer, there)
            if not _by_codes(layer.scheme):  # type: ignore[arg-type]
                targets[part] = target

        in_step(module, arrived, self.blocks[name], change_part, beside)
        reconstruct(module, targets, arrived, beside)

    def _change_layer(self, name: str, layer: nn.Module, arrived: list[Arrived]) -> Tensor:
        """Returns the weight that was rounded."""
        path = self.left.pop(name)
        scheme = self.plan.schemes[path]
        constants = self.supernet.constants(path, scheme)
        with said_of(f"finish: {path}"):
            halves = self.shared.of(layer, scheme, constants, arrived)
            target = recovered(layer.get_parameter("weight").detach(), halves, centred=_has_bias(layer))
            clip_of = partial(self.supernet.clip, path, scheme)
            weight, shift = _rounded(layer, target, scheme, halves, clip_of, ROUNDINGS[self.rounding])
        quantize_layer(layer, scheme, weight, None, None, constants)
        if shift is not None:
            layer._parameters["bias"] = nn.Parameter(layer.get_parameter("bias") + shift, requires_grad=False)
        return target


def _by_codes(scheme: Scheme) -> bool:
    """Whether a layer multiplies codes and not the values of its weight (LLM.int8), so that no gradient reaches it."""
    return scheme.activations is not None and scheme.activations.scale == "absmax"


def _has_bias(layer: nn.Module) -> bool:
    return layer._parameters.get("bias") is not None


def _rounded(
    layer: nn.Module,
    target: Tensor,
    scheme: Scheme,
    halves: Halves,
    clip_of: Callable[[Tensor, Tensor], Clip | None],
    method: Method,
) -> tuple[BankedWeight, Tensor | None]:
    """A layer's weight rounded for its inputs, and what its bias gains, if it has one.

    Ranges are chosen as in the search. The clipping that has the least squared error alone is not the best one here:
    errors that go on to later columns need the room (ViT of the digits, NVFP4A16: KL 8.4e-5 by MSE, 3.2e-5 by
    min-max).

    Args:
        target: the weight, fitted to the original's outputs.
    """
    assert scheme.weights is not None
    moments = joined(halves)
    hessian = moments.hessian(centred=_has_bias(layer))
    energy = hessian.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(target) // len(hessian), 0)
    quantized = method(target, hessian, scheme.weights, clip_of(target, energy))
    values = quantized.dequantize(target.dtype)
    if not _has_bias(layer):
        return BankedWeight(quantized, values), None
    whole, held = (
        each.detach().float().flatten(1).unflatten(0, (len(hessian), -1))
        for each in (layer.get_parameter("weight"), values)
    )
    lost = whole @ moments.original_mean()[..., None] - held @ moments.mean()[..., None]
    return BankedWeight(quantized, values), lost.flatten().to(target.dtype)
