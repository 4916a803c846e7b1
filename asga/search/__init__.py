"""Searching a bit-width policy: the space, costs and budgets, the search itself, the exact solver
behind it, and whether several searches agree."""

from asga.search.agreement import Agreement, consensus, policy_agreement, searched_choices
from asga.search.budget import Budget
from asga.search.groups import Group
from asga.search.hessian import hessian_sensitivity
from asga.search.latency import LatencyTable
from asga.search.methods import METHODS
from asga.search.result import FarFromBudget, FrontierPoint, SearchResult
from asga.search.searcher import PolicySearcher
from asga.search.sensitivity import gradient_sensitivity, measured_sensitivity
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import SearchSpace

__all__ = [
    "METHODS",
    "Agreement",
    "Budget",
    "FarFromBudget",
    "FrontierPoint",
    "Group",
    "InfeasibleBudgetError",
    "LatencyTable",
    "PolicySearcher",
    "SearchResult",
    "SearchSpace",
    "consensus",
    "gradient_sensitivity",
    "hessian_sensitivity",
    "measured_sensitivity",
    "policy_agreement",
    "searched_choices",
]
