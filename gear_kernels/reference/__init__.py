"""The only statement of the mathematics, in plain torch: stats.py the statistics, credit.py every method's weights.

Here stand the names that back ends, tests and benchmarks compare the statistics with.
"""

from .stats import (
    BY_NAME,
    GRADIENT_NAMES,
    STAT_NAMES,
    STATE_NAMES,
    STATISTICS,
    SUM_NAMES,
    Rows,
    Stat,
    finish,
    head_logits,
    jsd,
    merge,
    needs_teacher,
    sweep,
    token_stats,
)

__all__ = [
    "BY_NAME",
    "GRADIENT_NAMES",
    "STATE_NAMES",
    "STATISTICS",
    "STAT_NAMES",
    "SUM_NAMES",
    "Rows",
    "Stat",
    "finish",
    "head_logits",
    "jsd",
    "merge",
    "needs_teacher",
    "sweep",
    "token_stats",
]
