"""Fused token statistics and adaptive-granularity credit for training LLM agents. The public names, nothing else."""

from .backends import backend, show, version
from .credit import Credit, Gear, Grpo, credit_weights
from .errors import GearKernelsError
from .head import FusedHead
from .stats import Head, TokenStats, linear_token_stats, token_stats

__version__ = version("gear-kernels")  # of what is installed

__all__ = [
    "Credit",
    "FusedHead",
    "Gear",
    "GearKernelsError",
    "Grpo",
    "Head",
    "TokenStats",
    "__version__",
    "backend",
    "credit_weights",
    "linear_token_stats",
    "show",
    "token_stats",
]
