"""A study as a page shows it: its evaluations are read once for all figures and tables of them."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from html import escape

import numpy as np

from jointopt.study.choice import front_of
from jointopt.study.study import Study
from search_spaces.family import is_depth
from search_spaces.precision import is_precision


class Shown:
    """What there is to show of a study, as it was when this was made.

    Attributes:
        frame: `Study.evaluations`.
        succeeded, failed, front: those of them, as the study's methods of these names give them.
        genomes: theirs, [evaluations, genes].
        active: which of their genes matter, in the same shape.
    """

    def __init__(self, study: Study):
        self.study, self.frame = study, study.evaluations()
        failed = self.frame["failed"].notna()
        self.succeeded, self.failed = self.frame[~failed], self.frame[failed]
        self.front = front_of(self.frame, study.objectives)
        self.genomes = np.array(self.frame["genome"].tolist(), dtype=np.int64).reshape(-1, len(study.space))
        self.active = study.space.active(self.genomes)

    @cached_property
    def summaries(self) -> dict[int, list[str]]:
        """Number of an evaluation -> its genome in a few words that plotly shows as they are: its depth, and how many
        genes chose each number format."""
        genes = self.study.space.genes
        depths = [at for at, gene in enumerate(genes) if is_depth(gene.name)]
        formats = [at for at, gene in enumerate(genes) if is_precision(gene.name)]
        found = {}
        numbers = self.frame["number"].tolist()
        for number, genome, matters in zip(numbers, self.genomes.tolist(), self.active.tolist(), strict=True):
            depth = [f"{genes[at].name} {genes[at].choices[genome[at]]}" for at in depths if matters[at]]
            chosen = Counter(str(genes[at].choices[genome[at]]) for at in formats if matters[at])
            texts = (", ".join(depth), ", ".join(f"{n} {name}" for name, n in chosen.items()))
            found[number] = [escaped(text) for text in texts if text]
        return found


def escaped(text: str) -> str:
    """Text that plotly shows as it is: it would read tags, and knows `&amp;`, `&lt;` and `&gt;` but no `&quot;`."""
    return escape(text, quote=False)
