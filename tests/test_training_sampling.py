"""What a step samples: each strategy's genomes, and that they are the same for the same step."""

from __future__ import annotations

import numpy as np
import pytest

from jointopt import Gene, SearchSpace
from jointopt.training.sampling import SAMPLERS, Attentive, Progressive, Sandwich, Uniform
from jointopt.training.sampling.attentive import beyond_limits
from tests.test_training import calibrated


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_strategy_samples_the_same_for_the_same_step_and_others_for_another(name):
    supernet = calibrated("vit")
    options = {"region": lambda genomes: np.zeros(len(genomes))} if name == "attentive" else {}
    strategy = SAMPLERS[name](count=3, **options)
    first, again, other = (np.stack(strategy.genomes(supernet.space, 0.9, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    supernet.space.validate(first)


def test_the_sandwich_holds_the_smallest():
    space = calibrated("vit").space
    assert np.array_equal(Sandwich(2).genomes(space, 0.0, 0)[0], space.smallest)
    assert len(Sandwich(0).genomes(space, 0.0, 0)) == 1 and len(Uniform(4).genomes(space, 0.0, 0)) == 4


def test_progressive_sampling_frees_depth_then_widths_then_formats():
    space = calibrated("vit").space
    kinds = {"depth": [], "width": [], "precision": []}
    for at, name in enumerate(space.names):
        kinds["depth" if name == "depth" else "precision" if name.endswith("precision") else "width"].append(at)
    for progress, free in ((0.0, ["depth"]), (0.5, ["depth", "width"]), (0.9, ["depth", "width", "precision"])):
        genomes = np.stack(Progressive(8).genomes(space, progress, 0))
        for kind, places in kinds.items():
            moved = (genomes[:, places] != space.canonical(np.tile(space.largest, (9, 1)))[:, places]).any()
            # Genes of blocks that are gone are at their default, whatever is free.
            inside = [g for g in genomes if g[space.names.index("depth")] == space.largest[space.names.index("depth")]]
            moved_inside = any((g[places] != space.largest[places]).any() for g in inside)
            assert moved if kind == "depth" else moved_inside == (kind in free)


def test_attentive_sampling_keeps_to_the_region():
    supernet = calibrated("vit")
    sizes = sorted(supernet.cost_columns(supernet.space.sample(200, seed=5))["size"])
    limit = sizes[60] / 1e6
    strategy = Attentive(4, region=beyond_limits(supernet, {"size_mb": f"<= {limit}"}))
    for seed in range(5):
        genomes = np.stack(strategy.genomes(supernet.space, 0.0, seed))
        assert (supernet.cost_columns(genomes)["size"] <= limit * 1e6).all()


def test_attentive_sampling_of_a_space_of_few_genomes_repeats_them():
    space = SearchSpace([Gene("depth", (1, 2)), Gene("width", (8, 16))])
    drawn = Attentive(3, front=space.largest[None]).genomes(space, 0.0, 0)
    assert len(drawn) == 4 and all(np.array_equal(space.canonical(genome), genome) for genome in drawn)


def test_attentive_sampling_stays_near_the_front():
    space = calibrated("vit").space
    front = space.sample(2, seed=3)
    near = np.stack(Attentive(20, front=front, mutation=0.1).genomes(space, 0.0, 0))[1:]
    far = space.sample(20, seed=1)
    distance = [np.mean([(front != genome).mean(1).min() for genome in each]) for each in (near, far)]
    assert distance[0] < distance[1] / 2
