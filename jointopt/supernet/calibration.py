"""The one pass over the user's samples that a super-network's importance, order, ranges and repairs come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from jointopt.arithmetic import own_arithmetic
from jointopt.batches import (
    check_batch,
    first_samples,
    lengths,
    none_alone,
    of_average_length,
    on_device,
    sample_count,
    without_labels,
)
from jointopt.cost.positions import Positions, measure_positions
from jointopt.digests import feed_value
from jointopt.supernet.batch_norm import SAMPLES
from jointopt.supernet.importance import CalibrationPass, check_sortable, sort_width, sort_widths, trains_others
from jointopt.supernet.range_factors import settle
from jointopt.supernet.ranges import Ranges
from jointopt.supernet.repair import Repairs
from jointopt.supernet.state import stamp
from jointopt.supernet.subnetwork import Plan
from jointopt.supernet.transforms import reread, scale_links
from quant.errors import DOES_NOT_RUN, JointoptError, in_one_line, named_line
from search_spaces.clones import structural_clone, without_autocast, without_chunks
from search_spaces.family import has_module

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

LARGEST_MOVE = 0.01
"""Of the output's norm; sums in another order move it by some 1e-6 in float32."""


@torch.inference_mode(False)  # what is kept of it is trained
@own_arithmetic()
def calibrate(supernet: Supernet, batches: Iterable[Mapping[str, Any]]) -> None:
    """`Supernet.calibrate`."""
    if supernet.device.type == "meta":
        raise JointoptError("calibrate: the model is on the meta device, without weights; allowed: a loaded model")
    if not isinstance(batches, Iterable):
        raise JointoptError(f"calibrate: found a {type(batches).__name__}; allowed: batches, dicts of model inputs")
    with _own_changes(supernet):
        settle(supernet)
        _scale(supernet, batches)
        _measure(supernet, batches)
    supernet.calibrated, supernet._stamp = True, stamp(supernet.model)


def _measure(supernet: Supernet, batches: Iterable[Mapping[str, Any]]) -> None:
    """The pass, and what follows from it. What is refused leaves all as an earlier calibration made it."""
    ranges = Ranges(supernet.model, supernet.family, supernet.space, supernet.schemes, supernet.activation_calibration)
    repairs = Repairs(supernet.model, supernet.family, supernet.space if supernet.repair else None)
    listeners = ranges.listeners() + repairs.listeners()
    calibration = CalibrationPass(supernet.model, supernet.family, listeners, ranges.keys)
    kept: list[Mapping[str, Any]] = []
    tokens: list[int] = []
    digest = xxhash.xxh3_128()
    count = calibration.run(_measured(_checked(supernet, batches, kept), tokens, digest))
    if not count:
        raise JointoptError("calibrate: found no batch; allowed: one or more dicts of the model's inputs")
    if supernet._has_batch_norm and sum(map(sample_count, kept)) == 1:
        raise JointoptError("calibrate: found one sample; allowed: two or more, of which BatchNorm's statistics are")
    average = of_average_length(kept[0], tokens)
    positions = _positions(supernet, average)
    before = _answer(structural_clone(supernet.model), kept[0]) if supernet.own_family else None
    with _sorted(supernet, calibration, ranges, repairs):
        _check_called(supernet, positions, average)
        constants, repaired = ranges.constants(), repairs.solved()
        _ran(supernet, "smallest", supernet.plan(supernet.space.smallest), kept[0])
        if before is not None:
            _check_whole(supernet, kept[0], before)
    supernet._positions, supernet._measured_constants, supernet._repaired = positions, constants, repaired
    supernet.samples = none_alone(kept) if supernet._has_batch_norm else kept
    supernet.samples_digest = digest.hexdigest()
    supernet._forget()


def _positions(supernet: Supernet, batch: Mapping[str, Any]) -> Positions:
    """Those of a batch that the calibration ran on, or of its texts in their average length."""
    try:
        return measure_positions(supernet.model, batch)
    except DOES_NOT_RUN as error:
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in batch.items() if isinstance(each, Tensor))
        raise JointoptError(
            f"calibrate: the model does not run on texts of average length, by which costs are counted, {shapes}: "
            f"{in_one_line(error)}; allowed: inputs with one entry a token in their second dimension, or none"
        ) from error


