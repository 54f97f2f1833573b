"""When the second pass is due: the sampling rules, `RULES`, and their protocol `Sampling`."""

from arsam.sampling.adaptive import Adaptive
from arsam.sampling.gradient_norm import GradientNorm
from arsam.sampling.rules import Always, Bernoulli, Budget, Never, Periodic, Sampling, Tail

RULES = (Adaptive, Always, Bernoulli, Budget, GradientNorm, Never, Periodic, Tail)

__all__ = [
    "RULES",
    "Adaptive",
    "Always",
    "Bernoulli",
    "Budget",
    "GradientNorm",
    "Never",
    "Periodic",
    "Sampling",
    "Tail",
]
