"""Genes, genomes and the search space that they span.

space = SearchSpace([Gene("depth", (2, 3, 4)), Gene("block4.kernel", (3, 5, 7), requires={"depth": (4,)})])
genomes = space.sample(10, seed=0)     # int64 [10, 2]: one choice index a gene
space.decode(genomes[0])               # {"depth": 3, "block4.kernel": 3}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from math import prod
from typing import Any

import numpy as np

from quant.errors import JointoptError, check_whole, did_you_mean

Choice = Any
"""A number, a string, a bool, None, or a tuple of those: what a gene may be."""


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
        object.__setattr__(self, "choices", self._plain(self.choices))
        if not isinstance(self.requires, Mapping):
            found = f"found {self.requires!r} in place of what it requires"
            raise JointoptError(f"gene {self.name!r}: {found}; allowed: an earlier gene -> choices")
        object.__setattr__(self, "requires", {name: self._plain(each) for name, each in self.requires.items()})
        if not self.choices:
            raise JointoptError(f"gene {self.name!r}: has no choice; allowed: one or more")
        if len(set(self.choices)) < len(self.choices):
            raise JointoptError(f"gene {self.name!r}: found a choice twice in {self.choices}; allowed: each once")

    def _plain(self, choices: Iterable[Choice]) -> tuple[Choice, ...]:
        """The choices as JSON holds them and gives them back, numpy's numbers as Python's."""
        if isinstance(choices, str) or not isinstance(choices, Iterable):
            raise JointoptError(f"gene {self.name!r}: found {choices!r} in place of choices; allowed: a tuple of them")
        plain = []
        for choice in choices:
            if isinstance(choice, list | tuple):
                choice = self._plain(choice)
            elif isinstance(choice, np.generic):
                choice = choice.item()
            if not isinstance(choice, int | float | str | tuple | None):
                kind = type(choice).__name__
                raise JointoptError(f"gene {self.name!r}: a choice is of type {kind}; allowed: numbers, strings, bools")
            plain.append(choice)
        return tuple(plain)


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
        self._smallest = self.one(first if smallest is None else smallest)
        self._largest = self.one(last if largest is None else largest)

    @classmethod
    def for_model(cls, model: Any, schemes: Iterable[str] | None = None, **options: Any) -> SearchSpace:
        """The search space of a model of a known family, or of the one that `family` declares.

            SearchSpace.for_model(model)                                   # its family's default
            SearchSpace.for_model(model, ["none", "W8A8"], preset="bert")
            SearchSpace.for_model(model, depth=[8, 10, 12], mlp=[0.5, 1.0], precision_per="block")

        All options, and what is raised: `search_spaces.defaults.space_for_model`.
        """
        from search_spaces.defaults import space_for_model

        return space_for_model(model, schemes=schemes, **options)

    def _resolved(self, gene: Gene) -> list[tuple[int, np.ndarray]]:
        """(index of a required gene, for each of its choices whether it will do)."""
        found = []
        for name, allowed in gene.requires.items():
            at = self._index.get(name)
            if at is None or at >= self._index[gene.name]:
                earlier = self.names[: self._index[gene.name]]
                hint = did_you_mean(name, earlier)
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

    def __repr__(self) -> str:
        return f"SearchSpace({len(self)} genes, {self.count():,} genomes)"

    @property
    def smallest(self) -> np.ndarray:
        """The canonical genome of the smallest member."""
        return self.canonical(self._smallest)

    @property
    def largest(self) -> np.ndarray:
        """The canonical genome of the largest member."""
        return self.canonical(self._largest)

    @property
    def middle(self) -> np.ndarray:
        """The canonical genome of a member between these: each gene that matters is halfway from its smallest choice to
        its largest. Of genes with no choice between these, every second one is at its largest, beginning with the
        first."""
        genome, matters, large = np.zeros(len(self), dtype=np.int64), np.ones(len(self), dtype=bool), True
        for at, (low, high) in enumerate(zip(self._smallest, self._largest, strict=True)):
            matters[at] = all(matters[other] and allowed[genome[other]] for other, allowed in self._requires[at])
            if matters[at]:
                genome[at] = (low + high) // 2
                if abs(high - low) == 1:
                    genome[at] = high if large else low
                    large = not large
        return genome

    @property
    def sizes(self) -> np.ndarray:
        """Number of choices of each gene, [genes]."""
        return self._sizes.copy()

    def active(self, genomes: Any) -> np.ndarray:
        """Which genes matter, bool, in the shape of `genomes`."""
        return self._active(self.validate(genomes))

    def _active(self, genomes: np.ndarray) -> np.ndarray:
        matters = np.ones(genomes.shape, dtype=bool)
        for at, requires in enumerate(self._requires):
            for other, allowed in requires:
                matters[..., at] &= matters[..., other] & allowed[genomes[..., other]]
        return matters

    def canonical(self, genomes: Any) -> np.ndarray:
        """The genomes with every gene that cannot matter at its first choice; one or many, int64."""
        genomes = self.validate(genomes)
        return np.where(self._active(genomes), genomes, 0)

    def validate(self, genomes: Any) -> np.ndarray:
        """The genomes as int64. Raises JointoptError for another length, type or an index out of range."""
        found = np.asarray(genomes)
        if found.ndim == 0:
            raise JointoptError(f"genome: found a {type(genomes).__name__}; allowed: an array of choice indices")
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

    def one(self, genome: Any) -> np.ndarray:
        """The genome as int64 [genes]. Raises JointoptError for several, and what `validate` raises."""
        found = self.validate(genome)
        if found.ndim != 1:
            raise JointoptError(f"genome: found shape {found.shape}; allowed: ({len(self)},), one genome")
        return found

    def decode(self, genome: Any) -> dict[str, Choice]:
        """Gene name -> choice. Genes that cannot matter come with the choice that their index names."""
        genome = self.one(genome)
        return {gene.name: gene.choices[index] for gene, index in zip(self.genes, genome, strict=True)}

    def encode(self, choices: Mapping[str, Choice]) -> np.ndarray:
        """The canonical genome with these choices; genes that are left out take their first."""
        genome = np.zeros(len(self), dtype=np.int64)
        for name, choice in choices.items():
            if name not in self._index:
                raise JointoptError(f"gene {name!r}: not in the space{did_you_mean(name, self.names)}")
            allowed = self.genes[self._index[name]].choices
            if choice not in allowed:
                raise JointoptError(f"gene {name!r}: found {choice!r}; allowed: {', '.join(map(str, allowed))}")
            genome[self._index[name]] = allowed.index(choice)
        return self.canonical(genome)

    def sample(self, n: int, seed: int) -> np.ndarray:
        """Random canonical genomes, int64 [n, genes], all different; fewer only where the space has no more.

        Of a space of at most 4 n genomes all are as likely. Else every gene that matters is drawn evenly from its
        choices; where a few genomes take nearly all of the chance, so that draws bring hardly a new one, the others are
        reached from those found, one gene at a time.
        """
        check_whole("sample: n", n)
        random = np.random.default_rng(seed)
        if self._at_least() <= 4 * n:
            everything = np.array(list(islice(self.genomes(), 4 * n + 1)), dtype=np.int64)
            if len(everything) <= 4 * n:
                return everything[random.permutation(len(everything))[:n]]
        found: dict[bytes, np.ndarray] = {}
        stuck = False
        while len(found) < n:
            before = len(found)
            drawn = random.integers(0, self._sizes, size=(n, len(self)))
            if stuck:
                start = np.array(list(found.values()))[random.integers(0, before, size=n)]
                changed = random.integers(0, len(self), size=(n, 1)) == np.arange(len(self))
                drawn = np.where(changed, drawn, start)
            for genome in self.canonical(drawn):
                if len(found) < n:
                    found.setdefault(genome.tobytes(), genome)
            stuck = len(found) - before < n / 100
        return np.array(list(found.values()), dtype=np.int64).reshape(len(found), len(self))

    def _at_least(self) -> int:
        """A number of genomes that the space has for certain, at no cost: those that differ from the largest only in
        genes that no other requires."""
        required = {other for requires in self._requires for other, _ in requires}
        free = [at for at in np.flatnonzero(self._active(self._largest)) if at not in required]
        return prod(int(self._sizes[at]) for at in free)

    def genomes(self) -> Iterator[np.ndarray]:
        """Every canonical genome, in lexicographic order. For small spaces."""
        genome = np.zeros(len(self), dtype=np.int64)
        while True:
            yield genome.copy()
            movable = np.flatnonzero(self._active(genome) & (genome < self._sizes - 1))
            if not len(movable):
                return
            last = movable[-1]
            genome[last] += 1
            genome[last + 1 :] = 0

    def count(self) -> int:
        """Number of canonical genomes, exact. Quick for hundreds of genes, unless dozens hang on each other."""
        return self._count

    @cached_property
    def _count(self) -> int:
        return self._count_among(range(len(self)), {})

    def _count_among(self, members: Iterable[int], fixed: Mapping[int, int]) -> int:
        """Counts the assignments of `members`, in order, given the choices of the genes before them.

        Genes that cannot matter any more have one; those that hang together by what they require are counted apart
        from the others.
        """
        fixed = dict(fixed)
        groups: list[set[int]] = []
        for at in members:
            if not self._allowed(at, fixed):
                fixed[at] = -1
                continue
            required = {other for other, _ in self._requires[at]}
            linked = [group for group in groups if required & group]
            groups = [group for group in groups if not required & group]
            groups.append({at}.union(*linked))
        return prod(self._count_linked(sorted(group), fixed) for group in groups)

    def _count_linked(self, members: Sequence[int], fixed: Mapping[int, int]) -> int:
        """Of genes that hang together, the first is fixed to each of its choices in turn; choices that are alike to
        all who require it are counted once."""
        first, *rest = members
        if not rest:
            return int(self._sizes[first])
        conditions = [allowed for at in rest for other, allowed in self._requires[at] if other == first]
        effects: dict[tuple[bool, ...], list[int]] = {}
        for choice in range(int(self._sizes[first])):
            effects.setdefault(tuple(bool(allowed[choice]) for allowed in conditions), []).append(choice)
        return sum(len(alike) * self._count_among(rest, {**fixed, first: alike[0]}) for alike in effects.values())

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