def _check_called(supernet: Supernet, positions: Positions, batch: Mapping[str, Any]) -> None:
    """Raises JointoptError where the forward pass reads the weight of a layer, to which the space offers formats, and
    never calls it as a module. One that it does not read either, as an expert to which no token goes, is left alone."""
    offered = [layer for layer in supernet.family.layers if layer.path in supernet.precision_genes]
    layers = {path: supernet.model.get_submodule(path) for layer in offered for path in layer.paths}
    silent = [p for p, each in layers.items() if p not in positions.of and isinstance(each, nn.Linear | nn.Conv2d)]
    if silent and _depends(supernet.model, silent, batch):
        path = next((path for path in silent if _depends(supernet.model, [path], batch)), silent[0])
        raise JointoptError(
            f"{path}: the forward pass reads its weight and never calls it as a module, so that its inputs are not "
            "seen and its products not counted; allowed: layer(x) in place of F.linear(x, layer.weight) or "
            "layer.forward(x), or leave the layer out of the declaration"
        )


def _depends(model: nn.Module, paths: Iterable[str], batch: Mapping[str, Any]) -> bool:
    """Whether NaN in the weights of these layers comes to be in what the model returns."""
    found = []
    for changed in ((), paths):
        shell = without_chunks(structural_clone(model))
        for path in changed:
            layer = shell.get_submodule(path)
            unknown = torch.full_like(layer.get_parameter("weight"), math.nan)
            layer._parameters["weight"] = nn.Parameter(unknown, requires_grad=False)
        try:
            answer = _answer(shell, batch)
        except DOES_NOT_RUN:
            return True  # which it did without NaN
        found.append(0 if answer is None else int(answer.isnan().sum()))
    return found[1] > found[0]


@contextmanager
def _own_changes(supernet: Supernet) -> Iterator[None]:
    """What is written to the weights within is not taken for training, even where it is refused half-way."""
    noticed = supernet._stamp == stamp(supernet.model)
    try:
        yield
    finally:
        if noticed:
            supernet._stamp = stamp(supernet.model)


