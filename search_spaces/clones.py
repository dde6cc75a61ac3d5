"""Module trees that share their tensors: what is set on the one is not set on the other."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from operator import is_
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_CONTAINERS = frozenset((dict, OrderedDict, set))
_COLLECTIONS = (dict, list, tuple, set, frozenset, deque)
_KEEPERS = (*_COLLECTIONS, nn.Module, MethodType, partial, RemovableHandle)
_PLAIN = frozenset((bool, int, float, str, type(None)))
_REGISTERS = frozenset(vars(nn.Module()))
"""What torch itself keeps in every module: tensors, modules, hooks."""
LEFT = object()
"""In place of a module that is there no longer."""


def is_plain(value: object) -> bool:
    """Whether it is a number, a text or None, which need no copy."""
    return type(value) in _PLAIN


def structural_clone(module: nn.Module) -> nn.Module:
    """A module tree of its own that shares every tensor with `module`: what is set on the clone is not set on it.

    Methods that someone has put in place of the class's own (accelerate does, for mixed precision) are the clone's; so
    are modules that attributes hold in lists, tuples, dicts or sets.
    """
    return structural_clones(module)[0][""]


def without_autocast(clone: nn.Module) -> nn.Module:
    """A clone of a model without what accelerate's `prepare` put over its forward for mixed precision in training."""
    before = clone.__dict__.pop("_original_forward", None)
    if before is not None:
        del clone.__dict__["forward"]
        if getattr(before, "__func__", None) is not type(clone).forward:
            clone.__dict__["forward"] = before
    return clone


def without_chunks(clone: nn.Module) -> nn.Module:
    """A clone of a model whose feed-forward layers take all tokens at once, which changes memory alone: in chunks they
    refuse each length that is not a multiple."""
    for module in clone.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0  # type: ignore[assignment]
    return clone


def structural_clones(module: nn.Module) -> tuple[dict[str, nn.Module], list[nn.Module]]:
    """A `structural_clone`, under "", and all modules in it by their paths; and those of them that keep others beside
    torch's own registers (`exchange`)."""
    found: dict[str, nn.Module] = {}
    clones: dict[int, Any] = {}
    noted: list[tuple[nn.Module, str]] = []
    _clone(module, "", found, clones, noted)
    if any(_has_handles(clone.__dict__[name]) for clone, name in noted):
        clones |= _registers(module, found)
    keepers = {id(clone): clone for clone, name in noted if _exchange(clone, name, clones)}
    return found, list(keepers.values())


def _clone(
    module: nn.Module,
    path: str,
    found: dict[str, nn.Module],
    clones: dict[int, nn.Module],
    noted: list[tuple[nn.Module, str]],
) -> nn.Module:
    """Notes the clone's attributes that may keep modules of the original's."""
    clone = found[path] = clones[id(module)] = object.__new__(type(module))
    state = clone.__dict__
    state.update(module.__dict__)
    state.pop("_compiled_call_impl", None)  # of `module.compile()`, which calls the original's forward
    for name, value in module.__dict__.items():
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind in _CONTAINERS:
            state[name] = value.copy()  # 5x as fast as copy.copy, and a model has thousands of them
            if value and name not in _REGISTERS:
                noted.append((clone, name))
        elif isinstance(value, _KEEPERS):
            if isinstance(value, dict | set):
                state[name] = copy.copy(value)
            noted.append((clone, name))
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = _clone(child, f"{path}.{name}" if path else name, found, clones, noted)
    return clone


def exchange(modules: Iterable[nn.Module], others: Mapping[int, Any]) -> None:
    """Puts others in place of what `modules` keep beside torch's own registers: as an attribute, in lists, tuples,
    dicts and sets, and as that to which methods and `functools.partial` are bound.

    Args:
        others: id of a module or parameter -> what stands in for it; LEFT takes it out of what it is in.
    """
    for module in modules:
        for name in [name for name in module.__dict__ if name not in _REGISTERS]:
            _exchange(module, name, others)


