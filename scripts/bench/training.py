"""What super-network training is worth: the same steps spent in different ways, then the same search.

    python scripts/assets.py assets digits minilm movies smollm2 text
    python scripts/bench/training.py --assets assets --cases digits_vit digits_resnet --json training.json
    python scripts/bench/training.py --assets assets --cases minilm smollm2
    python scripts/bench/training.py --assets assets --cases digits_vit digits_resnet --seeds 10

Arms: "plain" fine-tunes the whole model and cuts it afterwards; "repaired" is the same with least-squares repair;
"sandwich" trains sub-networks on the task; "distilled" has them learn from the largest; "precision" has them compute in
their number formats from half of the steps on; "learned" trains the ranges of these as well. "finished" trains points
of the front of "precision" alone; "finished, learned" with their ranges. Losses are
those of the smallest, a middle and the largest sub-network, unquantized, on data that is not trained on; hypervolume is
that of a guided search over loss and size, as a share of the box between the whole model's size and the loss of
knowing nothing (of a language model: of twice the perplexity).

Also: three points of the front of "distilled" trained alone from the same start for the same steps, and what a
super-network step takes over the forward and backward passes that it consists of.

With --seeds every arm but the repaired is trained that often, in other orders of the data and with other sub-networks
sampled, and what is told are the means of the losses and accuracies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import networks
import numpy as np
import torch
from measures import Measures, command_line
from networks import SCHEMES, Network
from rich.console import Console

import jointopt
from jointopt import Recipe, SearchSpace, Supernet
from jointopt.batches import Batch, without_labels
from jointopt.evaluation.evaluation import Quality
from jointopt.objectives import hypervolume
from jointopt.outputs import logits_of
from jointopt.timing.timers import in_turns
from jointopt.training.elastic import gradients_of
from jointopt.training.loop import endless, schedule
from jointopt.training.recipe import TaskLoss
from jointopt.training.sampling import Sandwich, Uniform, step_seed
from search_spaces.precision import is_precision

STEPS = {"digits_vit": 240, "digits_resnet": 240, "minilm": 400, "smollm2": 24}
ARMS = {
    "plain": Recipe(Uniform(0)),
    "sandwich": Recipe(distillation=None),
    "distilled": Recipe(),
    "precision": Recipe(precision_from=0.5),
    "learned": Recipe(precision_from=0.5, learned_ranges=True),
}


@dataclass(frozen=True)
class Case:
    """A model with its data, and the loss that is the end of the box."""

    name: str
    network: Network
    model: torch.nn.Module
    space: SearchSpace
    inputs: list[Batch]
    train: Callable[[int], Any]
    quality: Quality
    steps: int
    worst: float


def case(name: str, arguments: argparse.Namespace, seed: int = 0) -> Case:
    network = networks.networks(arguments.assets)[name]
    loaded = networks.start(network, arguments.assets, arguments.work)
    samples = loaded.samples(network.train)
    quality = loaded.quality(loaded.batches(network.evaluate, 50))
    worst = float(np.log(getattr(loaded.model.config, "num_labels", 2)))
    if network.task == "causal-lm":
        worst = quality(loaded.model)["loss"] + float(np.log(2))
    return Case(
        name,
        network,
        loaded.model,
        SearchSpace.for_model(loaded.model, schemes=SCHEMES, **network.space),
        loaded.inputs(network.calibrate, 50),
        lambda epoch: samples.epoch(epoch, network.batch_size, seed),
        quality,
        arguments.steps or STEPS[name],
        worst,
    )


def trained(made: Case, recipe: Recipe, repair: bool = False) -> Supernet:
    supernet = Supernet(made.model, made.space, repair=repair)
    supernet.calibrate(made.inputs)
    learning_rate = made.network.learning_rate
    jointopt.train_supernet(supernet, made.train, made.steps, recipe=recipe, learning_rate=learning_rate)
    supernet.calibrate(made.inputs)
    return supernet


def losses(made: Case, supernet: Supernet) -> dict[str, float]:
    """Of the smallest, a middle and the largest sub-network, in no number format."""
    space = supernet.space
    found = {}
    for name, genome in {
        "smallest": space.smallest,
        "middle": space.middle,
        "largest": space.largest,
    }.items():
        plain = [
            gene.choices.index("none") if is_precision(gene.name) and "none" in gene.choices else at
            for gene, at in zip(space.genes, genome, strict=True)
        ]
        with supernet.active(space.canonical(np.array(plain))) as view:
            measured = made.quality(view)
            found[f"loss, {name}"] = measured["loss"]
            if "accuracy" in measured and made.network.task != "causal-lm":
                found[f"accuracy, {name}"] = measured["accuracy"]
    return found


def searched(made: Case, supernet: Supernet, evaluations: int) -> tuple[jointopt.Study, float]:
    study = jointopt.search(supernet, made.quality, ["loss", "size"], evaluations=evaluations, seed=0)
    whole = supernet.original_costs()["size"]
    front = study.front()[["loss", "size"]].to_numpy(dtype=float)
    return study, hypervolume(front, [made.worst, whole]) / (made.worst * whole)


def alone(made: Case, genome: np.ndarray) -> float:
    """The loss of a genome whose architecture was trained by itself, from the same start, for as many steps."""
    supernet = Supernet(made.model, made.space)
    supernet.calibrate(made.inputs)
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=made.network.learning_rate, weight_decay=0.01)
    for step, batch in zip(range(made.steps), endless(made.train, 0, 0), strict=False):
        inputs = without_labels(batch)
        optimizer.zero_grad(set_to_none=True)
        TaskLoss()(logits_of(supernet.training_view(genome), inputs), batch).backward()
        torch.nn.utils.clip_grad_norm_(supernet.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = made.network.learning_rate * schedule(step, made.steps)
        optimizer.step()
    supernet.weights_changed()
    supernet.calibrate(made.inputs)
    with supernet.active(genome) as view:
        return made.quality(view)["loss"]


def overhead(made: Case, rounds: int = 15) -> float:
    """Time of a super-network step's gradients over that of the passes of the same models, each by itself."""
    supernet = Supernet(made.model, made.space)
    supernet.calibrate(made.inputs)
    batch = next(iter(made.train(0)))
    inputs = without_labels(batch)
    genomes = [supernet.space.largest, *Sandwich().genomes(supernet.space, 0.0, step_seed(0, 0))]
    models = []
    for genome in genomes:
        models.append(supernet.extract(genome if len(models) else supernet.space.largest).train())
        for parameter in models[-1].parameters():
            parameter.requires_grad_(True)
    supernet.model.train()

    def passes() -> None:
        for model in models:
            model.zero_grad(set_to_none=True)
            TaskLoss()(logits_of(model, inputs), batch).backward()

    alone, step = in_turns([passes, lambda: gradients_of(supernet, batch, 0, 0.0, Recipe())], rounds)
    return step / alone


