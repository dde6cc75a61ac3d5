"""Models: what a search space is, and what is elastic in each family of models."""

from search_spaces.space import Gene, SearchSpace

__all__ = ["Gene", "SearchSpace"]
