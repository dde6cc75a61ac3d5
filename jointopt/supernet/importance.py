"""What calibration measures in one pass: the importance of channels, heads and blocks, and ranges of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from jointopt.outputs import first_output
from jointopt.rebuilding.held_cache import cache_name
from quant.cache import KeyObserver
from quant.errors import DOES_NOT_RUN, JointoptError, in_one_line
from search_spaces.clones import structural_clone, without_autocast
from search_spaces.family import Family, Width

Listener = tuple[str, Callable[[Tensor], None]]


class CalibrationPass:
    """Runs a model over batches and keeps running sums; the model is left without a hook.

    After `run`: `channel_energy[path]` sums the squares of each input channel of a width's consumer, `influence`
    holds each block's 1 - cos(input, output) (ShortGPT, arXiv 2403.03853, eq. 1). Padding, where the batch has an
    attention mask, is left out of these and of what is listened to.

    Args:
        listeners: (path of a layer, function of its inputs [rows, channels], of a convolution [N, C, H, W]).
        keys: path of an attention layer -> observer of its keys.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        listeners: Iterable[Listener] = (),
        keys: Mapping[str, KeyObserver] = MappingProxyType({}),
    ):
        self.model = without_autocast(structural_clone(model)).eval()
        self.family = family
        self.listeners, self.keys = tuple(listeners), keys
        self.channel_energy: dict[str, Tensor] = {}
        self.influence: dict[str, float] = {}
        self._cosines: dict[str, tuple[float, int]] = {}
        self._mask: Tensor | None = None

    def run(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Returns the number of batches. Raises JointoptError where the model does not run on one, where a declared
        convolution is handed one image alone, or where a layer or a block saw numbers that are not finite, by which
        nothing can be ordered."""
        count = 0
        with ExitStack() as hooks, torch.no_grad():
            for path, hook in self._hooks():
                module = self.model.get_submodule(path)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            for path, keys in self.keys.items():
                module, hook = self.model.get_submodule(path), partial(self._give_cache, keys)
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            for batch in batches:
                self._mask = batch.get("attention_mask")
                self._forward(batch)
                count += 1
        self.influence = {name: 1 - total / count for name, (total, count) in self._cosines.items()}
        for name, measured in {**self.channel_energy, **self.influence}.items():
            if not torch.as_tensor(measured).isfinite().all():
                raise JointoptError(f"{name}: calibration saw inputs that are not finite; allowed: finite numbers")
        return count

    def _forward(self, batch: Mapping[str, Any]) -> None:
        try:
            self.model(**batch)
        except (JointoptError, torch.OutOfMemoryError):
            raise
        except DOES_NOT_RUN as error:
            told = in_one_line(error)
            taken = signature(self.model.forward).parameters.values()
            allowed = ", ".join(each.name for each in taken if each.kind != Parameter.VAR_KEYWORD)
            raise JointoptError(
                f"calibrate: the model does not run on a batch of {', '.join(map(str, batch))}: {told}; allowed: what "
                f"its forward takes, {allowed}"
            ) from error

    def _hooks(self) -> list[tuple[str, Callable]]:
        declared = [layer.path for layer in self.family.layers]
        declared += [part.module for width in self.family.widths for part in (*width.producers, *width.consumers)]
        convolutions = [path for path in declared if isinstance(self.model.get_submodule(path), nn.Conv2d)]
        hooks: list[tuple[str, Callable]] = [(path, self._image_hook(path)) for path in dict.fromkeys(convolutions)]
        for path in {part.module for width in self.family.widths for part in width.consumers}:
            hooks.append((path, self._energy_hook(path)))
        for block in self.family.blocks:
            if block.removable:
                hooks.append((block.path, self._influence_hook(block.name)))
        return hooks + [(path, self._input_hook(listen)) for path, listen in self.listeners]

    def _give_cache(self, keys: KeyObserver, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Hands the attention layer a cache that shows its keys and keeps nothing."""
        return args, {**kwargs, cache_name(kwargs): _SeenKeys(self, keys)}

    def _tokens(self, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """[rows, channels], padding left out; channels come second in what a module with convolutions is handed."""
        if module is not None and hidden.dim() == 4 and any(isinstance(m, nn.Conv2d) for m in module.modules()):
            return hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1])
        if self._mask is not None and hidden.dim() == 3 and self._mask.shape == hidden.shape[:2]:
            return hidden[self._mask.bool()]
        return hidden.reshape(-1, hidden.shape[-1])

    def _image_hook(self, path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            shape = list(hidden_input(args, kwargs).shape)
            if len(shape) != 4:
                raise JointoptError(f"{path}: found one image, {shape}; allowed: images in a batch, [N, C, H, W]")

        return hook

    def _energy_hook(self, path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            energy = self._tokens(hidden_input(args, kwargs), module).float().square().sum(0)
            self.channel_energy[path] = self.channel_energy.get(path, torch.zeros_like(energy)) + energy

        return hook

    def _influence_hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            after = first_output(output)
            before = hidden_input(args, kwargs)
            if before.shape == after.shape:
                first, second = (self._tokens(each, module).float() for each in (before, after))
                cosine = nn.functional.cosine_similarity(first, second)
                total, count = self._cosines.get(name, (0.0, 0))
                self._cosines[name] = total + float(cosine.double().sum()), count + cosine.numel()

        return hook

    def _input_hook(self, listen: Callable[[Tensor], None]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            hidden = hidden_input(args, kwargs)
            listen(hidden if isinstance(module, nn.Conv2d) else self._tokens(hidden))

        return hook


class _SeenKeys:
    """A cache for one attention layer and one forward pass."""

    def __init__(self, calibration: CalibrationPass, keys: KeyObserver):
        self._calibration, self._keys = calibration, keys

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen = keys.transpose(1, 2).flatten(2)
        self._keys.observe(self._calibration._tokens(seen).unflatten(-1, (keys.shape[1], -1)))
        return keys, values


def hidden_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a module was called with: the first tensor."""
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))


def unit_importance(model: nn.Module, width: Width, channel_energy: Mapping[str, Tensor]) -> Tensor:
    """Importance of each unit of a width, [units]: over its channels and consumers, the sum of weight norm x
    activation norm of every input column (the saliency of Wanda, arXiv 2306.11695, summed over a column).

    Raises:
        JointoptError: a consumer that no batch reached.
    """
    total = torch.zeros(width.units, dtype=torch.float32)
    for part in width.consumers:
        if part.module not in channel_energy:
            raise JointoptError(
                f"{part.module}: no calibration batch reaches it, by which width {width.gene!r} is sorted; allowed: "
                "batches that do, and a forward pass that calls it as a module; or leave the width out"
            )
        weight = model.get_submodule(part.module).get_parameter("weight").detach().float()
        columns = weight.transpose(0, 1).flatten(1).norm(dim=1)
        scores = columns * channel_energy[part.module].sqrt()
        total += scores.reshape(width.units, part.channels).sum(1).cpu()
    return total


def sort_widths(
    model: nn.Module,
    family: Family,
    calibration: CalibrationPass,
    beside: Mapping[Tensor, Mapping[str, Any]] = MappingProxyType({}),
) -> list[tuple[Width, Tensor]]:
    """Sorts all widths of a model by importance, see `sort_width`. Returns each with the order it was brought to."""
    found = []
    for width in family.widths:
        importance = unit_importance(model, width, calibration.channel_energy)
        order = torch.argsort(importance, descending=True, stable=True)
        sort_width(model, width, order, beside)
        found.append((width, order))
    return found


@torch.no_grad()
def sort_width(
    model: nn.Module, width: Width, order: Tensor, beside: Mapping[Tensor, Mapping[str, Any]] = MappingProxyType({})
) -> None:
    """Reorders a width's units, most important first, in producers and consumers alike: the function is unchanged.

    Args:
        beside: parameter -> its state in an optimizer; tensors of the parameter's shape are reordered with it.
    """
    for part in width.producers:
        rows = channel_order(order, part.channels)
        module = model.get_submodule(part.module)
        if isinstance(module, nn.Embedding):
            _reorder(module, "weight", rows, 1, beside)
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim():
                _reorder(module, name, rows, 0, beside)
    for part in width.consumers:
        _reorder(model.get_submodule(part.module), "weight", channel_order(order, part.channels), 1, beside)


def trains_others(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer has parameters that are not the model's."""
    own = {id(each) for each in model.parameters()}
    return any(id(each) not in own for group in optimizer.param_groups for each in group["params"])


def check_sortable(optimizer: torch.optim.Optimizer) -> None:
    """Raises JointoptError for an optimizer whose state does not follow its parameters' channels."""
    for parameter, state in optimizer.state.items():
        for name, each in state.items():
            if isinstance(each, Tensor) and each.numel() > 1 and each.shape != parameter.shape:
                raise JointoptError(
                    f"sort_every: {type(optimizer).__name__} keeps {name} {list(each.shape)} of a parameter "
                    f"{list(parameter.shape)}, which cannot be sorted with it; allowed: state of the parameter's "
                    "shape, as AdamW's and SGD's"
                )


def channel_order(order: Tensor, channels: int) -> Tensor:
    """The order of channels that follows from that of their units."""
    return (order[:, None] * channels + torch.arange(channels)).flatten()


def _reorder(module: nn.Module, name: str, order: Tensor, dim: int, beside: Mapping[Tensor, Mapping[str, Any]]) -> None:
    tensor = module._parameters.get(name) if name in module._parameters else module._buffers[name]
    assert tensor is not None
    state = beside.get(tensor, {}).values()
    kept = [each for each in state if isinstance(each, Tensor) and each.shape == tensor.shape]
    for each in (tensor, *kept):
        each.copy_(each.index_select(dim, order.to(each.device)))
