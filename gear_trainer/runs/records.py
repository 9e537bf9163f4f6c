"""The rollouts that a run keeps: runs/NAME/rollouts/step-NNNNN.parquet, a row a rollout, in whole groups.

A step's file is written whole or not at all, and the same rollouts give the same bytes. Runs of before kept JSON lines, which the
readers here read too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.rollout import Rollout
from gear_trainer.rollout.chat import Chat

Columns = dict[str, list[torch.Tensor | None]]  # by name, for each rollout the values of its policy tokens, or None
COLUMNS = {  # a record's list: the column of the step's experience. signal: g, what the method made of its input `raw_signal`
    "logprobs": "logprobs", "teacher_logprobs": "teacher_logprobs", "entropy": "entropy", "raw_signal": "signal",
    "teacher_entropy": "teacher_entropy", "forward_kl": "forward_kl", "turn_rewards": "turn_rewards", "anchors": "anchors",
    "signal": "normalised", "segment": "segments", "weight": "weights", "token_advantages": "token_advantages",
}  # fmt: skip

_ROW = {
    "problem": pa.string(),
    "group": pa.int32(),
    "sample": pa.int32(),
    "reward": pa.float64(),
    "success": pa.bool_(),
    "advantage": pa.float64(),
    "end": pa.string(),  # done | turns | length | error
    "calls": pa.int32(),
    "errors": pa.int32(),
    "truncated": pa.bool_(),
    "failures": pa.list_(pa.string()),
    "dropped": pa.bool_(),
    "texts_escaped": pa.int32(),
    "replies_cut": pa.int32(),
    "prompt": pa.string(),
    "response": pa.string(),
    "answer": pa.string(),
    "reference": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
}
_TOKENS = {  # over `ids`; but for the first four null on tool replies. Floats without a name here are float32
    "ids": pa.int32(),
    "tokens": pa.string(),
    "mask": pa.bool_(),
    "turn": pa.int32(),  # the assistant turn, -1 on replies
    "sampler_logprobs": pa.float32(),
    "versions": pa.int32(),
    "segment": pa.int32(),
    "anchors": pa.int64(),
}
_TOGETHER = 32  # rows that lie together in the file: who wants a group reads no more than these
LISTS = (*_TOKENS, *(name for name in COLUMNS if name not in _TOKENS))
SCHEMA = pa.schema([*_ROW.items(), *((name, pa.list_(_TOKENS.get(name, pa.float32()))) for name in LISTS)])


class Records:
    """Makes the rows of this rank's share, so that rank 0 has nothing to do but to write them."""

    def __init__(self, cfg: Config, chat: Chat):
        self.share = _share(cfg)
        self.chat = chat
        # one call for every token that ever came, not for every place where one stands: 15 to 25 us each
        self.piece = functools.cache(lambda token: chat.tokenizer.decode([token]))

    def rows(self, rollouts: list[Rollout], advantages: list[float], columns: Columns) -> pa.Table:
        """The first of this rank's groups, which are as good a sample as any: problems come in no order."""
        kept = list(zip(rollouts, advantages, strict=True))[: self.share]
        return pa.Table.from_pylist([self._record(r, a, columns, i) for i, (r, a) in enumerate(kept)], schema=SCHEMA)

    def gathered(self, rollouts: list[Rollout], advantages: list[float], columns: Columns) -> pa.Table | None:
        """All ranks' rows on rank 0, nothing on the others. Collective."""
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.rows(rollouts, advantages, columns), parts)
        return pa.concat_tables(parts) if parts else None

    def text(self, r: Rollout, advantage: float) -> str:
        """A rollout to be read: what it earned, its prompt and its turns, without characters that a terminal would obey."""
        earned = f"reward {r.reward:g}, {'success' if r.success else 'no success'}, advantage {advantage:+.3f}, {r.status.value}"
        prompt, response = (self.chat.tokenizer.decode(ids) for ids in (r.prompt_ids, r.ids))
        text = f"problem {r.problem.id}: {earned}\nPROMPT\n{prompt}\nRESPONSE\n{response}\nANSWER {r.problem.answer}"
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)

    def _record(self, r: Rollout, advantage: float, columns: Columns, i: int) -> dict[str, Any]:
        """A rollout as a row of SCHEMA."""
        return {
            "problem": _utf8(r.problem.id),
            "group": r.group,
            "sample": r.sample,
            "reward": r.reward,
            "success": r.success,
            "advantage": advantage,
            "end": r.status.value,
            "calls": r.calls,
            "errors": r.errors,
            "truncated": r.truncated,
            "failures": [_utf8(line) for line in r.failures],
            "dropped": r.dropped,
            "texts_escaped": r.escaped,
            "replies_cut": r.cut,
            "prompt": _utf8(self.chat.tokenizer.decode(r.prompt_ids)),
            "response": _utf8(self.chat.tokenizer.decode(r.ids)),
            "answer": _utf8(r.problem.answer),
            "reference": None if r.reference is None else _utf8(r.reference),
            "prompt_ids": r.prompt_ids,
            "ids": r.ids,
            "tokens": [_utf8(self.piece(t)) for t in r.ids],
            "mask": r.mask,
            "turn": [t if m else -1 for t, m in zip(r.turn_ids, r.mask, strict=True)],
            "sampler_logprobs": [x if m else None for x, m in zip(r.sampler_logprobs, r.mask, strict=True)],
            "versions": [v if v >= 0 else None for v in r.versions],
            **{key: _over_ids(columns[name][i], r.mask) for key, name in COLUMNS.items()},
        }


