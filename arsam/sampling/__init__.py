"""When the second pass is due: see `arsam.sampling.rules`."""

from arsam.sampling.rules import Adaptive, Always, Bernoulli, Budget, GradientNorm, Never, Periodic, Sampling, Tail

__all__ = ["Adaptive", "Always", "Bernoulli", "Budget", "GradientNorm", "Never", "Periodic", "Sampling", "Tail"]
