"""Random search: every genome drawn evenly, choice by choice. The baseline that a search must beat."""

from __future__ import annotations

from jointopt.strategies.strategy import Strategy


class RandomSearch(Strategy):
    """Proposes nothing of its own: what `Strategy` fills in is random."""
