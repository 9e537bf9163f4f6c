"""A page's data: runs as one JSON object (`manifest`), and the rollouts of a step as packed columns (`pack`).

A pack is binary, gzipped: a little-endian uint32, the length of a JSON header; the header; then its columns, each of them a block
of four byte planes (all lowest bytes first, which compresses better) or, where it is of bytes, as it is. page/data.js reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gear_kernels.methods import METHODS
from gear_trainer.audit import file as audit_file
from gear_trainer.errors import ConfigError
from gear_trainer.report.health import silent_tails, warnings
from gear_trainer.report.statistics import band
from gear_trainer.runs.files import read_metrics, read_whole
from gear_trainer.runs.records import of_groups, read_table, recorded_steps
from gear_trainer.runs.registry import look
from gear_trainer.runs.trackers import flat

AUDIT = "audit.parquet"
HIDDEN = ("segmenter", "seed", "decay_steps")  # fields of methods that the page offers no control for
LEFT_OUT = ("random",)  # its places are drawn by Python's generator
SCALARS = (
    "problem", "group", "sample", "reward", "success", "advantage", "end", "calls", "errors", "truncated", "answer", "reference",
    "prompt",
)  # fmt: skip


# --- runs ---------------------------------------------------------------------------------------------------------------------


def manifest(folders: Sequence[Path], live: bool = False) -> dict[str, Any]:
    """All that a page of these runs shows beside rollouts, as JSON takes it. live: the page is served, and asks again.

    Raises ConfigError where a folder is neither a run's nor an audit's.
    """
    runs = [describe(folder) for folder in folders]
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):  # of the same name in two folders
        for run, folder in zip(runs, folders, strict=True):
            run["name"] = str(folder)
    return {
        "title": ", ".join(run["name"] for run in runs),
        "live": live,
        "runs": runs,
        "bands": bands(runs),
        "methods": methods(),
    }


def describe(folder: Path) -> dict[str, Any]:
    """A run as the page shows it; or an audit, which has no steps. Raises ConfigError where it is neither."""
    if not (folder / "config.json").is_file():
        if (folder / AUDIT).is_file():
            return _audit_alone(folder)
        raise ConfigError(f"{folder}: no run there (config.json is missing); give a run's folder, as runs/NAME, or an audit's")
    cfg = read_whole(folder / "config.json") or {}
    metrics, run = read_metrics(folder / "metrics.jsonl"), look(folder)
    steps = recorded_steps(folder)
    credit = cfg.get("credit", "")
    return {
        "name": folder.name,
        "credit": credit,
        "method": _method(credit, cfg.get("credit_args") or {}),
        "task": cfg.get("task", ""),
        "state": run.state,
        "why": run.why,
        "step": run.step,
        "steps": run.steps,
        "series": series(metrics),
        "recorded": [*steps, *(f"audit/{path.parent.name}" for path in sorted(folder.glob(f"audit/*/{AUDIT}")))],
        "config": json.dumps(cfg, indent=2),
        "warnings": [w._asdict() for w in warnings(metrics, _silent(folder, steps[-1]) if steps else None)],
    }


@functools.lru_cache(maxsize=64)  # a live page asks again and again, and a step's file stays as it is
def _silent(folder: Path, step: int) -> float | None:
    return silent_tails(read_table(folder, step, ["raw_signal", "mask"]))


def _audit_alone(folder: Path) -> dict[str, Any]:
    _, about = audit_file.read(folder / AUDIT)
    return {
        "name": folder.name, "credit": "", "method": None, "task": about.get("task", ""), "state": "audit", "why": "", "step": 0,
        "steps": 0, "series": {}, "recorded": ["audit"], "config": json.dumps(about, indent=2), "warnings": [],
    }  # fmt: skip


def _method(credit: str, args: dict[str, Any]) -> dict[str, Any] | None:
    """The run's credit method as the page can compute it; None of a user's own, of a loss alone, and of random."""
    for name in credit.split("+"):
        if name in METHODS and name not in LEFT_OUT:
            return {"name": name, "fields": args}
    return None


def series(metrics: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Each number of the steps by its name as metrics.jsonl has it, `/` between levels: [steps, values] where there is one."""
    found: dict[str, list[list[float]]] = {}
    for values in metrics:
        for name, value in flat(values).items():
            if math.isfinite(value) and not isinstance(value, bool):
                steps, own = found.setdefault(name, [[], []])
                steps.append(values["step"])
                own.append(value)
    return found


