"""Searching a bit-width policy: the space, costs and budgets, the search itself and the exact solver behind it."""

from asga.search.budget import Budget
from asga.search.result import SearchResult
from asga.search.searcher import PolicySearcher
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import SearchSpace

__all__ = ["Budget", "InfeasibleBudgetError", "PolicySearcher", "SearchResult", "SearchSpace"]
