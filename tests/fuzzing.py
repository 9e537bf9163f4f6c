"""Seeds of the tests that draw their cases: pinned, so that CI repeats itself, or fresh by GEAR_FUZZ (`make fuzz`).

GEAR_FUZZ=fresh draws a seed, GEAR_FUZZ=<number> repeats one; pytest's first lines print it. Then all cases are drawn, as every
night; pinned, CI tries a tenth of those that cost most.
"""

import os
import random
import secrets

from hypothesis import given, seed, settings

SEED = os.environ.get("GEAR_FUZZ") or None
if SEED == "fresh":
    SEED = os.environ["GEAR_FUZZ"] = str(secrets.randbelow(2**31))  # workers of `pytest -n` take this one

settings.register_profile("pinned", derandomize=True, deadline=None, database=None)
settings.register_profile("fresh", deadline=None, database=None)
settings.load_profile("pinned" if SEED is None else "fresh")


def often(count: int) -> int:
    """How many of `count` cases are tried."""
    return count // 10 if SEED is None else count


def fuzz(check, cases, count):
    """check(case) on `count` cases of a hypothesis strategy, or its tenth."""
    test = settings(max_examples=often(count))(given(cases)(check))
    (test if SEED is None else seed(int(SEED))(test))()


def rng(part) -> random.Random:
    """A generator for this part of a test: the same in every run, or this seed's."""
    return random.Random(part if SEED is None else f"{SEED} {part}")
