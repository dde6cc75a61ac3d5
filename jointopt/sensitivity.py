"""What each choice of each gene would cost in quality, from one pass of gradients over the calibration data.

To second order, the divergence of a changed network's answers from the whole one's is half the change of its logits,
squared in the metric of the Fisher matrix: KL = 1/2 d'Fd (Kunstner et al., arXiv 1905.12558, section 2). A choice
changes the outputs of some layers or blocks. Each change is computed alone, on the inputs that the layer has in the
whole network, with quantized weights and inputs as an evaluation has them; one backward pass says what it does to the
logits. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jointopt.batches import first_samples, on_device, sample_count, without_labels
from jointopt.objectives import COSTS, QUANTITIES, Objective
from jointopt.outputs import MULTI_LABEL, REGRESSION, first_output, logits_of, problem_of
from jointopt.rebuilding.held_cache import cache_name
from jointopt.supernet.genes import precision_genes
from jointopt.supernet.importance import hidden_input
from jointopt.supernet.subnetwork import Plan
from quant.errors import JointoptError
from search_spaces.clones import structural_clone
from search_spaces.family import Branch, branch_keep

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

SAMPLES = 64
"""As many samples are looked at, where there are so many."""

Change = tuple[str, str, Any]
"""What is changed ("block", "branch", "width", "scheme", "cache"), the module's path, what it becomes: a number of
channels, the name of a scheme or of a cache's format."""


@dataclass(frozen=True)
class ForwardRecord:
    """One call of a module in the whole network: its inputs, its output, and how the answers hang on the output.

    Attributes:
        normalized: whether a BatchNorm comes next.
    """

    args: tuple
    kwargs: Mapping[str, Any]
    output: Tensor
    gradient: Tensor
    normalized: bool

    def effect(self, changed: Tensor) -> Tensor:
        """What the output's change to `changed` does to each sample's answer, to first order: [samples].

        BatchNorm's statistics are estimated anew for each sub-network: what it sees keeps its mean and its variance.
        """
        if self.normalized:
            dims = [dim for dim in range(changed.dim()) if dim != 1]
            spread = self.output.std(dims, keepdim=True) / changed.std(dims, keepdim=True).clamp(min=1e-12)
            shift, center = (each.mean(dims, keepdim=True) for each in (changed, self.output))
            changed = (changed - shift) * spread + center
        return (self.gradient.float() * (changed - self.output).float()).flatten(1).sum(1)


