"""The audit's file: Parquet, a row a trajectory, with the truth of its credit and what each teacher says about its tokens.

Lists run over the response: all turns and the replies between them. Numbers of tokens outside the mask mean nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gear_trainer.errors import ConfigError
from gear_trainer.runs.files import sync

TEACHERS = ("truth", "sibling", "wrong", "nothing")  # what stands in the teacher's prompt beside the problem
TEACHER_COLUMNS = ("teacher_logprobs", "reverse_kl", "forward_kl", "teacher_entropy")  # nats; null without such a teacher
NO_DEVIATION, UNKNOWN_DEVIATION = -1, -2  # it never left the ways to the solution; the task cannot tell

_ROW = {
    "problem": pa.string(),
    "group": pa.int32(),
    "sample": pa.int32(),
    "step": pa.int32(),  # the checkpoint's
    "reward": pa.float32(),
    "success": pa.bool_(),
    "advantage": pa.float32(),  # GRPO's, one for the trajectory
    "end": pa.string(),  # done | turns | length | error
    "v0": pa.float32(),  # P(success | prompt)
    "value_samples": pa.int32(),  # M, the continuations behind each value
    "deviation": pa.int32(),  # index into ids: the first token after which the solution is out of reach
}
_TOKENS = {
    "ids": pa.int32(),
    "tokens": pa.string(),
    "mask": pa.bool_(),  # policy tokens
    "turn": pa.int32(),  # the assistant turn of a policy token, -1 outside
    "logprobs": pa.float32(),  # nats, the policy's own, by the trainer
    "entropy": pa.float32(),  # nats
    "value": pa.float32(),  # V_t after the token, NaN outside the mask; after the last one it is the success itself
}
LISTS = (*_TOKENS, *(f"{column}/{teacher}" for teacher in TEACHERS for column in TEACHER_COLUMNS))
SCHEMA = pa.schema(
    [*_ROW.items(), *((name, pa.list_(_TOKENS.get(name, pa.float32()))) for name in LISTS)]  # a teacher's columns are float32
)


def write(path: Path, columns: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write the columns of SCHEMA, whole or not at all. about: task, model, step, temperature, M, seed, versions, date."""
    table = pa.table(dict(columns), schema=SCHEMA.with_metadata({"gear": json.dumps(dict(about))}))
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part, compression="zstd")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A file's table, by SCHEMA, and what it says about itself. Raises ConfigError where it is no such file."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}: give a file that `gear-trainer audit` wrote") from None
    about = (table.schema.metadata or {}).get(b"gear")
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if about is None or missing:
        lacks = f"no column {missing[0]}" if missing else "no metadata `gear`"
        raise ConfigError(f"{path}: {lacks}: give a file that `gear-trainer audit` wrote")
    try:
        return table.select(SCHEMA.names).cast(SCHEMA), json.loads(about)
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}: write it anew by `gear-trainer audit`") from None
