"""Which sub-networks a step of super-network training trains: one strategy a file.

A strategy is a function of the step alone (and of the seed), so that a run that is resumed, and every process of a
distributed one, samples the same genomes without keeping or sending any state.
"""

from __future__ import annotations

import numpy as np

from jointopt.training.sampling.attentive import Attentive
from jointopt.training.sampling.progressive import Progressive
from jointopt.training.sampling.protocol import Sampling
from jointopt.training.sampling.sandwich import Sandwich
from jointopt.training.sampling.uniform import Uniform
from quant.errors import JointoptError, check_choice

SAMPLERS: dict[str, type] = {
    "sandwich": Sandwich,
    "random": Uniform,
    "attentive": Attentive,
    "progressive": Progressive,
}

__all__ = ["SAMPLERS", "Attentive", "Progressive", "Sampling", "Sandwich", "Uniform", "strategy_of"]


def strategy_of(wanted: str | Sampling) -> Sampling:
    """The strategy of that name with its defaults, or the one given. Raises JointoptError for an unknown name, and for
    what is no strategy."""
    if not isinstance(wanted, str):
        if isinstance(wanted, type) or not callable(getattr(wanted, "genomes", None)):
            raise JointoptError(
                f"sampling: found {wanted!r}; allowed: {', '.join(SAMPLERS)}, or a strategy such as Sandwich(count=2)"
            )
        return wanted
    check_choice("sampling", wanted, SAMPLERS)
    return SAMPLERS[wanted]()


def step_seed(seed: int, step: int) -> int:
    """A seed of the step's own, unrelated to its neighbours'."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
