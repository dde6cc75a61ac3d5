"""What asks for genomes and is told their objectives. A strategy sees genomes and numbers, never a model.

strategy = create("guided", space, [Objective("error", "min"), Objective("macs", "min", compute=f)], seed=0)
genomes = strategy.ask(10)
strategy.tell(genomes, values)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from jointopt.objectives import Constraint, Objective
from jointopt.strategies.evolutionary_search import EvolutionarySearch
from jointopt.strategies.guided_search import GuidedSearch
from jointopt.strategies.random_search import RandomSearch
from jointopt.strategies.strategy import Strategy
from quant.errors import JointoptError, check_whole, did_you_mean
from search_spaces.space import SearchSpace

STRATEGIES: dict[str, type[Strategy]] = {
    "guided": GuidedSearch,
    "evolutionary": EvolutionarySearch,
    "random": RandomSearch,
}
LEAST = {"population": 2, "initial": 2, "generations": 1, "draws": 1}
"""The least that a strategy's numbers may be."""


def create(name: str, space: SearchSpace, objectives: Sequence[Objective], seed: int = 0, **options: Any) -> Strategy:
    """A new strategy.

    Args:
        name: "guided", "evolutionary" or "random".
        options: `constraints`, and the strategy's own, see its class.

    Raises:
        JointoptError: an unknown strategy or option, no objective, constraints that no genome
            meets, a number that is too small.
    """
    if name not in STRATEGIES:
        raise JointoptError(
            f"strategy {name!r}: unknown{did_you_mean(name, STRATEGIES)}; allowed: {', '.join(STRATEGIES)}, and what "
            "is put into jointopt.strategies.STRATEGIES"
        )
    kind = STRATEGIES[name]
    check_whole("seed", seed)
    allowed = [key for key in inspect.signature(kind).parameters if key not in ("space", "objectives", "seed")]
    for key in options:
        if key not in allowed:
            raise JointoptError(f"strategy {name!r}: unknown option {key!r}; allowed: {', '.join(allowed) or 'none'}")
        if key in LEAST:
            check_whole(f"strategy {name!r}: {key}", options[key], LEAST[key])
    if not objectives:
        raise JointoptError("objectives: found none; allowed: one or more")
    wrong = next((each for each in objectives if not isinstance(each, Objective)), None)
    if wrong is not None:
        raise JointoptError(f"objectives: found {wrong!r}; allowed: jointopt.Objective(name, direction)")
    wrong = next((each for each in options.get("constraints", ()) if not isinstance(each, Constraint)), None)
    if wrong is not None:
        raise JointoptError(f"constraints: found {wrong!r}; allowed: jointopt.Constraint")
    return kind(space, objectives, seed, **options)


__all__ = [
    "STRATEGIES",
    "EvolutionarySearch",
    "GuidedSearch",
    "RandomSearch",
    "Strategy",
    "create",
]