def _over_ids(values: torch.Tensor | None, mask: list[bool]) -> list[float | None] | None:
    """Each policy token's value over all tokens, None on tool replies."""
    if values is None:
        return None
    given = iter(values.tolist())
    return [next(given) if is_policy else None for is_policy in mask]


def _utf8(text: str) -> str:
    """The text as UTF-8 can say it: half a surrogate pair, as in a data set's broken JSON, becomes its escape."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _share(cfg: Config) -> int:
    """Rollouts that each rank keeps of a step: whole groups, as many on every rank."""
    r = cfg.rollout
    groups = -(-r.records // (r.group_size * cfg.world_size))
    return min(groups, cfg.prompts_per_rank) * r.group_size


# --- files ------------------------------------------------------------------------------------------------------------------


def records_path(run_dir: Path, step: int) -> Path:
    """The file of a step's rollouts; that of a run of before, JSON lines, only where it is the one that is there."""
    path = run_dir / "rollouts" / f"step-{step:05d}.parquet"
    before = path.with_suffix(".jsonl")
    return before if before.is_file() and not path.is_file() else path


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps of which a run kept rollouts, in order."""
    files = (run_dir / "rollouts").glob("step-*")
    return sorted({int(path.stem.split("-")[1]) for path in files if path.suffix in (".parquet", ".jsonl")})


def to_bytes(rows: pa.Table) -> bytes:
    """The file of these rows: Parquet, the same bytes for the same rows."""
    out = pa.BufferOutputStream()
    pq.write_table(rows, out, compression="zstd", row_group_size=_TOGETHER)
    return out.getvalue().to_pybytes()


def read_table(run_dir: Path, step: int, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None) -> pa.Table:
    """The rollouts that a run kept of a step, ordered by rank: a row each, by SCHEMA or some of its columns, all groups or some.

    What a run of before did not keep is null. Raises FileNotFoundError where the run kept none.
    """
    path, names = records_path(run_dir, step), list(columns or SCHEMA.names)
    read = [*names, *({"group"} - set(names))]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        table = pa.Table.from_pylist([_of_before(row) for row in rows], schema=SCHEMA)
    else:
        file = pq.ParquetFile(path)
        table = file.read(columns=read) if groups is None else file.read_row_groups(_parts(file, groups), columns=read)
        for name in names:  # of a file that an earlier version wrote
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    return (table if groups is None else of_groups(table, groups)).select(names)


def of_groups(table: pa.Table, groups: Sequence[int]) -> pa.Table:
    """The rows of these groups, out of a table with a column `group`."""
    wanted = set(groups)
    return table.filter(pa.array([group in wanted for group in table.column("group").to_pylist()], pa.bool_()))


def _parts(file: pq.ParquetFile, groups: Sequence[int]) -> list[int]:
    """The file's row groups that may hold one of these groups of rollouts."""
    place = file.schema_arrow.names.index("group")
    assert all(not pa.types.is_nested(field.type) for field in list(file.schema_arrow)[:place])  # so it is the column's place too
    bounds = [file.metadata.row_group(i).column(place).statistics for i in range(file.num_row_groups)]
    return [i for i, own in enumerate(bounds) if own is None or any(own.min <= group <= own.max for group in groups)]


def read_records(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """As `read_table`, a dict a rollout. Raises FileNotFoundError where the run kept none."""
    return read_table(run_dir, step).to_pylist()


def _of_before(row: dict[str, Any]) -> dict[str, Any]:
    """A rollout of JSON lines as a row of SCHEMA: its mask was of 0 and 1, its texts anything that Python holds."""
    row = {name: _utf8(value) if isinstance(value, str) else value for name, value in row.items()}
    row["tokens"], row["mask"] = [_utf8(t) for t in row["tokens"]], [bool(m) for m in row["mask"]]
    row["answer"] = None if row.get("answer") is None else str(row["answer"])
    return row
