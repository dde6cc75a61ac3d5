"""The expected latency of choices that are probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.cost.expected import expected_cost
from tests.on_h100 import FAST, supernet_of
from tests.zoo import make


def one_hot(space: SearchSpace, genome) -> list[torch.Tensor]:
    sizes = [len(gene.choices) for gene in space.genes]
    return [torch.eye(size, dtype=torch.float64)[at] for size, at in zip(sizes, genome, strict=True)]


@pytest.mark.parametrize("name", ["vit", "llama_tied", "resnet"])
def test_expected_cost_of_a_certain_choice_is_its_cost(name):
    supernet = supernet_of(name)
    for genome in supernet.space.sample(4, seed=2):
        found = float(expected_cost(supernet, one_hot(supernet.space, genome), "latency"))
        assert found == pytest.approx(supernet.costs(genome)["latency"])


def test_expected_cost_is_the_mean_over_genomes():
    model = make("vit")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], depth=[2, 3], mlp=[128, 256], precision_per="block")
    supernet = Supernet(model, space, latency=FAST)
    generator = torch.Generator().manual_seed(0)
    sizes = [len(gene.choices) for gene in space.genes]
    free = [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]

    def value() -> torch.Tensor:
        return expected_cost(supernet, [each.softmax(0) for each in free], "latency")

    chances = [each.detach().softmax(0).numpy() for each in free]
    every = np.array(list(np.ndindex(*sizes)))
    weights = np.prod([chance[every[:, at]] for at, chance in enumerate(chances)], axis=0)
    assert float(value()) == pytest.approx(weights @ supernet.cost_columns(every)["latency"])


def test_expected_cost_has_the_gradient_of_finite_differences():
    model = make("vit")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], depth=[2, 3], mlp=[128, 256], precision_per="block")
    supernet = Supernet(model, space, latency=FAST)
    generator = torch.Generator().manual_seed(1)
    free = [
        torch.randn(len(gene.choices), generator=generator, dtype=torch.float64, requires_grad=True)
        for gene in space.genes
    ]

    def microseconds(*each: torch.Tensor) -> torch.Tensor:
        return 1e6 * expected_cost(supernet, [one.softmax(0) for one in each], "latency")

    assert torch.autograd.gradcheck(microseconds, free)


def test_expected_cost_of_other_shapes_is_refused():
    supernet = supernet_of("vit")
    names, right = supernet.space.names, one_hot(supernet.space, supernet.space.smallest)
    for wrong, said in (
        ([right[0][:1], *right[1:]], rf"{names[0]}: found \(1,\); allowed: \({len(right[0])},\)"),
        (right[:-1], f"{names[-1]}: found nothing"),
        ([*right, right[0]], "nothing: found"),
        (dict(zip(names, right, strict=True)), rf"{names[0]}: found \(\)"),
    ):
        with pytest.raises(JointoptError, match=f"expected_cost: {said}"):
            expected_cost(supernet, wrong, "latency")
    arrays = (each.numpy() for each in right)
    assert expected_cost(supernet, arrays, "latency") == expected_cost(supernet, right, "latency")
