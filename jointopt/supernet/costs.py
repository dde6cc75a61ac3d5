"""The tables of costs of a super-network, and of the model that it was made from: shapes, positions, orders and formats
brought together for `jointopt.cost`, which knows of none of them by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jointopt.cost.operators import LatencyModel
from jointopt.cost.positions import Positions, measure_positions
from jointopt.cost.shapes import cost_tables
from jointopt.cost.tables import CostTables
from quant.errors import DOES_NOT_RUN, JointoptError, in_one_line
from search_spaces.family import Family, within
from search_spaces.precision import gene_names
from search_spaces.space import Gene, SearchSpace

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet


def tables(supernet: Supernet, latency: LatencyModel | None) -> CostTables:
    """See `Supernet.costs_by`."""
    positions = supernet._positions or _of_the_example(supernet)
    return cost_tables(
        supernet.model,
        supernet.family,
        supernet.space,
        positions,
        supernet.precision_genes,
        supernet.schemes,
        supernet.leaving,
        latency,
    )


def _of_the_example(supernet: Supernet) -> Positions:
    family = supernet.family
    if family.example is None:
        raise JointoptError(f"costs: the {family.name} family declares no example; call calibrate first")
    try:
        return measure_positions(supernet.model, family.example(supernet.model))
    except DOES_NOT_RUN as error:
        raise JointoptError(
            f"model: it cannot compute one sample, as the {family.name} family gives it: {in_one_line(error)}"
        ) from error


def original_tables(supernet: Supernet, latency: LatencyModel | None) -> CostTables:
    """Those of the whole, unquantized model that was given, whose space has one genome."""
    model, family = supernet._declared(supernet._given)
    only = SearchSpace([Gene(gene_names(family.layers[0])[0], ("none",))])
    return cost_tables(model, family, only, supernet._costs.positions, {}, {}, supernet.leaving, latency)


def by_block(records: list[dict[str, Any]], family: Family) -> list[dict[str, Any]]:
    """The same operators, each with the "block" that its path is in, None for what is in none."""
    paths = {block.path: block.name for block in family.blocks}
    for record in records:
        record["block"] = next((name for path, name in paths.items() if within(record["path"], path)), None)
    return records