def estimated_losses(
    supernet: Supernet, batches: Iterable[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, np.ndarray]:
    """The estimated loss of each choice of each gene against the whole, unquantized model.

    Args:
        supernet: calibrated. It is left as it is.
        batches: dicts of what the model's forward takes, as for `Supernet.calibrate`; the first `SAMPLES` count.
        seed: of the random directions in which the answers are pushed.

    Returns:
        Gene -> array [choices]: the divergence (KL, nats a label) that the choice alone would cause.

    Raises:
        JointoptError: the super-network is not calibrated, there is no batch, or the model has a single output
            and no `config.problem_type`.
    """
    if not supernet.calibrated:
        raise JointoptError("sensitivity: the super-network is not calibrated; call supernet.calibrate(batches) first")
    generator = torch.Generator().manual_seed(seed)
    changes = _changes(supernet)
    become = _becoming(supernet, {change for each in changes.values() for change in each})
    totals, labels = dict.fromkeys(changes, 0.0), 0
    for batch in _first(supernet, batches):
        records, count = _observed(supernet, batch, dict.fromkeys(path for _, path, _ in become), generator)
        labels += count
        with torch.no_grad():
            effects = {change: records[change[1]].effect(new(records[change[1]])) for change, new in become.items()}
        for slot, each in changes.items():
            if each:
                totals[slot] += float(torch.stack([effects[change] for change in each]).sum(0).square().sum()) / 2
    if not labels:
        raise JointoptError("sensitivity: found no batch; allowed: one or more dicts of the model's inputs")
    genes = supernet.space.genes
    return {g.name: np.array([totals[g.name, at] / labels for at in range(len(g.choices))]) for g in genes}


def quality_prior(supernet: Supernet, objectives: Iterable[Objective]) -> dict[str, list[np.ndarray]]:
    """The estimates as `GuidedSearch` takes them for its `prior`, from the calibration's first samples.

    They are of use for what tells quality: metrics known by name, and those of one's own that are to be maximized.

    Raises:
        JointoptError: none of the objectives is such a metric; what `estimated_losses` raises.
    """
    told = telling(objectives)
    estimates = list(estimated_losses(supernet, supernet.samples).values())
    return {objective.name: estimates for objective in told}


def telling(objectives: Iterable[Objective]) -> list[Objective]:
    """Those that tell quality. Raises JointoptError where none does."""
    own = [o for o in objectives if o.compute is None and o.name not in COSTS]
    told = [o for o in own if o.name in QUANTITIES or o.direction == "max"]
    if not told:
        raise JointoptError(
            "warm_start: no objective tells quality; allowed with a known metric, or one to be maximized"
        )
    return told


def _first(supernet: Supernet, batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first samples of the batches, without labels, on the model's device."""
    wanted = SAMPLES
    for batch in batches:
        if wanted <= 0:
            return
        cut = first_samples(without_labels(batch), wanted)
        wanted -= sample_count(cut)
        yield on_device(cut, supernet.device)


def _changes(supernet: Supernet) -> dict[tuple[str, int], list[Change]]:
    """(gene, choice index) -> what that choice changes in the whole model, all other genes at their largest."""
    space, family = supernet.space, supernet.family
    precision = precision_genes(family, space)
    found: dict[tuple[str, int], list[Change]] = {}
    for at, gene in enumerate(space.genes):
        for choice in range(len(gene.choices)):
            genome = space.largest
            genome[at] = choice
            plan = supernet.plan(genome)
            gone = [b for b in family.blocks if b not in plan.blocks and gene.name in (b.stage, b.keep)]
            each: list[Change] = [("block", block.path, None) for block in gone]
            for block in plan.blocks:
                left = [b for b in plan.dropped if b in block.branches and branch_keep(block.name, b.kind) == gene.name]
                each += [("branch", path, None) for branch in left for path in _ends(branch)]
            for width in family.widths:
                if width.gene == gene.name and gene.name in plan.units:
                    units = plan.units[gene.name]
                    each += [("width", part.module, units * part.channels) for part in width.consumers]
            for layer in family.layers:
                if precision.get(layer.path) == gene.name and layer.path in plan.schemes:
                    name = plan.schemes[layer.path].name
                    each += [("scheme", path, name) for path in layer.paths]
            held = [cache.attention for cache in family.caches if cache.name == gene.name]
            each += [("cache", path, plan.caches[path].name) for path in held if path in plan.caches]
            found[gene.name, choice] = each
    return found


def _ends(branch: Branch) -> list[str]:
    """Where a branch joins the residual stream: what stands in for it there adds nothing, or hands the stream on."""
    return [path for path, replacement in branch.replacements.items() if replacement is not nn.Identity]


def _becoming(supernet: Supernet, changes: Iterable[Change]) -> dict[Change, Callable[[ForwardRecord], Tensor]]:
    """Change -> the function that gives the module's output under it."""
    branches = [branch for block in supernet.family.blocks for branch in block.branches]
    replacements = {path: new for branch in branches for path, new in branch.replacements.items()}
    modules = _changed_modules(supernet)
    found: dict[Change, Callable[[ForwardRecord], Tensor]] = {}
    for change in sorted(changes, key=str):
        kind, path, _ = change
        if kind == "block":
            found[change] = _skipped
        elif kind == "branch":
            found[change] = partial(_replaced, replacements[path]())
        elif kind == "width":
            found[change] = partial(_narrowed, modules[change])
        elif kind == "cache":
            found[change] = partial(_reattended, modules[change])
        else:
            found[change] = partial(_called, modules[change])
    return found


def _changed_modules(supernet: Supernet) -> dict[Change, nn.Module]:
    """The layers in their schemes, narrowed, and attention on quantized caches: from one view for all layers in their
    first scheme, one for all in their second, and so on."""
    family, space = supernet.family, supernet.space
    widths = [width for width in family.widths if width.gene in space.names]
    found: dict[Change, nn.Module] = {}
    for plan in _turns(supernet, set(precision_genes(family, space).values())):
        view = supernet.built(Plan(family.blocks, schemes=plan.schemes))
        for layer in family.layers:
            if layer.path in plan.schemes:
                for path in layer.paths:
                    found["scheme", path, plan.schemes[layer.path].name] = view.get_submodule(path)
    for plan in _turns(supernet, {width.gene for width in widths}):
        view = supernet.built(Plan(family.blocks, units=plan.units))
        for width in widths:
            for part in width.consumers if width.gene in plan.units else ():
                found["width", part.module, plan.units[width.gene] * part.channels] = view.get_submodule(part.module)
    for plan in _turns(supernet, {cache.name for cache in family.caches}):
        view = supernet.built(Plan(family.blocks, caches=plan.caches))
        for path, form in plan.caches.items():
            found["cache", path, form.name] = view.get_submodule(path)
    return found


def _turns(supernet: Supernet, genes: Collection[str]) -> Iterator[Plan]:
    """The plan of the largest genome with all of these genes at their first choice, at their second, and so on."""
    space = supernet.space
    chosen = np.array([name in genes for name in space.names])
    for turn in range(int(space.sizes[chosen].max(initial=0))):
        yield supernet.plan(np.where(chosen, np.minimum(turn, space.sizes - 1), space.largest))


def _skipped(record: ForwardRecord) -> Tensor:
    return hidden_input(record.args, record.kwargs)


def _replaced(module: nn.Module, record: ForwardRecord) -> Tensor:
    return first_output(module(*record.args, **record.kwargs)).expand_as(record.output)


def _called(module: nn.Module, record: ForwardRecord) -> Tensor:
    return module(*record.args, **record.kwargs)


def _reattended(attention: nn.Module, record: ForwardRecord) -> Tensor:
    """The output of attention with an empty cache in place of the one that already holds these tokens."""
    return first_output(attention(*record.args, **{**record.kwargs, cache_name(record.kwargs): None}))


def _narrowed(module: nn.Module, record: ForwardRecord) -> Tensor:
    """The output where the layer has lost input channels. Rows that it has lost too stay as they were."""
    whole, dim = hidden_input(record.args, record.kwargs), 1 if isinstance(module, nn.Conv2d) else -1
    new = module(whole.narrow(dim, 0, module.get_parameter("weight").shape[1]))
    lost = record.output.shape[dim] - new.shape[dim]
    return torch.cat([new, record.output.narrow(dim, new.shape[dim], lost)], dim)


def _observed(
    supernet: Supernet, batch: Mapping[str, Any], paths: Iterable[str], generator: torch.Generator
) -> tuple[dict[str, ForwardRecord], int]:
    """Path -> what the module there saw, and how the answers hang on it; and the number of labels of the batch."""
    model = structural_clone(supernet.model).eval()
    calls: dict[str, tuple[tuple, dict, Tensor, Tensor]] = {}
    normalized: set[int] = set()

    def keep(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            tensor = first_output(output)
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            handed = tensor.clone()  # what comes next may work in place
            calls[path] = args, kwargs, tensor, handed
            return (handed, *output[1:]) if isinstance(output, tuple) else handed

        return hook

    with torch.enable_grad():
        for path in paths:
            model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True)
        for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
            norm.register_forward_pre_hook(lambda _, args: normalized.add(id(args[0])))
        score, count = _pushed(logits_of(model, batch), batch, generator, problem_of(model))
        outputs = [tensor for _, _, tensor, _ in calls.values()]
        gradients = torch.autograd.grad(score, outputs, materialize_grads=True)
    records = {
        path: ForwardRecord(args, kwargs, tensor.detach(), gradient, id(handed) in normalized)
        for (path, (args, kwargs, tensor, handed)), gradient in zip(calls.items(), gradients, strict=True)
    }
    return records, count


def _pushed(
    logits: Tensor, batch: Mapping[str, Any], generator: torch.Generator, problem: str | None
) -> tuple[Tensor, int]:
    """A number whose gradient by the logits is random, with their Fisher matrix as its covariance; and how many labels
    it is of, padding left out.

    That is the square root of diag(p) - pp' times random signs, where each class is right or is not that of
    diag(p(1 - p)), and of values that of the identity. Labels sampled from the answers have that covariance too, but
    where a model is sure of its answers hardly a sample of them tells anything.
    """
    if logits.shape[-1] < 2 and problem is None:
        raise JointoptError(
            "sensitivity: the model has a single output; allowed: two classes or more, or a classifier of transformers "
            f"whose config.problem_type is {MULTI_LABEL!r} or {REGRESSION!r}"
        )
    with torch.no_grad():
        push = torch.randint(0, 2, logits.shape, generator=generator).to(logits.device).float() * 2 - 1
        if problem == MULTI_LABEL:
            chances = logits.float().sigmoid()
            push *= (chances * (1 - chances)).sqrt()
        elif problem is None:
            chances = logits.float().softmax(-1)
            push *= chances.sqrt()
            push -= chances * push.sum(-1, keepdim=True)
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != push.shape[:-1]:
            mask = torch.ones_like(push[..., 0])
    return (logits.float() * push * mask[..., None]).sum(), int(mask.sum())
