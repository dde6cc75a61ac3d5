"""What asks for genomes and is told their objectives. A strategy sees genomes and numbers, never a model.

strategy = create("guided", space, [Objective("error", "min"), Objective("macs", "min", compute=f)], seed=0)
genomes = strategy.ask(10)
strategy.tell(genomes, values)
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from jointopt.objectives import Objective
from jointopt.strategies.evolutionary_search import EvolutionarySearch
from jointopt.strategies.guided_search import GuidedSearch
from jointopt.strategies.random_search import RandomSearch
from jointopt.strategies.strategy import Strategy
from quant.errors import JointoptError
from search_spaces.space import SearchSpace

STRATEGIES: dict[str, type[Strategy]] = {
    "guided": GuidedSearch,
    "evolutionary": EvolutionarySearch,
    "random": RandomSearch,
}


def create(name: str, space: SearchSpace, objectives: Sequence[Objective], seed: int = 0, **options: Any) -> Strategy:
    """A new strategy.

    Args:
        name: "guided", "evolutionary" or "random".
        options: `constraints`, and the strategy's own, see its class.

    Raises:
        JointoptError: an unknown strategy or option, no objective, constraints that no genome meets.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(str(name), STRATEGIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise JointoptError(f"strategy {name!r}: unknown{hint} Allowed: {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    allowed = [key for key in inspect.signature(kind).parameters if key not in ("space", "objectives", "seed")]
    for key in options:
        if key not in allowed:
            raise JointoptError(f"strategy {name!r}: unknown option {key!r}; allowed: {', '.join(allowed) or 'none'}")
    if not objectives:
        raise JointoptError("objectives: found none; allowed: one or more")
    return kind(space, objectives, seed, **options)


__all__ = [
    "STRATEGIES",
    "EvolutionarySearch",
    "GuidedSearch",
    "RandomSearch",
    "Strategy",
    "create",
]
