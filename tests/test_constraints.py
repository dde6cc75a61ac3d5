"""Constraints: what is asked keeps to them, and what nobody can meet is refused."""

from __future__ import annotations

import numpy as np
import pytest

from jointopt import Gene, JointoptError, Objective, SearchSpace, strategies
from jointopt.loop.wishes import check_size
from jointopt.objectives import Constraint, constraint
from jointopt.strategies.feasible import Feasible, descended
from tests.conditional_problem import SPACE, STRATEGIES, TWO, loss, macs, measure, searched, size
from tests.zoo import supernet_of

SMALL = Constraint("size", 9, "<=")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_genome_asked_keeps_to_exact_constraints(name):
    strategy = searched(name, 4, constraints=(Constraint("size", 14, "<="), Constraint("macs", 2, ">=", macs)))
    assert len(strategy.told) == 40
    assert (size(strategy.told) <= 14).all() and (macs(strategy.told) >= 2).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_an_exact_constraint_gives_no_finite_number_for_is_never_asked(name):
    def latency(genomes):
        return np.where(genomes[:, 0] == 0, np.inf, genomes.sum(1).astype(float))

    strategy = strategies.create(name, SPACE, TWO, constraints=(Constraint("latency", 6, "<=", latency),), seed=0)
    for _ in range(3):
        genomes = strategy.ask(3)
        assert (latency(genomes) <= 6).all()
        strategy.tell(genomes, measure(genomes))


def test_a_constraint_whose_function_gives_no_number_a_genome_is_refused_by_name():
    for compute, said in (
        (lambda g: g[:, :1], "gave .* allowed: one number each"),
        (lambda g: "ab", "gave no numbers"),
    ):
        with pytest.raises(JointoptError, match=f"constraint 'latency': its function {said}"):
            strategies.create("guided", SPACE, TWO, constraints=(Constraint("latency", 6, "<=", compute),))


@pytest.mark.parametrize("name", STRATEGIES)
def test_genomes_that_keep_to_a_constraint_are_all_found(name):
    allowed = [genome for genome in SPACE.genomes() if size(genome[None])[0] <= 6]
    strategy = strategies.create(name, SPACE, TWO, constraints=(Constraint("size", 6, "<="),))
    asked = []
    while len(genomes := strategy.ask(500)):
        asked += genomes.tolist()
        strategy.tell(genomes, measure(genomes))
    assert sorted(asked) == sorted(genome.tolist() for genome in allowed)


@pytest.mark.parametrize("name", STRATEGIES)
def test_few_genomes_that_keep_to_a_constraint_in_a_large_space_are_all_found(name):
    space = SearchSpace([Gene(f"layer{at}.precision", ("W4A16", "W8A8", "none")) for at in range(14)])
    total = Objective("total", "min", compute=lambda genomes: genomes.sum(1).astype(float))
    strategy = strategies.create(
        name, space, (total,), constraints=(Constraint("total", 3, "<=", total.compute),), seed=1
    )
    asked = 0
    while len(genomes := strategy.ask(100)):
        asked += len(genomes)
        strategy.tell(genomes, genomes.sum(1, keepdims=True).astype(float))
    ways = 1 + 14 + (14 + 14 * 13 // 2) + (14 * 13 + 14 * 13 * 12 // 6)  # that 14 numbers up to 2 sum up to 0, 1, 2, 3
    assert space.count() == 3**14 and asked == ways


@pytest.mark.parametrize(("name", "text", "most"), [("loss", "<= 4", 0.6), ("accuracy", ">= 0.15", 0.45)])
def test_evaluations_go_where_a_measured_constraint_holds(name, text, most):
    objectives, limit = (Objective(name, "min" if name == "loss" else "max"), TWO[1]), constraint(name, text)
    free, bound = (searched("guided", 5, objectives, constraints=given) for given in ((), (limit,)))
    inside = [(limit.excess(strategy.values[20:, 0]) == 0).mean() for strategy in (free, bound)]
    assert inside[1] > max(most, inside[0])


def test_one_objective_under_an_exact_constraint_that_is_none():
    strategy = searched("guided", 4, (Objective("loss", "min"),), constraints=(Constraint("size", 12, "<=", size),))
    fitting = np.array([genome for genome in SPACE.genomes() if size(genome[None])[0] <= 12])
    assert strategy.values.min() <= loss(fitting).min() + 0.1


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ((Constraint("size", 2, "<="),), "constraint size <= 2: no genome meets it; the best has 4"),
        ((Constraint("macs", 99, ">=", macs),), "constraint macs >= 99: no genome meets it; the best has 12"),
        ((SMALL, Constraint("macs", 12, ">=", macs)), "no genome meets them together; the closest has size"),
        ((SMALL, Constraint("size", 2, "<=")), "constraint size <= 2: no genome meets it"),
        ((Constraint("latency", 2, "<="),), "constraint 'latency': is no objective; allowed: loss, size"),
    ],
)
def test_constraints_that_nobody_can_meet_are_refused_before_any_evaluation(constraints, message):
    with pytest.raises(JointoptError, match=message) as raised:
        strategies.create("guided", SPACE, TWO, constraints=constraints)
    assert "\n" not in str(raised.value)


