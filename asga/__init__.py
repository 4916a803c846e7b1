"""Mixed-precision quantization whose bit-width policy is searched on a small dataset and carries over.

Search on a proxy, transfer to the target::

    policy = asga.PolicySearcher(model, budget=asga.Budget(bitops="w4a4"), epochs=5).fit(proxy_loader).policy
    quantized = asga.quantize(target_model, policy)
    asga.TransferTrainer(quantized, epochs=3).fit(train_loader, val_loader)
"""

__version__ = "0.1.0"

from asga import nn, ops, optim, search
from asga.convert import LayerSummary, check_policy, prepare, quantization_summary, quantize
from asga.nn import calibrate
from asga.ops import backend, get_backend, set_backend
from asga.policy import LayerPolicy, Policy
from asga.search import Budget, InfeasibleBudgetError, LatencyTable, PolicySearcher, SearchResult, SearchSpace
from asga.steps import TrainingError, evaluate
from asga.transfer import TransferResult, TransferTrainer

__all__ = [
    "Budget",
    "InfeasibleBudgetError",
    "LatencyTable",
    "LayerPolicy",
    "LayerSummary",
    "Policy",
    "PolicySearcher",
    "SearchResult",
    "SearchSpace",
    "TrainingError",
    "TransferResult",
    "TransferTrainer",
    "backend",
    "calibrate",
    "check_policy",
    "evaluate",
    "get_backend",
    "nn",
    "ops",
    "optim",
    "prepare",
    "quantization_summary",
    "quantize",
    "search",
    "set_backend",
]
