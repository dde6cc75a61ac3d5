"""The super-network: a pretrained model made elastic and quantizable, in which every sub-network is a view.

space = jointopt.SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16"])
supernet = jointopt.Supernet(model, space)
supernet.calibrate(batches)
with supernet.active(space.sample(1, seed=0)[0]) as small:
    small(**batch)
"""

# What hangs on weights, order and calibration: who sets it, and what forgets it or sets it anew. Whatever writes to
# parameters comes to `weights_changed`, if only by `notice`; `follow` finds that the model has another device or dtype.
#
# trained              weights_changed, load (as saved)     nothing but load
# calibrated           calibrate                            weights_changed, load
# space, leaving       calibrate, unless trained            load, take_shapes
# _measured_constants  calibrate                            load; after weights_changed check_calibrated refuses them
# _repaired            calibrate                            weights_changed, load
# samples, _positions  calibrate                            nothing; take_shapes sets positions anew
# _scaled              calibrate, load (as saved)           weights_changed, so that calibrate scales again
# learned              learn_ranges, load                   load; ranges of inputs: weights_changed but while they train
# _bank, scores        view; search                         weights_changed, calibrate, load, follow
# _costs               whoever asks                         calibrate, load, follow, take_shapes, use_latency

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jointopt.cost.operators import LatencyModel
from jointopt.cost.positions import Positions
from jointopt.cost.tables import CostTables
from jointopt.names import LEARNED_RANGES
from jointopt.supernet.adapters import effective
from jointopt.supernet.batch_norm import (
    Statistics,
    has_batch_norm,
    move,
    reestimate,
    running_statistics,
    shift_by_whole_products,
)
from jointopt.supernet.calibration import calibrate, sort_again
from jointopt.supernet.costs import by_block, original_tables, tables
from jointopt.supernet.genes import check_space, fitted_schemes, plan_of, precision_genes
from jointopt.supernet.model_copy import own_copy, warn_of_what_is_lost
from jointopt.supernet.range_factors import LearnedRanges, learn
from jointopt.supernet.repair import Repaired
from jointopt.supernet.state import fingerprint, follow, load, notice, save, stamp
from jointopt.supernet.subnetwork import (
    MeasuredConstants,
    Plan,
    Source,
    build,
    detach,
    layout,
    renaming,
    staying_layers,
)
from jointopt.supernet.transforms import checked, rotated
from jointopt.supernet.weight_bank import BankedWeight, WeightBank
from quant.calibration import ACTIVATION_METHODS, WEIGHT_METHODS, choose_clip
from quant.errors import JointoptError, check_choice, check_kind, said_of
from quant.formats import Scheme
from quant.kernels import quantize_and_hold
from quant.layers import QuantizedLayer
from quant.learned_ranges import widened
from quant.reference import Clip
from search_spaces.clones import structural_clone
from search_spaces.defaults import default_order, requirements
from search_spaces.families import Declare, declare
from search_spaces.family import own_settings
from search_spaces.space import SearchSpace


