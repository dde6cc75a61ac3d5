"""Evaluates genomes as a tree: the blocks on which sub-networks agree, from the first one on, are run once for all.

    evaluator = SharedEvaluator(supernet, quality, memory_bytes=10**9)
    for index, evaluation in evaluator.evaluate(genomes):
        ...

The quality function is a black box that calls the model any number of times. What a call computes up to a block is
known again by the call's inputs (128 bits of their bytes' hash), the hidden state that enters the first block, and what
the blocks up to there are: so a hidden state that is taken instead of computed is the one that would have been
computed, to the bit.
A call of which that cannot be said is run plainly: one with a KV cache or anything else that is no plain tensor or
number among its inputs, with gradients, with hooks, on a view whose tensors or modules were changed since, and one
that a mode of torch or its profiler watches which was not there when the view was made. (A clock is not noticed: it is
told what was run.) What a skipped block would have left beside its hidden state (its part of a KV cache) stands in the
output as something that cannot be used; where it is used all the same, the genome is evaluated again, plainly.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from jointopt.digests import feed
from jointopt.evaluation.evaluation import Evaluation, Quality, evaluate, state_of
from jointopt.supernet.batch_norm import has_batch_norm
from jointopt.supernet.genes import precision_genes
from jointopt.supernet.subnetwork import Plan, renaming
from quant.errors import JointoptError
from search_spaces.family import Family, branch_keep

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

MEMORY = 10**9
Prefix = tuple[str, ...]
"""What the first blocks of a sub-network are, one string a block."""


def can_share(supernet: Supernet) -> bool:
    """Whether sub-networks can share blocks: the family says so, and no statistics are estimated for each anew."""
    return supernet.family.sequential and not has_batch_norm(supernet.model)


def block_signatures(family: Family, plan: Plan) -> Prefix:
    """One string for each block that stays: equal for two plans where their blocks compute the same function."""
    through = [(w.gene, plan.units[w.gene]) for w in family.widths if w.block is None and w.gene in plan.units]
    found: dict[str | None, list] = {block.name: [block.name, through] for block in plan.blocks}
    for block in plan.blocks:
        found[block.name] += [branch.kind for branch in block.branches if branch in plan.dropped]
    for width in family.widths:
        if width.block in found and width.gene in plan.units:
            found[width.block].append((width.gene, plan.units[width.gene]))
    for layer in family.layers:
        if layer.block in found and layer.path in plan.schemes:
            found[layer.block].append((layer.path, plan.schemes[layer.path].name))
    for held in family.caches:
        if held.block in found and held.attention in plan.caches:
            found[held.block].append((held.attention, plan.caches[held.attention].name))
    return tuple(map(repr, found.values()))


def parts_of(supernet: Supernet) -> list[list[int]]:
    """Places of the genes on which each part of the model hangs, in the order in which parts run: what is before the
    blocks, then every block. Empty where nothing can be shared."""
    if not can_share(supernet):
        return []
    family, precision = supernet.family, precision_genes(supernet.family, supernet.space)
    hangs: dict[str | None, set[str | None]] = {None: set()}
    for block in family.blocks:
        hangs[block.name] = {block.keep, *(branch_keep(block.name, branch.kind) for branch in block.branches)}
    for width in family.widths:
        hangs[width.block].add(width.gene)
    for held in family.caches:
        hangs[held.block].add(held.name)
    begun = False
    for layer in family.layers:
        begun |= layer.block is not None
        if layer.block is not None or not begun:
            hangs[layer.block].add(precision.get(layer.path))
    return [[at for at, name in enumerate(supernet.space.names) if name in genes] for genes in hangs.values()]


def evaluation_order(supernet: Supernet, genomes: np.ndarray) -> np.ndarray:
    """Indices into `genomes`, so that those which share most blocks come one after the other: depth first.

    It is an order of the genomes alone: some of them come in the same order as all of them.
    """
    if not can_share(supernet):
        return np.arange(len(genomes))
    return _depth_first([block_signatures(supernet.family, supernet.plan(genome)) for genome in genomes], genomes)


def _depth_first(prefixes: Sequence[Prefix], genomes: np.ndarray) -> np.ndarray:
    keys = list(zip(prefixes, genomes.tolist(), strict=True))
    return np.array(sorted(range(len(genomes)), key=keys.__getitem__), dtype=np.int64)


class SharedEvaluator:
    """`evaluate` for many genomes: the same results to the bit, in less time where genomes agree on their first blocks.

    Args:
        supernet: calibrated.
        quality: as `jointopt.search` takes it.
        memory_bytes: for hidden states that are kept. Where it does not do, more is computed.
    """

    def __init__(self, supernet: Supernet, quality: Quality, memory_bytes: int = MEMORY):
        self.supernet = supernet
        self.quality = quality
        self.memory_bytes = memory_bytes

    def evaluate(self, genomes: np.ndarray) -> Iterator[tuple[int, Evaluation]]:
        """(index into `genomes`, its evaluation), as each ends, in `evaluation_order`."""
        if not can_share(self.supernet):
            for index, genome in enumerate(genomes):
                yield index, self._plainly(genome)
            return
        plans = [self.supernet.plan(genome) for genome in genomes]
        prefixes = [block_signatures(self.supernet.family, plan) for plan in plans]
        held = HiddenStates(self.memory_bytes, prefixes)
        for index in _depth_first(prefixes, genomes).tolist():
            held.forget(prefixes[index])
            yield index, self._evaluation(genomes[index], plans[index], prefixes[index], held)
            held.drop_unused()

    def _evaluation(self, genome: np.ndarray, plan: Plan, prefix: Prefix, held: HiddenStates) -> Evaluation:
        if not held.nbytes and not held.coming[prefix[:1]]:
            return self._plainly(genome, plan)
        renamed = renaming(self.supernet.family, plan)
        paths = [renamed(block.path) for block in plan.blocks]
        lost, used = [], []

        def quality(view: nn.Module) -> Any:
            run = _SharedRun(view, [view.get_submodule(path) for path in paths], prefix, held)
            try:
                return self.quality(view)
            finally:
                run.end()
                lost.append(run.lost)
                used.append(run.used)

        found = evaluate(self.supernet, genome, quality, plan)
        # What failed before it did anything with the view would fail again.
        if any(lost) or (found.failed is not None and any(used)):
            if found.failed is not None:
                held.clear()  # what is held may be the memory that was lacking
            return self._plainly(genome, plan)
        return found

    def _plainly(self, genome: np.ndarray, plan: Plan | None = None) -> Evaluation:
        """Without sharing; where memory is lacking once more, without the weights that are held for others."""
        found = evaluate(self.supernet, genome, self.quality, plan)
        if found.lacked_memory:
            self.supernet.make_room()
            found = evaluate(self.supernet, genome, self.quality, plan)
        return found


class HiddenStates:
    """Outputs of blocks by (what entered the first block, what the blocks are), at most `limit` bytes of them.

    Attributes:
        coming: first blocks -> number of genomes with them that are still to be evaluated.
    """

    def __init__(self, limit: int, prefixes: Iterable[Prefix]):
        self.limit = limit
        self.nbytes = 0
        self.coming = Counter(prefix[:depth] for prefix in prefixes for depth in range(1, len(prefix) + 1))
        self._held: dict[tuple[bytes, Prefix], Tensor] = {}

    def forget(self, prefix: Prefix) -> None:
        """A genome is no longer to come."""
        self.coming.subtract(prefix[:depth] for depth in range(1, len(prefix) + 1))

    def wanted(self, prefix: Prefix, depth: int) -> bool:
        """Whether a genome is coming that has the first `depth` of these blocks, and no more of them."""
        deeper = self.coming[prefix[: depth + 1]] if depth < len(prefix) else 0
        return self.coming[prefix[:depth]] > deeper

    def deepest(self, inputs: bytes, prefix: Prefix) -> int:
        """Number of blocks of `prefix` behind which a hidden state is held, the most there is; 0 where none is."""
        return next((depth for depth in range(len(prefix), 0, -1) if (inputs, prefix[:depth]) in self._held), 0)

    def get(self, inputs: bytes, prefix: Prefix) -> Tensor:
        """A copy, which the model can do with as it likes."""
        return self._held[inputs, prefix].clone()

    def put(self, inputs: bytes, prefix: Prefix, state: Tensor) -> None:
        """Keeps a copy, unless all there is room for is worth more: block runs that it saves."""
        if state.nbytes > self.limit or (inputs, prefix) in self._held:
            return
        while self.nbytes + state.nbytes > self.limit:
            least = min(self._held, key=lambda key: self._worth(key[1]))
            if self._worth(least[1]) >= self._worth(prefix):
                return
            self._drop(least)
        self._held[inputs, prefix] = state.clone()
        self.nbytes += state.nbytes

    def drop_unused(self) -> None:
        """Lets go of what none of the genomes that are coming will use."""
        for key in [key for key in self._held if not self.coming[key[1]]]:
            self._drop(key)

    def clear(self) -> None:
        for key in list(self._held):
            self._drop(key)

    def _worth(self, prefix: Prefix) -> int:
        return self.coming[prefix] * len(prefix)

    def _drop(self, key: tuple[bytes, Prefix]) -> None:
        self.nbytes -= self._held.pop(key).nbytes


@dataclass
class _Call:
    """One call of the model: what identifies it, and how far it has come.

    Attributes:
        digest: over its inputs; that of the first block's as well once it is reached.
        skip: number of blocks that are not run.
        at: number of the block that comes next.
        handed: the hidden state that the last block handed on, as it was then.
    """

    digest: Any
    key: bytes = b""
    skip: int = 0
    at: int = 0
    handed: tuple[Tensor, tuple] | None = None


class _Opaque(Exception):
    """An input whose content cannot be told."""


class _SharedRun:
    """One view while the quality function has it: its blocks run, or hand on what is held."""

    def __init__(self, view: nn.Module, blocks: Sequence[nn.Module], prefix: Prefix, held: HiddenStates):
        self.lost = self.used = False
        self._view, self._prefix, self._held = view, prefix, held
        self._thread = threading.get_ident()
        self._call: _Call | None = None
        self._blocks = blocks
        for at, block in enumerate(blocks):
            block.__class__ = _shared_class(type(block))  # type: ignore[arg-type]
            block.__dict__["_shared"] = (self, at)
        view.register_forward_pre_hook(self._begin, with_kwargs=True)
        view.register_forward_hook(self._finish, always_call=True)
        self._all = list(view.modules())
        self._state = _state(self._all)
        self._watching = _watching()

    def __deepcopy__(self, memo: dict) -> _SharedRun:
        self.used = True
        return self  # a copied view finds that it is not this one's, and runs its blocks

    def __reduce__(self) -> NoReturn:
        self.used = True
        raise TypeError("a view that shares blocks stays in its process")

    def end(self) -> None:
        """What still calls the view from here on runs all of its blocks."""
        self._call = None
        self._thread = 0

    def _begin(self, view: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._call, self.used = None, True
        here = view is self._view and threading.get_ident() == self._thread
        if not here or torch.is_grad_enabled() or torch.compiler.is_compiling() or _watching() != self._watching:
            return
        digest = xxhash.xxh3_128()
        try:
            _feed(digest, [args, kwargs, _autocast(next(view.parameters()).device.type), _attention_kernels()])
        except _Opaque:
            return
        self._call = _Call(digest)

    def _finish(self, view: nn.Module, args: tuple, output: Any) -> Any:
        call, self._call = self._call, None
        if call is None or not call.skip or output is None:
            return None
        self.lost |= call.at < call.skip
        return _without_the_rest(output, _Absent(self))

    def block(self, block: nn.Module, at: int, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the block at this place hands on; `run` is its own forward pass."""
        call = self._call
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        here = block is self._blocks[at] and threading.get_ident() == self._thread
        if call is None or not here or not self._follows(call, at, hidden):
            return run(*args, **kwargs)
        call.at += 1
        if call.at < call.skip:
            output: Any = torch.empty_like(hidden, device="meta")
        elif call.at == call.skip:
            output = self._held.get(call.key, self._prefix[: call.at])
        else:
            output = run(*args, **kwargs)
            if type(output) is not Tensor:
                self._call = None
                return output
            if self._held.wanted(self._prefix, call.at):
                self._held.put(call.key, self._prefix[: call.at], output)
        call.handed = (output, state_of(output))
        return output

    def _follows(self, call: _Call, at: int, hidden: Any) -> bool:
        """Whether all is as in a chain of blocks, one after the other with nothing in between; if not, the call ends
        being shared, and is lost where blocks were skipped."""
        if type(hidden) is Tensor and at == call.at:
            if at == 0 and _state(self._all) == self._state:
                _feed(call.digest, hidden)
                call.key = call.digest.digest()
                call.skip = self._held.deepest(call.key, self._prefix)
                return True
            if call.handed is not None and hidden is call.handed[0] and state_of(hidden) == call.handed[1]:
                return True
        self._call = None
        if call.at < call.skip:
            self.fail()
        return False

    def fail(self) -> NoReturn:
        """What was skipped is needed."""
        self.lost = True
        raise JointoptError("a skipped block was needed")


