"""A page's data: runs, audits, evaluations and studies as one JSON object (`manifest`), rollouts as packed columns (`pack`).

A pack is binary, gzipped: a little-endian uint32, the length of a JSON header; the header; then its columns, each of them a block
of four byte planes (all lowest bytes first, which compresses better) or, where it is of bytes, as it is. page/data.js reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from gear_kernels.methods import METHODS
from gear_trainer.audit import file as audit_file
from gear_trainer.errors import ConfigError
from gear_trainer.evaluation.records import RESULT
from gear_trainer.report import evaluation, study
from gear_trainer.report.health import silent_tails, warnings
from gear_trainer.report.samples import samples
from gear_trainer.report.statistics import band
from gear_trainer.report.study import FIGURES
from gear_trainer.report.tables import described
from gear_trainer.runs.files import noted_end, read_metrics, read_whole
from gear_trainer.runs.records import SCHEMA, of_groups, read_table, recorded_steps
from gear_trainer.runs.registry import look
from gear_trainer.runs.trackers import flat

AUDIT = "audit.parquet"
_FILES = {".parquet": "audit", ".json": "study"}  # by suffix, of files of any name but RESULT
HIDDEN = ("segmenter", "seed", "decay_steps")  # fields of methods that the page offers no control for
LEFT_OUT = ("random",)  # its places are drawn by Python's generator
SCALARS = (
    "problem", "group", "sample", "reward", "success", "advantage", "end", "calls", "errors", "truncated", "answer", "reference",
    "prompt", "vote", "deviation", "v0",
)  # fmt: skip


# --- runs ---------------------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """The subject of a page: `run` and `evaluation` by the folder, `audit` by its Parquet file, `study` by its JSON."""

    kind: str
    path: Path


def subject(path: Path) -> Subject:
    """The subject that stands at a path, a folder or a file. Raises ConfigError where it is nothing that has a page."""
    if (path / "config.json").is_file():
        return Subject("run", path)
    if path.is_file() and path.suffix in _FILES:
        return Subject("evaluation", path.parent) if path.name == RESULT else Subject(_FILES[path.suffix], path)
    for kind, found in (("audit", path / AUDIT), ("study", path / FIGURES), ("evaluation", path / RESULT)):
        if found.is_file():
            return Subject(kind, path if kind == "evaluation" else found)
    near = ", ".join(sorted(str(p.parent) for name in (RESULT, FIGURES, AUDIT) for p in path.glob(f"*/{name}")))
    raise ConfigError(
        f"{path}: no run there (config.json is missing), nor an audit, an evaluation or a study"
        f"{f'; there are {near}' if near else ''}; give a run's folder, as runs/NAME, or one of theirs"
    )


def manifest(paths: Sequence[Path], live: bool = False) -> dict[str, Any]:
    """All that a page of these shows beside rollouts, as JSON takes it. live: the page is served, and asks again.

    Raises ConfigError where a path is none of what `subject` knows.
    """
    runs = [describe(path) for path in paths]
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):  # of the same name in two folders
        for run, path in zip(runs, paths, strict=True):
            run["name"] = str(path)
    return {
        "title": ", ".join(run["name"] for run in runs),
        "live": live,
        "stamp": stamp(paths) if live else "",
        "runs": runs,
        "bands": bands(runs),
        "methods": methods(),
    }


def stamp(paths: Sequence[Path]) -> str:
    """A name of all that `manifest` says of these now; empty where a run goes on, for its state changes without a file's doing.

    Raises ConfigError as `subject` does.
    """
    files: list[Path] = []
    for kind, found in map(subject, paths):
        if kind == "run" and not noted_end(found):
            return ""
        files += (
            [found, *found.glob("*.json*"), found / "rollouts", *found.glob(f"audit/*/{AUDIT}")] if found.is_dir() else [found]
        )
    seen = [(str(file), own.st_mtime_ns, own.st_size) for file in sorted(files) if file.exists() for own in [file.stat()]]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def describe(path: Path) -> dict[str, Any]:
    """A run, an audit, an evaluation or a study as the page shows it. Raises ConfigError where it is none of them."""
    kind, found = subject(path)
    if kind == "audit":
        _, about = audit_file.read(found)
        name = found.parent.name if found.name == AUDIT else found.stem
        config = json.dumps(about, indent=2)
        return described(name, kind, task=about.get("task", ""), recorded=[kind], config=config)
    if kind == "evaluation":
        return evaluation.describe(found)
    return study.describe(found) if kind == "study" else _run(found)


def _run(folder: Path) -> dict[str, Any]:
    cfg = read_whole(folder / "config.json") or {}
    metrics = read_metrics(folder / "metrics.jsonl")
    run = look(folder, metrics)
    steps = recorded_steps(folder)
    credit = cfg.get("credit", "")
    return described(
        folder.name,
        "run",
        credit=credit,
        method=_method(credit, cfg.get("credit_args") or {}),
        task=cfg.get("task", ""),
        state=run.state,
        why=run.why,
        step=run.step,
        steps=run.steps,
        series=series(metrics),
        recorded=[*steps, *(f"audit/{path.parent.name}" for path in sorted(folder.glob(f"audit/*/{AUDIT}")))],
        config=json.dumps(cfg, indent=2),
        warnings=[w._asdict() for w in warnings(metrics, _silent(folder, steps[-1]) if steps else None)],
    )


@functools.lru_cache(maxsize=64)  # a live page asks again and again, and a step's file stays as it is
def _silent(folder: Path, step: int) -> float | None:
    return silent_tails(read_table(folder, step, ["raw_signal", "mask"]))


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


def rollouts(path: Path, key: int | str, groups: Sequence[int] | None = None) -> pa.Table:
    """The rollouts of a run's step, of its audit (`audit/NAME`), of an audit (`audit`) or an evaluation (`samples`): a row each.

    groups: these alone. Raises FileNotFoundError where there are none.
    """
    if isinstance(key, int):
        return read_table(path, key, groups=groups)
    if key == evaluation.SAMPLES:
        return samples(subject(path).path, groups)
    file = subject(path).path if key == "audit" else path / key / AUDIT
    if file.suffix != ".parquet":
        raise FileNotFoundError(f"{path}: {key}")
    table = _of_audit(audit_file.read(file)[0])
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


def rows(path: Path, key: int | str) -> list[dict[str, Any]]:
    """The rollouts of a step or an audit without their tokens, prompts and references, see `scalars`."""
    wanted = [name for name in (*SCALARS, "mask") if name not in ("prompt", "reference")]
    if isinstance(key, int):
        return scalars(read_table(path, key, [name for name in wanted if name in SCHEMA.names]))
    table = rollouts(path, key)
    return scalars(table.select([name for name in wanted if name in table.column_names]))


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
    """The first groups with an advantage, or of any where none has one, as many as fit."""
    own, advantages = table.column("group").to_pylist(), table.column("advantage").to_pylist()
    taught = any(advantages)
    groups = list(dict.fromkeys(group for group, advantage in zip(own, advantages, strict=True) if advantage or not taught))
    while groups:
        packed = pack(of_groups(table, groups))
        if len(packed) <= budget:
            return packed
        groups = groups[: len(groups) * budget // (len(packed) + 1) or len(groups) - 1]
    return None