def bands(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one method together: each number's mean over them with its 95 % interval, where there are two at least."""
    together: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["series"]:
            together.setdefault(run["credit"], []).append(run)
    out = []
    for credit, own in together.items():
        if len(own) < 2:
            continue
        found = {}
        for name in {name for run in own for name in run["series"]}:
            curves = [dict(zip(*run["series"][name], strict=True)) for run in own if name in run["series"]]
            if len(curves) > 1:
                found[name] = [[step, e.mean, e.low, e.high] for step, e in band(curves)]
        out.append({"name": f"{credit}, mean of {len(own)}", "runs": [runs.index(run) for run in own], "series": found})
    return out


def methods() -> dict[str, dict[str, Any]]:
    """The credit methods that the page computes: class, fields with their values, what is offered of them, and what they read."""
    found = {}
    for name, method in METHODS.items():
        if name not in LEFT_OUT:
            fields = dataclasses.asdict(method)
            offered = [field for field in fields if field not in HIDDEN]
            found[name] = {"kind": type(method).__name__, "fields": fields, "offered": offered, "needs": list(method.needs)}
    return found


# --- rollouts -----------------------------------------------------------------------------------------------------------------


def rollouts(folder: Path, key: int | str, groups: Sequence[int] | None = None) -> pa.Table:
    """The rollouts of a step, or of an audit (`audit/NAME`, `audit` of a folder that is one's): a row each, all groups or these.

    Raises FileNotFoundError where there are none.
    """
    if isinstance(key, int):
        return read_table(folder, key, groups=groups)
    table, _ = audit_file.read((folder if key == "audit" else folder / key) / AUDIT)
    table = _of_audit(table)
    return table if groups is None else of_groups(table, groups)


def _of_audit(table: pa.Table) -> pa.Table:
    """An audit's rows under the names of a run's, with the true advantage of each token, A*_t = V_t - V_{t-1}, nan elsewhere."""
    true, advance = [], table.column("v0").to_pylist()
    for value, mask, before in zip(table.column("value").to_pylist(), table.column("mask").to_pylist(), advance, strict=True):
        row = []
        for v, is_policy in zip(value, mask, strict=True):
            row.append(v - before if is_policy else math.nan)
            before = v if is_policy else before
        true.append(row)
    table = table.append_column("true_advantage", pa.array(true, pa.list_(pa.float32())))
    for teacher in audit_file.TEACHERS:
        lists = (table.column(name).to_pylist() for name in ("logprobs", f"teacher_logprobs/{teacher}"))
        k1 = [None if taught is None else np.subtract(own, taught, dtype=np.float32) for own, taught in zip(*lists, strict=True)]
        table = table.append_column(f"k1/{teacher}", pa.array(k1, pa.list_(pa.float32())))
    return table


def rows(folder: Path, key: int | str) -> list[dict[str, Any]]:
    """The rollouts of a step or an audit without their tokens, prompts and references, see `scalars`."""
    wanted = [name for name in SCALARS if name not in ("prompt", "reference")]
    table = read_table(folder, key, [*wanted, "mask"]) if isinstance(key, int) else rollouts(folder, key)
    return scalars(table.select([name for name in (*wanted, "mask") if name in table.column_names]))


def scalars(table: pa.Table) -> list[dict[str, Any]]:
    """Each rollout without its tokens, but for `length`, how many the policy said. None: not finite, which JSON cannot say."""
    found = table.select([name for name in SCALARS if name in table.column_names]).to_pylist()
    mask = table.column("mask").combine_chunks()
    said = np.concatenate([[0], np.cumsum(mask.flatten().to_numpy(zero_copy_only=False))])
    bounds = [0, *np.cumsum(mask.value_lengths().to_numpy())]
    for row, begin, end in zip(found, bounds[:-1], bounds[1:], strict=True):
        row["length"] = int(said[end] - said[begin])
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None
    return found


def pack(table: pa.Table) -> bytes:
    """The rollouts with their tokens, as the module says. A column that no rollout has is left out; null floats are NaN."""
    lengths = table.column("ids").combine_chunks().value_lengths().to_numpy().astype(np.int64)
    pieces = table.column("tokens").combine_chunks().flatten().dictionary_encode()
    columns = {"piece": pieces.indices.to_numpy(zero_copy_only=False).astype(np.int32)}
    for field in table.schema:
        if pa.types.is_list(field.type) and field.name not in ("tokens", "failures", "prompt_ids"):
            found = _flat(table.column(field.name), lengths)
            if found is not None:
                columns[field.name] = found
    if "raw_signal" not in columns and {"logprobs", "teacher_logprobs"} <= columns.keys():  # a run of before: k1, its sampled KL
        columns["raw_signal"] = columns["logprobs"] - columns["teacher_logprobs"]
    blocks = [_planes(column) for column in columns.values()]
    header = {
        "rows": scalars(table),
        "starts": [0, *lengths.cumsum().tolist()],
        "pieces": pieces.dictionary.to_pylist(),
        "columns": [[name, column.dtype.str[1:]] for name, column in columns.items()],
    }
    text = json.dumps(header).encode()
    return gzip.compress(struct.pack("<I", len(text)) + text + b"".join(blocks), 6, mtime=0)


def _flat(column: pa.ChunkedArray, lengths: np.ndarray) -> np.ndarray | None:
    """A list column over all tokens: float32 with NaN, int32 with -1, or uint8 of booleans; None where every row is null."""
    lists = column.combine_chunks()
    there = np.repeat(~np.asarray(lists.is_null()), lengths)
    if not there.any():
        return None
    values = lists.flatten()
    if pa.types.is_floating(values.type):
        out = np.full(len(there), np.nan, dtype=np.float32)
        out[there] = values.to_numpy(zero_copy_only=False)
        return out
    if pa.types.is_boolean(values.type):
        return values.to_numpy(zero_copy_only=False).astype(np.uint8)
    numbers = values.fill_null(-1).to_numpy(zero_copy_only=False)
    if pa.types.is_int64(values.type):  # anchors are names, seen by whether they agree: small ones say the same
        numbers = np.unique(numbers, return_inverse=True)[1]
    out = np.full(len(there), -1, dtype=np.int32)
    out[there] = numbers
    return out


def _planes(column: np.ndarray) -> bytes:
    if column.dtype.itemsize == 1:
        return column.tobytes()
    return column.astype(column.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, 4).T.tobytes()


# --- the sample that a page of its own carries --------------------------------------------------------------------------------


def sample(folders: Sequence[Path], shown: dict[str, Any], budget: int) -> dict[str, bytes]:
    """Packs for a page that asks nobody: by `RUN/KEY`, as many as fit the budget (bytes).

    Runs take turns: each gives its audits, its last step, its first, then those that halve the widest gap. A run's first that
    does not fit whole gives its first groups with an advantage. What there is is stated in `shown` (each run's `sample`).
    """
    found: dict[str, bytes] = {}
    orders = [_order(run["recorded"]) for run in shown["runs"]]
    for turn in range(max(map(len, orders), default=0)):
        for number, (folder, order) in enumerate(zip(folders, orders, strict=True)):
            if turn < len(order):
                left = budget - sum(map(len, found.values()))
                table = rollouts(folder, order[turn])
                packed = pack(table)
                if len(packed) > left and not any(key.startswith(f"{number}/") for key in found):
                    packed = _part(table, left // (len(folders) - number))
                if packed and len(packed) <= left:
                    found[f"{number}/{order[turn]}"] = packed
    for number, run in enumerate(shown["runs"]):
        run["sample"] = [key for key in run["recorded"] if f"{number}/{key}" in found]
    return found


def _order(recorded: Sequence[int | str]) -> list[int | str]:
    """The audits, then steps: the last, the first, and so on by halving."""
    steps = [key for key in recorded if isinstance(key, int)]
    places, spans = list(dict.fromkeys([len(steps) - 1, 0])) if steps else [], [(0, len(steps) - 1)]
    for low, high in spans:
        if high - low > 1:
            middle = (low + high) // 2
            places.append(middle)
            spans += [(low, middle), (middle, high)]
    return [*(key for key in recorded if isinstance(key, str)), *(steps[place] for place in places)]


def _part(table: pa.Table, budget: int) -> bytes | None:
    """The first groups with an advantage, as many as fit."""
    advantages = zip(table.column("group").to_pylist(), table.column("advantage").to_pylist(), strict=True)
    groups = list(dict.fromkeys(group for group, advantage in advantages if advantage))
    while groups:
        packed = pack(of_groups(table, groups))
        if len(packed) <= budget:
            return packed
        groups = groups[: len(groups) * budget // (len(packed) + 1) or len(groups) - 1]
    return None