class _SharedBlock(nn.Module):
    """What a block's class is made a subclass of, so that copies of the block run as themselves."""

    _shared: tuple[_SharedRun, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run, at = self._shared
        return run.block(self, at, super().forward, args, kwargs)


@cache
def _shared_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_SharedBlock, kind), {})


class _Absent:
    """Stands where a skipped block would have left something; whoever looks at it is told so."""

    def __init__(self, run: _SharedRun):
        self._run = run

    def __getattr__(self, name: str) -> NoReturn:
        self._run.fail()

    def _used(self, *_: Any) -> NoReturn:
        self._run.fail()

    __getitem__ = __len__ = __iter__ = __bool__ = __contains__ = _used


def _without_the_rest(output: Any, absent: _Absent) -> Any:
    """A model's output with `absent` for all that is no tensor."""
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name, value in list(output.items()):
            output[name] = _without_the_rest(value, absent)  # type: ignore[index]
        return output
    return absent if type(output) is not tuple else tuple(_without_the_rest(value, absent) for value in output)


def _feed(digest: Any, value: Any) -> None:
    """Adds a value's content to the digest. Raises _Opaque for what is no plain tensor, number, text or a container."""
    if type(value) in (Tensor, nn.Parameter):
        digest.update(repr((value.stride(), value.device)).encode())
        feed(digest, value)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    elif type(value) in (list, tuple, dict):
        digest.update(f"{type(value).__name__} {len(value)};".encode())
        for each in value.items() if isinstance(value, dict) else value:
            _feed(digest, each)
    else:
        raise _Opaque


