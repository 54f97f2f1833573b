"""ARSAM: sharpness-aware minimization with sampled, reused and mixed gradients, for any PyTorch optimizer."""

from arsam import reuse, sampling
from arsam.amp import scaled_step
from arsam.optimizer import ARSAM
from arsam.statistics import frozen_statistics

__version__ = "0.1.0"

__all__ = ["ARSAM", "__version__", "frozen_statistics", "reuse", "sampling", "scaled_step"]