def _answer(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor of what a model returns in eval mode."""
    with torch.no_grad():
        output = without_autocast(model).eval()(**batch)
    given = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    return next((each for each in given if isinstance(each, Tensor) and each.is_floating_point()), None)


def _check_whole(supernet: Supernet, batch: Mapping[str, Any], before: Tensor) -> None:
    """Raises JointoptError where the whole sub-network, sorted, does not compute what the model did."""
    after = _ran(supernet, "whole", Plan(supernet.family.blocks), batch)
    moved = math.inf
    if after is not None and after.shape == before.shape:
        moved = float((after - before).norm() / before.norm())
    if moved > max(LARGEST_MOVE, torch.finfo(before.dtype).eps ** 0.5):
        raise JointoptError(
            f"{supernet.family.name}: with its widths sorted by importance the whole model computes something else, "
            f"{moved:.1%} away; allowed: widths that name all that carries them, the channels of a unit in a row, and "
            "a configure that changes nothing where all blocks stay"
        )


def _ran(supernet: Supernet, which: str, plan: Plan, batch: Mapping[str, Any]) -> Tensor | None:
    """The `_answer` of an unquantized sub-network. Raises JointoptError where a declaration does not say all that a
    width runs through, so that cut layers do not fit into each other, or says that blocks may leave for which the
    model's forward pass asks."""
    view = supernet.view_to_train(plan, False)
    try:
        with _by_itself(supernet, which):
            return _answer(view, batch)
    except JointoptError:
        raise
    except DOES_NOT_RUN as error:
        told = named_line(error)
        raise JointoptError(
            f"{supernet.family.name}: the {which} sub-network does not run: {told}; allowed: a declaration whose "
            "widths name all that carries them, and whose removable blocks are run by a loop over their list, none by "
            "its index or name"
        ) from error


@contextmanager
def _by_itself(supernet: Supernet, which: str) -> Iterator[None]:
    """Raises JointoptError where a sub-network runs a declared module of a model that it was cloned from."""
    family, run = supernet.family, []
    paths = {layer.path for layer in family.layers} | {block.path for block in family.blocks}
    paths |= {part.module for width in family.widths for part in (*width.producers, *width.consumers)}
    models = (supernet.model, supernet._given)
    originals = {id(model.get_submodule(path)): path for model in models for path in paths if has_module(model, path)}

    def see(module: nn.Module, args: tuple) -> None:
        if id(module) in originals:
            run.append(originals[id(module)])

    with register_module_forward_pre_hook(see):
        try:
            yield
        except DOES_NOT_RUN:
            if not run:  # else this is why
                raise
    if run:
        raise JointoptError(
            f"{family.name}: the {which} sub-network does not run its own {run[0]}, but that of the model from which "
            "it is cut; allowed: a forward pass that reaches its modules by attributes, lists, tuples, dicts and sets, "
            "none by a function or an object that holds them"
        )


@own_arithmetic()
def sort_again(
    supernet: Supernet, batches: Iterable[Mapping[str, Any]], optimizer: torch.optim.Optimizer | None
) -> None:
    """`Supernet.sort_again`."""
    if optimizer is not None:
        if trains_others(optimizer, supernet.model):
            raise JointoptError(
                "sort_again: found an optimizer of other parameters; allowed: of supernet.model.parameters()"
            )
        check_sortable(optimizer)
    calibration = CalibrationPass(supernet.model, supernet.family)
    if not calibration.run(_checked(supernet, batches, [])):
        raise JointoptError("sort_again: found no batch; allowed: one or more dicts of the model's inputs")
    sort_widths(supernet.model, supernet.family, calibration, optimizer.state if optimizer is not None else {})
    supernet.weights_changed()


def _scale(supernet: Supernet, batches: Iterable[Mapping[str, Any]]) -> None:
    wanted = [name for name in supernet.transforms if name in ("smooth", "awq")]
    if not wanted or supernet._scaled:
        return
    reread(batches, wanted)
    scale_links(supernet.model, supernet.family, wanted[0], _checked(supernet, batches, []), supernet.schemes)
    supernet._scaled = True


def _checked(supernet: Supernet, batches: Iterable[Any], kept: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches on the model's device; the first samples of them are kept as well."""
    wanted = SAMPLES
    for batch in batches:
        check_batch("calibrate", batch)
        moved = on_device(batch, supernet.device)
        if not sample_count(moved):
            raise JointoptError(
                "calibrate: found a batch without samples; allowed: dicts of the model's inputs, tensors among them"
            )
        if (found := lengths(moved)) and not any(found):
            raise JointoptError("calibrate: found a batch of padding alone; allowed: some tokens in each, by its mask")
        if wanted > 0:
            kept.append(first_samples(moved, SAMPLES))
            wanted -= sample_count(moved)
        yield moved


def _measured(batches: Iterable[Mapping[str, Any]], found: list[int], digest: Any) -> Iterator[Mapping[str, Any]]:
    """The batches; the lengths of their samples are put down, and what the model takes fed to a digest of xxhash."""
    for batch in batches:
        found += lengths(batch)
        feed_value(digest, without_labels(batch))
        yield batch


@contextmanager
def _sorted(supernet: Supernet, calibration: CalibrationPass, ranges: Ranges, repairs: Repairs) -> Iterator[None]:
    """Widths and blocks by their importance, unless weights have learned their order; in the order in which they were
    where what follows is refused."""
    if supernet.trained:
        yield
        return
    leaving, space, influence = supernet.leaving, supernet.space, calibration.influence
    orders = sort_widths(supernet.model, supernet.family, calibration)
    try:
        for width, order in orders:
            ranges.reorder(width, order)
            repairs.reorder(width, order)
        supernet.leaving = {
            stage: sorted(names, key=lambda name: influence.get(name, 0.0)) for stage, names in leaving.items()
        }
        supernet._condition_space()
        yield
    except BaseException:
        for width, order in reversed(orders):
            sort_width(supernet.model, width, order.argsort())
        supernet.leaving, supernet.space = leaving, space
        raise