def rows_of(made: Case, arguments: argparse.Namespace, tell: Callable[[str, str, float, Any, str], None]) -> None:
    kept: dict[str, tuple[Supernet, jointopt.Study]] = {}
    plain = None
    for arm, repair in (("plain", False), ("repaired", True), ("sandwich", False), ("distilled", False),
                        ("precision", False), ("learned", False)):  # fmt: skip
        supernet = trained(made, ARMS.get(arm, ARMS["plain"]), repair)
        for name, value in losses(made, supernet).items():
            limit = plain - 0.005 if plain is not None and name == "accuracy, largest" else None
            tell(arm, name, value, limit, "lower" if name.startswith("loss") else "higher")
            if arm == "plain" and name == "accuracy, largest":
                plain = value
        study, share = searched(made, supernet, arguments.evaluations)
        if arm in ("distilled", "precision"):
            kept[arm] = (supernet, study)
        tell(arm, "hypervolume", share, None, "higher")
    supernet, study = kept["precision"]
    for learned_ranges in (False, True):
        finished(made, supernet, study, tell, learned_ranges)
    supernet, study = kept["distilled"]
    front = study.front().sort_values("size")
    for at in sorted({0, len(front) // 2, len(front) - 1}):
        genome, own = np.array(front["genome"].iloc[at]), float(front["loss"].iloc[at])
        size = front["size"].iloc[at] / 1e6
        tell("alone", f"loss of {size:.3g} MB, super-network's over its own", own - alone(made, genome), 0.0, "lower")


def rows_of_seeds(name: str, arguments: argparse.Namespace, tell: Callable) -> None:
    """Means over the seeds, and how far the largest is from plain fine-tuning's."""
    plain = None
    for arm, recipe in ARMS.items():
        found = []
        for seed in range(arguments.seeds):
            made = case(name, arguments, seed)
            found.append(losses(made, trained(made, replace(recipe, seed=seed))))
        for measure in found[0]:
            mean = statistics.fmean(each[measure] for each in found)
            largest = measure == "accuracy, largest"
            aim = plain - 0.005 if plain is not None and largest else None
            tell(
                arm, f"{measure}, mean of {len(found)}", mean, aim, "lower" if measure.startswith("loss") else "higher"
            )
            if arm == "plain" and largest:
                plain = mean


def finished(made: Case, supernet: Supernet, study: jointopt.Study, tell: Callable, learned_ranges: bool) -> None:
    """Some points of the front, each trained alone: the hypervolume with what was better."""
    arm = "finished, learned" if learned_ranges else "finished"
    front = study.front().sort_values("size")
    points = front[["loss", "size"]].to_numpy(dtype=float, copy=True)
    started = time.perf_counter()
    for at in range(0, len(front), max(1, len(front) // 4)):
        genome = np.array(front["genome"].iloc[at])
        made_so = jointopt.finish(
            supernet, genome, made.train, quality=made.quality, steps=made.steps,
            learning_rate=made.network.learning_rate / 5, learned_ranges=learned_ranges,
        )  # fmt: skip
        assert made_so.metrics is not None
        tell(arm, f"loss of {points[at, 1] / 1e6:.3g} MB (was {points[at, 0]:.4g})", made_so.metrics["loss"],
             float(points[at, 0]), "lower")  # fmt: skip
        points[at, 0] = min(points[at, 0], made_so.metrics["loss"])
    whole = supernet.original_costs()["size"]
    tell(arm, "hypervolume", hypervolume(points, [made.worst, whole]) / (made.worst * whole), None, "higher")
    tell(arm, "seconds", time.perf_counter() - started, None, "lower")


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/training")
    parser.add_argument("--cases", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, help=f"of every arm (default: {STEPS})")
    parser.add_argument("--evaluations", type=int, default=40, help="of each search")
    parser.add_argument("--seeds", type=int, help="only losses and accuracies of every arm, means of so many trainings")
    parser.add_argument("--overhead", action="store_true", help="only the price of a step; on a quiet machine")
    arguments = parser.parse_args()
    measures = Measures(arguments.json)
    for name in arguments.cases:

        def tell(arm: str, measure: str, value: float, aim: float | None, better: str, name: str = name) -> None:
            measures.tell(f"{name}, {arm}", measure, value, aim, better)

        if arguments.overhead:
            tell("distilled", "step over its passes", overhead(case(name, arguments)), 1.05, "lower")
        elif arguments.seeds:
            rows_of_seeds(name, arguments, tell)
        else:
            rows_of(case(name, arguments), arguments, tell)
    Console().print(measures.table())


if __name__ == "__main__":
    main()