class Supernet:
    """A copy of a model, whose sub-networks are views into its weights. The model given is never changed.

    Args:
        model: a model of a known family, or of the one that `family` declares, in float32 or bfloat16.
        space: its search space; genes are matched to the model by their names (`SearchSpace.for_model`).
        family: a declaration of one's own (model -> Family).
        weight_calibration: how the clipping range of quantized weights is chosen: "minmax", "percentile" or "mse".
        repair: whether layers whose inputs are narrowed are fitted to what they computed before, by least squares on
            the calibration's inputs. Their second moments are held while calibrating, the fitted weights afterwards.
        activation_calibration: how the range of static activations is chosen: "minmax", "average", "percentile",
            "mse" or "entropy" (`quant.calibration.ActivationObserver`).
        bank_bytes: memory for fake-quantized weights, codes and scales included; what does not fit is made again.
        transforms: changes of the weights that keep the model's function and make it easier to quantize: any of
            "rotate" (the residual stream; a tied head gets a weight of its own, which counts in every size),
            "rotate_heads", and "smooth" or "awq" (chosen by `calibrate`, which then reads the batches twice).
        latency: what answers for time, energy and memory (`jointopt.Roofline`), which then are costs like any other.

    Attributes:
        own_family: whether the family is a declaration of one's own.
        schemes: (layer's path, choice) -> the scheme as it fits that layer.
        precision_genes: layer's path -> the gene that chooses its scheme.
        leaving: stage -> names of its blocks, in the order in which they leave.
        frozen: names of parameters that needed no gradient before adapters were added.
        samples: batches of the first samples that it was calibrated with.
        learned: factors of the ranges of weights and static inputs, where some were trained.
        scores: canonical genome (its bytes) -> metrics that searches have measured; emptied when the weights or the
            calibration change.

    Raises:
        JointoptError: a model of an unknown family or dtype, a gene or choice that the model does not have, a
            transform that the family does not allow.
    """

    @torch.inference_mode(False)  # its copy may be trained
    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace,
        *,
        family: Declare | None = None,
        weight_calibration: str = "minmax",
        repair: bool = False,
        activation_calibration: str = "mse",
        bank_bytes: int = 4 * 10**9,
        transforms: Sequence[str] = (),
        latency: LatencyModel | None = None,
    ):
        check_kind("model", model, nn.Module, "a torch.nn.Module")
        check_kind("space", space, SearchSpace, "a SearchSpace, such as SearchSpace.for_model(model)")
        check_kind("repair", repair, bool, "True or False")
        if latency is not None and not hasattr(latency, "described"):
            raise JointoptError(f"latency: found {latency!r:.60}; allowed: a model of it, such as Roofline(...)")
        self._given, self._given_stamp = model, stamp(model)
        self._declared, self.own_family = partial(declare, family=family), family is not None
        self.model, self.family = self._declared(own_copy(model))
        self.transforms = checked(transforms, self.family)
        self.model, self.family = rotated(self.model, self.family, self.transforms, self._declared)
        self._scaled = False
        self.space, self.latency = space, latency
        check_choice("weight_calibration", weight_calibration, WEIGHT_METHODS)
        self.weight_calibration = weight_calibration
        self.repair = repair
        check_choice("activation_calibration", activation_calibration, ACTIVATION_METHODS)
        self.activation_calibration = activation_calibration
        self.calibrated = False
        self.trained = False
        self.frozen: set[str] = set()
        self.leaving = default_order(self.family)
        self.precision_genes = precision_genes(self.family, space)
        self.schemes = fitted_schemes(self.model, self.family, space, self.precision_genes)
        check_space(self.model, self.family, space)
        self._bank = WeightBank(bank_bytes)
        self._measured_constants: MeasuredConstants = {}
        self._has_batch_norm = has_batch_norm(self.model)
        self.samples: list[Mapping[str, Any]] = []
        self.samples_digest = ""  # of all that it was calibrated on
        self._repaired: Mapping[tuple[str, int], Repaired] = {}
        self._positions: Positions | None = None
        self.learned: LearnedRanges | None = None
        self.scores: dict[bytes, dict[str, float]] = {}
        self._place = self.device, next(self.model.parameters()).dtype
        self._stamp = stamp(self.model)
        warn_of_what_is_lost(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measures importance and ranges in one pass, and sorts channels, heads and blocks by importance.

        The function of the whole model is unchanged by the sorting. A super-network that was trained is not sorted
        again, since its weights have learned their order. The scales of "smooth" and "awq" are chosen in a pass
        before; once, and again for weights that were trained since.

        Args:
            batches: dicts of what the model's forward takes; some 100 samples do. Tensors are moved to its device.

        Raises:
            JointoptError: there is no batch, or one is not a dict, or the model does not run on it; or, as declared,
                its smallest sub-network does not run, or the whole one, sorted, computes something else.
        """
        calibrate(self, batches)

    def __deepcopy__(self, memo: dict) -> Supernet:
        made = copy.copy(self)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        made._stamp = stamp(made.model)
        return made

    def _condition_space(self) -> None:
        """Which genes matter at which depth follows from the order in which blocks leave."""
        choices = {gene.name: gene.choices for gene in self.space.genes}
        self.space = self.space.replaced(requires=requirements(self.family, choices, self.leaving))

    def plan(self, genome: Any) -> Plan:
        """What a genome says in the family's terms. Raises JointoptError for a genome that is not of the space."""
        self.space.validate(genome)
        chosen = self.space.decode(self.space.canonical(genome))
        return plan_of(self.family, chosen, self.leaving, self.precision_genes, self.schemes)

    @contextmanager
    def active(self, genome: Any) -> Iterator[nn.Module]:
        """The sub-network as a view, in eval mode: no weight is copied, none is quantized that was before."""
        yield self.view(self.plan(genome))

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The model that was given, in eval mode, through a clone that shares its tensors alone: it warns where these
        were changed since, by which sub-networks would be compared with what they are not cut from."""
        found = stamp(self._given)
        if found[0] == self._given_stamp[0] and found != self._given_stamp:
            warnings.warn(
                "original: the model that was given to Supernet(...) has been trained or loaded anew since; "
                "sub-networks are those of its earlier weights",
                RuntimeWarning,
                stacklevel=3,
            )
        half = next(self._given.parameters()).dtype != torch.float32
        # Which mends what `model.to(bfloat16)` rounds though no checkpoint stores it.
        clone = self._declared(self._given)[0] if half else structural_clone(self._given)
        own_settings(clone)
        if next(clone.parameters()).device != self.device:  # a Trainer moved the super-network, not what was given
            clone = copy.deepcopy(clone).to(self.device)
        yield clone.eval()

    def extract(self, genome: Any) -> nn.Module:
        """The sub-network as a model of its own, which shares no tensor with the super-network."""
        return detach(self.view(self.plan(genome)))

    def training_view(self, genome: Any, precision: bool = False) -> nn.Module:
        """The sub-network in training mode: gradients reach the super-network. Of a model in training mode modules that
        are not (BatchNorm whose statistics shall stay) remain as they are.

        Args:
            precision: whether it computes in its number formats (gradients go straight through the rounding, scales
                are chosen from the weights as they are, times what `learn_ranges` learns); else unquantized.
                Unrepaired and with its cache as it was.
        """
        self._catch_up()
        return self.view_to_train(self.plan(genome), precision)

    def view_to_train(self, plan: Plan, precision: bool) -> nn.Module:
        """`training_view` of a plan."""
        follow(self)
        plan = Plan(plan.blocks, plan.dropped, plan.units, plan.schemes if precision else {})
        return build(self._source, plan, training=True)

    def learn_ranges(self) -> None:
        """Adds to the model's parameters, until it is calibrated again, a factor of each range of quantized weights and
        of static inputs, for an optimizer that is made after this to train (LSQ, arXiv 1902.08153).

        Raises:
            JointoptError: it has static formats and was not calibrated.
        """
        learn(self)

    def clip(
        self,
        path: str,
        wanted: Scheme,
        weight: Tensor,
        importance: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Clip | None:
        """The range that a scheme holds of a layer's weight, whole, a slice or changed: the calibration's
        (`quant.calibration.choose_clip`), times what was learned, and `factor`. None where it is all that is there,
        which `quantize` finds while it rounds."""
        assert wanted.weights is not None
        learned = self.learned.factor(path, wanted) if self.learned is not None else None
        factors = [each.detach() for each in (learned, factor) if each is not None]
        if self.weight_calibration == "minmax" and not factors:
            return None
        found = choose_clip(weight, wanted.weights, self.weight_calibration, importance)
        return reduce(widened, factors, found)

    def view(self, plan: Plan) -> nn.Module:
        """What a plan describes, as a view, in eval mode."""
        return self.renormalized(self.built(plan), plan)

    def built(self, plan: Plan) -> nn.Module:
        """`view` with BatchNorm statistics that are slices of the whole model's."""
        self._catch_up()
        self.check_calibrated(plan)
        return build(self._source, plan)

    @property
    def _source(self) -> Source:
        return Source(self.model, self.family, self._banked, self._constants, self._repaired, self.learned)

    def _catch_up(self) -> None:
        """With what someone may have done to the model since the last view."""
        follow(self)
        notice(self)
        if self.trained and not self.calibrated:
            self._bank.clear()  # an optimizer may have made a step since, even where nothing tells of it

    def check_calibrated(self, plan: Plan) -> None:
        """Raises JointoptError where a sub-network needs what calibration measured, and weights were trained since."""
        if self.calibrated or not self.trained:
            return
        if self.repair and plan.units:
            raise JointoptError(
                "repair: weights were trained since layers were fitted; call supernet.calibrate(batches) again"
            )
        needing = [(path, form.name) for path, form in plan.caches.items()]
        for layer in staying_layers(self.family, plan):
            if layer.path in plan.schemes:
                needing += [(path, plan.schemes[layer.path].name) for path in layer.paths]
        for path, name in needing:
            if self._constants(path, name) is self._measured_constants.get((path, name)):
                raise JointoptError(
                    f"{path}: weights were trained since the ranges of {name} were measured; call "
                    "supernet.calibrate(batches) again"
                )

    def renormalized(self, shell: nn.Module, plan: Plan) -> nn.Module:
        """The view of a plan, its BatchNorm statistics (where it has some) estimated on calibration's first batches."""
        if self._has_batch_norm and not plan.whole(self.family):
            if not self.samples:
                raise JointoptError(
                    "BatchNorm's statistics are estimated for each sub-network; call calibrate(batches) first"
                )
            reestimate(shell, self.samples)
            if not plan.cut(self.family):
                move(shell, running_statistics(self.model), self._whole_statistics)
            self.with_whole_shifts(shell, plan)
        return shell

    def with_whole_shifts(self, shell: nn.Module, plan: Plan) -> nn.Module:
        """The view of a plan, what normalizations add after its static integer layers as integer kernels add it."""
        renamed = renaming(self.family, plan)
        for layer in staying_layers(self.family, plan):
            if layer.norm is not None and layer.path in plan.schemes:
                module, norm = (shell.get_submodule(renamed(each)) for each in (layer.path, layer.norm))
                if isinstance(module, QuantizedLayer):  # finishing does one after the other
                    shift_by_whole_products(module, norm)
        return shell

    @cached_property
    def _whole_statistics(self) -> Statistics:
        """BatchNorm's, of the whole unquantized model, on the samples from which a sub-network's are estimated."""
        shell = structural_clone(self.model).eval()
        reestimate(shell, self.samples)
        return running_statistics(shell)

    def constants(self, path: str, wanted: Scheme) -> Mapping[str, Tensor]:
        """The constants of a layer's static activation format, by the layer's attributes; {} where it has none.

        Raises:
            JointoptError: they were not calibrated.
        """
        static = wanted.needs_constants and not isinstance(self.model.get_submodule(path), nn.Embedding)
        if static and (path, wanted.name) not in self._measured_constants:
            raise JointoptError(f"{path}: {wanted.name} needs ranges of activations; call calibrate(batches) first")
        return self._constants(path, wanted.name)

    def _constants(self, path: str, name: str) -> Mapping[str, Tensor]:
        """Of a static format of a layer's inputs or of a cache's keys: learned, else calibrated, else {}."""
        trained = self.learned.constants(path, name) if self.learned is not None else None
        return trained or self._measured_constants.get((path, name), {})

    def _banked(self, path: str, wanted: Scheme, channels: int | None) -> BankedWeight:
        form = wanted.weights
        assert form is not None
        fitted = self._repaired.get((path, channels)) if channels is not None else None
        sliced = channels if form.granularity == "channel" or fitted else None

        def make() -> BankedWeight:
            self.constants(path, wanted)
            layer = self.model.get_submodule(path)
            weight = fitted[0] if fitted else effective(layer).detach()
            part = weight[:, :sliced].contiguous()
            with said_of(path):
                return BankedWeight(*quantize_and_hold(part, form, self.clip(path, wanted, part)))

        return self._bank.get(path, wanted, sliced, make)

    @cached_property
    def _costs(self) -> CostTables:
        return self.costs_by(self.latency)

    def costs_by(self, latency: LatencyModel | None) -> CostTables:
        """The tables of costs, with times, energies and memory by another model of latency than its own."""
        return tables(self, latency)

    def use_latency(self, latency: LatencyModel) -> None:
        """Has another model of latency answer from now on."""
        self.latency = latency
        self.__dict__.pop("_costs", None)

    def costs(self, genome: Any) -> dict[str, int | float]:
        """`parameters`, `size` in bytes, `macs` and `bops` of one genome, from shapes alone; where there is a model of
        latency also `latency` in seconds and `energy` in joules of its batch, and `peak_memory` in bytes; of language
        models `decode_latency` and `decode_energy` of one more token of each sequence.

        MACs are those of one calibration sample, of average length where it is a text (before calibration: of the
        family's example), counted in linear layers, convolutions and attention products. BOPs are MACs x weight bits x
        activation bits.
        """
        return {name: values[0].item() for name, values in self.cost_columns(self.space.one(genome)[None]).items()}

    def original_costs(self, latency: LatencyModel | None = None) -> dict[str, int | float]:
        """`costs` of the whole, unquantized model, by another model of latency than its own where one is given."""
        whole = original_tables(self, latency or self.latency)
        return {name: values[0].item() for name, values in whole.columns(whole.space.smallest).items()}

    def breakdown(self, genome: Any) -> list[dict[str, Any]]:
        """What each operator of a genome's sub-network takes: its module's "path", "kind" and "block", and its part of
        every cost. Paths are those of the super-network."""
        return by_block(self._costs.breakdown(self.space.canonical(self.space.one(genome))), self.family)

    def original_breakdown(self) -> list[dict[str, Any]]:
        """`breakdown` of the whole, unquantized model."""
        whole = original_tables(self, self.latency)
        return by_block(whole.breakdown(whole.space.smallest), whole.family)

    def cost_columns(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """`costs` of many genomes at once: name -> one value a row of `genomes`."""
        self.space.validate(genomes)
        follow(self)
        return self._costs.columns(self.space.canonical(genomes))

    def shapes(self) -> dict[str, Any]:
        """What costs depend on beside model and space, for a study to keep: `take_shapes` gives it to another."""
        positions = self._costs.positions
        return {"leaving": self.leaving, "positions": dict(positions.of), "once": sorted(positions.once)}

    def take_shapes(self, record: Mapping[str, Any]) -> None:
        """Orders blocks, and counts positions, as the super-network that gave the record."""
        self.leaving = dict(record["leaving"])
        self._positions = Positions(dict(record["positions"]), frozenset(record.get("once", ())))
        self._condition_space()
        self.__dict__.pop("_costs", None)

    def layout(self, genome: Any) -> list[dict[str, Any]]:
        """What the layers of a genome's sub-network are: see `jointopt.supernet.subnetwork.layout`."""
        plan = self.plan(genome)
        return layout(self.built(plan), self.family, plan)

    def original_layout(self) -> list[dict[str, Any]]:
        """`layout` of the whole, unquantized model."""
        return layout(self.model, self.family, Plan(self.family.blocks))

    def weights_changed(self) -> None:
        """What was measured on the old ones no longer holds. Calibrate it again, which keeps the order that the weights
        have learned, and ranges of inputs that were learned with them.

        It is found out by itself where parameters were written to in place, as optimizers and `load_state_dict` do; to
        be called where their `.data` was.
        """
        if self.learned is not None and LEARNED_RANGES not in self.model._parameters:
            self.learned.forget_inputs()
        self.trained, self.calibrated, self._scaled = True, False, False
        self._repaired = {}
        self._forget("_whole_statistics")

    def _forget(self, *names: str) -> None:
        """Drops what was made from weights, order or calibration that are no longer there."""
        self.scores.clear()
        self._bank.clear()
        for name in names or ("_costs", "_whole_statistics"):
            self.__dict__.pop(name, None)

    def make_room(self) -> None:
        """Lets go of quantized weights, which are made again when they are needed."""
        self._bank.make_room()

    def sort_again(self, batches: Iterable[Mapping[str, Any]], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Sorts channels and heads of a super-network in training by their importance now. The function of the whole
        model is unchanged, and so is the optimizer's next step: what it keeps of a parameter is sorted likewise.

        Blocks keep their order, from which the conditions of the space follow. Calibrate it again afterwards.

        Raises:
            JointoptError: there is no batch, or one is not a dict.
        """
        sort_again(self, batches, optimizer)

    def fingerprint(self) -> str:
        """A digest of weights, order, space, and how and on what they were calibrated: equal for super-networks with
        equal sub-networks, wherever their ranges were summed up."""
        return fingerprint(self)

    def save(self, path: str | Path) -> None:
        """Writes weights and order, to be loaded into a super-network of the same model and space."""
        save(self, path)

    def load(self, path: str | Path) -> None:
        """Restores what `save` wrote; calibrate afterwards, which then keeps the order. What is refused changes
        nothing."""
        load(self, path)
