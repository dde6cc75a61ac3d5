"""Genes, genomes and the search space that they span. Nothing here knows what a model is.

space = SearchSpace([Gene("depth", (2, 3, 4)), Gene("block4.kernel", (3, 5, 7), requires={"depth": (4,)})])
genomes = space.sample(10, seed=0)     # int64 [10, 2]: one choice index a gene
space.decode(genomes[0])               # {"depth": 3, "block4.kernel": 3}
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from quant.errors import JointoptError

Choice = Any
"""A number, a string or a bool: what a gene may be."""


@dataclass(frozen=True)
class Gene:
    """A named place with a finite list of choices.

    Attributes:
        name: unique in its space.
        choices: at least one, all different. The first is the default where the gene cannot matter.
        requires: earlier gene -> its choices under which this gene matters; all of them must hold. With no choice
            listed it never does.
    """

    name: str
    choices: tuple[Choice, ...]
    requires: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "requires", {k: tuple(v) for k, v in self.requires.items()})
        if not self.choices:
            raise JointoptError(f"gene {self.name!r}: has no choice; allowed: one or more")
        if len(set(self.choices)) < len(self.choices):
            raise JointoptError(f"gene {self.name!r}: found a choice twice in {self.choices}; allowed: each once")


class SearchSpace:
    """An ordered, immutable list of genes. A genome is an int64 vector of choice indices, one a gene.

    Args:
        genes: in an order in which every gene comes after those that it requires.
        smallest, largest: the genomes at the two ends, as indices (default: all first choices, all last choices).

    Raises:
        JointoptError: no gene, a name twice, or a `requires` that names no earlier gene or none of its choices.
    """

    def __init__(self, genes: Iterable[Gene], *, smallest: Any = None, largest: Any = None):
        self.genes = tuple(genes)
        if not self.genes:
            raise JointoptError("space: found no gene; allowed: one or more")
        self.names = tuple(gene.name for gene in self.genes)
        self._index = {name: at for at, name in enumerate(self.names)}
        if len(self._index) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise JointoptError(f"gene {twice!r}: found twice; allowed: each name once")
        self._requires = [self._resolved(gene) for gene in self.genes]
        self._sizes = np.array([len(gene.choices) for gene in self.genes], dtype=np.int64)
        first, last = np.zeros(len(self), dtype=np.int64), self._sizes - 1
        self._smallest = self.canonical(first if smallest is None else smallest)
        self._largest = self.canonical(last if largest is None else largest)

    @classmethod
    def for_model(cls, model: Any, schemes: Iterable[str] | None = None, **options: Any) -> SearchSpace:
        """The search space of a model of a known family; see `search_spaces.defaults.space_for_model`."""
        from search_spaces.defaults import space_for_model

        return space_for_model(model, schemes=schemes, **options)

    def _resolved(self, gene: Gene) -> list[tuple[int, np.ndarray]]:
        """(index of a required gene, for each of its choices whether it will do)."""
        found = []
        for name, allowed in gene.requires.items():
            at = self._index.get(name)
            if at is None or at >= self._index[gene.name]:
                earlier = self.names[: self._index[gene.name]]
                near = difflib.get_close_matches(name, earlier, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise JointoptError(f"gene {gene.name!r}: requires {name!r}, which is no earlier gene{hint}")
            choices = self.genes[at].choices
            unknown = [choice for choice in allowed if choice not in choices]
            if unknown:
                raise JointoptError(
                    f"gene {gene.name!r}: requires {name!r} in {tuple(allowed)}; its choices are {choices}"
                )
            found.append((at, np.array([choice in allowed for choice in choices])))
        return found

    def __len__(self) -> int:
        return len(self.genes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return f"SearchSpace({len(self)} genes, {self.count():,} genomes)"

    @property
    def smallest(self) -> np.ndarray:
        """The canonical genome of the smallest member."""
        return self._smallest.copy()

    @property
    def largest(self) -> np.ndarray:
        """The canonical genome of the largest member."""
        return self._largest.copy()

    @property
    def sizes(self) -> np.ndarray:
        """Number of choices of each gene, [genes]."""
        return self._sizes.copy()

    def active(self, genomes: Any) -> np.ndarray:
        """Which genes matter, bool, in the shape of `genomes`."""
        genomes = np.asarray(genomes)
        matters = np.ones(genomes.shape, dtype=bool)
        for at, requires in enumerate(self._requires):
            for other, allowed in requires:
                matters[..., at] &= matters[..., other] & allowed[genomes[..., other]]
        return matters

    def canonical(self, genomes: Any) -> np.ndarray:
        """The genomes with every gene that cannot matter at its first choice; one or many, int64."""
        genomes = self.validate(genomes)
        return np.where(self.active(genomes), genomes, 0)

    def is_canonical(self, genomes: Any) -> np.ndarray:
        """For each genome, whether it is its own canonical form."""
        genomes = self.validate(genomes)
        return (genomes == self.canonical(genomes)).all(axis=-1)

    def validate(self, genomes: Any) -> np.ndarray:
        """The genomes as int64. Raises JointoptError for another length, type or an index out of range."""
        found = np.asarray(genomes)
        if found.ndim not in (1, 2) or found.shape[-1] != len(self):
            raise JointoptError(f"genome: found shape {found.shape}; allowed: ({len(self)},) or (n, {len(self)})")
        if not np.issubdtype(found.dtype, np.integer):
            raise JointoptError(f"genome: found numbers of type {found.dtype}; allowed: integers")
        wrong = (found < 0) | (found >= self._sizes)
        if wrong.any():
            at = np.argwhere(wrong)[0]
            gene = self.genes[at[-1]]
            raise JointoptError(
                f"genome: gene {gene.name!r} has index {found[tuple(at)]}; allowed: 0 to {len(gene.choices) - 1}"
            )
        return found.astype(np.int64)

    def decode(self, genome: Any) -> dict[str, Choice]:
        """Gene name -> choice. Genes that cannot matter come with the choice that their index names."""
        genome = self.validate(genome)
        return {gene.name: gene.choices[index] for gene, index in zip(self.genes, genome, strict=True)}

    def encode(self, choices: Mapping[str, Choice]) -> np.ndarray:
        """The canonical genome with these choices; genes that are left out take their first."""
        genome = np.zeros(len(self), dtype=np.int64)
        for name, choice in choices.items():
            if name not in self._index:
                near = difflib.get_close_matches(name, self.names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise JointoptError(f"gene {name!r}: not in the space{hint}")
            allowed = self.genes[self._index[name]].choices
            if choice not in allowed:
                raise JointoptError(f"gene {name!r}: found {choice!r}; allowed: {', '.join(map(str, allowed))}")
            genome[self._index[name]] = allowed.index(choice)
        return self.canonical(genome)

    def sample(self, n: int, seed: int) -> np.ndarray:
        """Random canonical genomes, int64 [n, genes], all different; fewer only where the space has no more.

        Every gene that matters is drawn evenly from its choices.
        """
        random = np.random.default_rng(seed)
        total = self.count()
        if total <= 4 * n and total <= 10**6:
            everything = np.array(list(self.genomes()), dtype=np.int64)
            return everything[random.permutation(len(everything))[:n]]
        found: dict[bytes, np.ndarray] = {}
        while len(found) < n:
            drawn = random.integers(0, self._sizes, size=(n, len(self)))
            for genome in self.canonical(drawn):
                if len(found) < n:
                    found.setdefault(genome.tobytes(), genome)
        return np.array(list(found.values()), dtype=np.int64).reshape(len(found), len(self))

    def genomes(self) -> Iterator[np.ndarray]:
        """Every canonical genome, in lexicographic order. For small spaces."""
        for indices in product(*(range(size) for size in self._sizes)):
            genome = np.array(indices, dtype=np.int64)
            if self.is_canonical(genome):
                yield genome

    def count(self) -> int:
        """Number of canonical genomes, exact."""
        return self._count

    @cached_property
    def _count(self) -> int:
        """Genes fall into independent components of who requires whom; each is counted by its required genes."""
        linked: dict[int, set[int]] = {at: {at} for at in range(len(self))}
        for at, requires in enumerate(self._requires):
            for other, _ in requires:
                merged = linked[at] | linked[other]
                for member in merged:
                    linked[member] = merged
        total, done = 1, set()
        for at in range(len(self)):
            if at not in done:
                done |= linked[at]
                total *= self._count_component(sorted(linked[at]), {})
        return total

    def _count_component(self, members: Sequence[int], fixed: dict[int, int]) -> int:
        """Counts the assignments of `members`, given choices of earlier genes that they require.

        The first gene that others require is fixed to each of its choices in turn; what then no longer hangs
        together is counted apart. Choices that are alike to all who require it are counted once.
        """
        required = {other for at in members for other, _ in self._requires[at] if other in members}
        branching = next((at for at in members if at in required), None)
        if branching is None:
            total = 1
            for at in members:
                total *= int(self._sizes[at]) if self._allowed(at, fixed) else 1
            return total
        if not self._allowed(branching, fixed):
            return self._split(members, branching, {**fixed, branching: -1})
        effects: dict[tuple, list[int]] = {}
        for choice in range(int(self._sizes[branching])):
            effect = tuple(
                bool(allowed[choice]) for at in members for other, allowed in self._requires[at] if other == branching
            )
            effects.setdefault(effect, []).append(choice)
        return sum(
            len(alike) * self._split(members, branching, {**fixed, branching: alike[0]}) for alike in effects.values()
        )

    def _split(self, members: Sequence[int], without: int, fixed: dict[int, int]) -> int:
        rest = [at for at in members if at != without]
        linked = {at: {at} for at in rest}
        for at in rest:
            for other, _ in self._requires[at]:
                if other in linked:
                    merged = linked[at] | linked[other]
                    for member in merged:
                        linked[member] = merged
        total, done = 1, set()
        for at in rest:
            if at not in done:
                done |= linked[at]
                total *= self._count_component(sorted(linked[at]), fixed)
        return total

    def _allowed(self, at: int, fixed: Mapping[int, int]) -> bool:
        """Whether the gene matters under `fixed`, in which -1 stands for a gene that does not."""
        return all(fixed.get(o, 0) >= 0 and (o not in fixed or a[fixed[o]]) for o, a in self._requires[at])

    def replaced(self, requires: Mapping[str, Mapping[str, tuple]]) -> SearchSpace:
        """The same genes and choices under other conditions; genes that `requires` leaves out have none."""
        genes = [Gene(gene.name, gene.choices, requires.get(gene.name, {})) for gene in self.genes]
        return SearchSpace(genes, smallest=self._smallest, largest=self._largest)

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON can hold it."""
        genes = [
            {
                "name": gene.name,
                "choices": list(gene.choices),
                "requires": {name: list(allowed) for name, allowed in gene.requires.items()},
            }
            for gene in self.genes
        ]
        return {"genes": genes, "smallest": self._smallest.tolist(), "largest": self._largest.tolist()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SearchSpace:
        """The space that `to_dict` described."""
        genes = [Gene(gene["name"], tuple(gene["choices"]), gene["requires"]) for gene in content["genes"]]
        return cls(genes, smallest=content["smallest"], largest=content["largest"])

    def fingerprint(self) -> str:
        """SHA-256 of the space: equal for equal spaces."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