def banded(count: int) -> tuple[SearchSpace, Constraint, Constraint]:
    """A space, and two limits that leave of the sums of its genes' squares just one: no gene alone leads there."""
    space = SearchSpace([Gene(f"g{at}", tuple(range(8))) for at in range(count)])
    weights = np.array([37, 41, 43, 47, 53, 59, 61, 67, 71, 73][:count])

    def total(genomes: np.ndarray) -> np.ndarray:
        return (genomes**2 * weights).sum(1) + 0.0

    wanted = total(space.sample(1, 7))[0]
    return space, Constraint("least", wanted, ">=", total), Constraint("most", wanted, "<=", total)


@pytest.mark.parametrize("count", [5, 10])
def test_a_genome_is_found_that_no_change_of_one_gene_leads_to(count):
    space, *limits = banded(count)
    feasible = Feasible(space, TWO, limits)
    assert feasible.excess(feasible.anchor[None])[0] == 0


def test_descent_changes_one_gene_after_the_other_until_nothing_is_in_excess():
    space = SearchSpace([Gene("a", (1, 2, 3)), Gene("b", (1, 2, 3)), Gene("c", (1, 2), {"a": (3,)})])
    wanted = space.canonical(np.array([[1, 0, 0]]))[0]
    found = descended(space, lambda genomes: (genomes != wanted).sum(1) + 0.0, space.largest)
    assert found.tolist() == wanted.tolist()


def test_it_is_not_said_that_there_is_none_where_none_was_found():
    space = banded(10)[0]
    limit = Constraint("mine", 1, ">=", lambda genomes: (genomes == space.sample(1, 3)).all(1) - 1.0)
    with pytest.raises(JointoptError, match="constraint mine >= 1: found no genome that meets it; .*there may be one"):
        Feasible(space, TWO, [limit])


@pytest.mark.parametrize("text", ["0.9", "== 3", ">= much", ">= nan", "<=", None, 3])
def test_a_constraint_that_says_nothing_is_refused(text):
    with pytest.raises(JointoptError, match="constraint 'accuracy': found .*; allowed: '<= number' or '>= number'"):
        constraint("accuracy", text)


def test_a_constraint_is_read_as_it_is_written():
    assert constraint("accuracy", ">= 0.9") == Constraint("accuracy", 0.9, ">=")
    assert str(constraint("size", "<=1e6")) == "size <= 1e+06"


@pytest.mark.parametrize("name", ["vit", "llama_tied"])
def test_no_size_is_chosen_below_that_of_the_smallest_of_all_sub_networks(name):
    given = {"depth": [1, 2], "mlp": [0.5, 0.75, 1.0], "precision_per": "block"}
    supernet = supernet_of(name, ["none", "W8A8", "W4A16", "W4A16_G32", "NVFP4"], **given)
    least = supernet.cost_columns(np.array(list(supernet.space.genomes())))["size"].min() / 1e6
    check_size(supernet, least)
    with pytest.raises(JointoptError, match=f"choose.size_mb: found .*; allowed: from {least}, as the smallest"):
        check_size(supernet, least - 1e-6)
