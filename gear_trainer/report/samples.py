"""An evaluation's rollouts as the page reads those of a run: in words, for tokens and their numbers are not kept there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from gear_trainer.evaluation.records import read_records
from gear_trainer.evaluation.scores import Record

WORD = re.compile(r"\s*\S+|\s+")  # a word with the space before it
_ROW = {
    "problem": pa.string(), "group": pa.int32(), "sample": pa.int32(), "reward": pa.float64(), "success": pa.bool_(),
    "advantage": pa.float64(), "end": pa.string(), "calls": pa.int32(), "errors": pa.int32(), "answer": pa.string(),
    "prompt": pa.string(), "vote": pa.string(), "failures": pa.list_(pa.string()),
}  # fmt: skip
_WORDS = {"ids": pa.int32(), "tokens": pa.string(), "mask": pa.bool_(), "turn": pa.int32()}
SCHEMA = pa.schema([*_ROW.items(), *((name, pa.list_(kind)) for name, kind in _WORDS.items())])


def samples(folder: Path, groups: Sequence[int] | None = None) -> pa.Table:
    """The rollouts of an evaluation's folder, or those of some groups (a group a problem): a row each, by SCHEMA.

    `ids` number the words, alike where they are. Raises FileNotFoundError where there are none.
    """
    records = read_records(folder)
    if not records:
        raise FileNotFoundError(folder)
    wanted = None if groups is None else set(groups)
    prompts = {r["index"]: r["prompt"] for r in records if r.get("prompt") is not None}
    numbers: dict[str, int] = {}
    kept = (r for r in records if wanted is None or r["index"] in wanted)
    return pa.Table.from_pylist([_row(r, prompts, numbers) for r in kept], schema=SCHEMA)


def _row(r: Record, prompts: dict[int, str], numbers: dict[str, int]) -> dict:
    words, turns = [], []
    for turn, text in passages(r):
        own = WORD.findall(text)
        words += own
        turns += [turn] * len(own)
    return {name: r.get(name) for name in _ROW} | {
        "group": r["index"],
        "answer": None if r["answer"] is None else r["answer"] if isinstance(r["answer"], str) else json.dumps(r["answer"]),
        "prompt": prompts.get(r["index"]),
        "ids": [numbers.setdefault(word, len(numbers)) for word in words],
        "tokens": words,
        "mask": [turn >= 0 for turn in turns],
        "turn": turns,
    }


def passages(r: Record) -> list[tuple[int, str]]:
    """The response as (turn, text), -1 for replies; one of turn 0 where an evaluation of before did not say where they end."""
    kept = r.get("passages")
    if kept is None:
        return [(0, r["response"])]
    ends = list(accumulate(length for _, length in kept))
    return [(turn, r["response"][end - length : end]) for (turn, length), end in zip(kept, ends, strict=True)]