def keeping(module: nn.Module, ids: Collection[int]) -> list[str]:
    """Attributes in which a module keeps one of these modules or parameters beside torch's own registers."""
    wanted = dict.fromkeys(ids, LEFT)
    kept = ((name, value) for name, value in vars(module).items() if name not in _REGISTERS)
    return [name for name, value in kept if _exchanged(value, wanted, {}) is not value]


def _exchange(module: nn.Module, name: str, others: Mapping[int, Any]) -> bool:
    """Of one attribute; whether it kept something."""
    value = module.__dict__[name]
    new = _exchanged(value, others, {})
    if new is LEFT:
        del module.__dict__[name]
    elif new is not value:
        module.__dict__[name] = new
    return new is not value


def _exchanged(value: Any, others: Mapping[int, Any], done: dict[int, Any]) -> Any:
    """
    Args:
        done: id of a container -> what became of it, itself while its values are gone through: one may hold itself.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, nn.Module) or kind is nn.Parameter:
        return others.get(id(value), value)
    if isinstance(value, _COLLECTIONS):
        if id(value) not in done:
            done[id(value)] = value
            done[id(value)] = _exchanged_in(value, others, done)
        return done[id(value)]
    if kind is RemovableHandle:
        return _handle(value, others)
    if kind is MethodType:
        owner = _exchanged(value.__self__, others, done)
        return value if owner is value.__self__ else LEFT if owner is LEFT else MethodType(value.__func__, owner)
    if kind is partial:
        bound = (value.func, *value.args, *value.keywords.values())
        new = [_exchanged(each, others, done) for each in bound]
        if all(map(is_, new, bound)):
            return value
        count = 1 + len(value.args)
        if any(each is LEFT for each in new):
            return LEFT
        made = partial(new[0], *new[1:count], **dict(zip(value.keywords, new[count:], strict=True)))
        # `__wrapped__` among them, by which inspect finds what a forward takes.
        made.__dict__.update({name: _exchanged(each, others, done) for name, each in vars(value).items()})
        return made
    return value


def _has_handles(value: Any) -> bool:
    return isinstance(value, RemovableHandle) or (
        isinstance(value, list) and any(isinstance(each, RemovableHandle) for each in value)
    )


def _registers(module: nn.Module, clones: Mapping[str, nn.Module]) -> dict[int, Any]:
    """id of each register of hooks -> that of the clone by the same path."""
    return {
        id(value): clones[path].__dict__[name]
        for path, each in module.named_modules(remove_duplicate=False)
        for name, value in vars(each).items()
        if type(value) is OrderedDict and name in _REGISTERS
    }


def _handle(handle: RemovableHandle, others: Mapping[int, Any]) -> RemovableHandle:
    """That of the same hook in the clone's register. One of the original's would outlive what it refers to weakly, and
    then torch cannot copy it."""
    refers = (handle.hooks_dict_ref, *(handle.extra_dict_ref or ()))
    registers = [others.get(id(register)) for refer in refers if (register := refer()) is not None]
    if None in registers or len(registers) < len(refers):
        return handle
    made = RemovableHandle(registers[0], extra_dict=registers[1:])
    made.id = handle.id
    return made


def _exchanged_in(value: Any, others: Mapping[int, Any], done: dict[int, Any]) -> Any:
    """A container with others in place of some values; itself where it has none of these."""
    kept = list(value.values() if isinstance(value, dict) else value)
    if _PLAIN.issuperset(map(type, kept)):  # a vocabulary has many
        return value
    new = [_exchanged(each, others, done) for each in kept]
    if all(map(is_, new, kept)):
        return value
    staying = [each for each in new if each is not LEFT]
    if isinstance(value, tuple):
        short = len(staying) < len(new) and hasattr(value, "_fields")
        return LEFT if short else tuple.__new__(type(value), staying)
    if isinstance(value, frozenset):
        return type(value)(staying)
    made: Any = copy.copy(value)
    made.clear()
    if isinstance(made, dict):
        made.update((key, each) for key, each in zip(value, new, strict=True) if each is not LEFT)
    elif isinstance(made, set):
        made.update(staying)
    else:
        made.extend(staying)
    return made