_SETTINGS = {bool, int, float, str, tuple}
"""Kinds of what a module computes with beside tensors: an epsilon, a scale of attention."""


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _attention_kernels() -> list[bool]:
    """Which of torch's may be chosen from: each has other last bits."""
    allowed = torch.backends.cuda
    fused = allowed.flash_sdp_enabled(), allowed.mem_efficient_sdp_enabled(), allowed.cudnn_sdp_enabled()
    return [*fused, allowed.math_sdp_enabled()]


def _watching() -> list[int]:
    """What sees every operation of torch, and may count it or make another of it: modes, and the profiler."""
    modes = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    return [*modes, torch.autograd._profiler_enabled()]


def _state(modules: Sequence[nn.Module]) -> list[Any]:
    """What a view of these modules computes with: other ones, hooks, modes or values make it another list."""
    found: list[Any] = [len(store) for store in _GLOBAL_HOOKS]
    for module in modules:
        own = module.__dict__
        found += (own["training"], *own["_forward_pre_hooks"], *own["_forward_hooks"])
        found += map(id, own["_modules"].values())
        found += [value for value in own.values() if type(value) in _SETTINGS]
        found.append(id(own.get("forward")))  # one put in place of the class's
        for store in (own["_parameters"], own["_buffers"]):
            for tensor in store.values():
                if tensor is not None:
                    found += state_of(tensor)
    return found


_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)
