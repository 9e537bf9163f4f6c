"""An evaluation's folder: settings.json, rollouts.jsonl, result.json. Whole chunks of problems are written; a kill loses one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gear_trainer.config import changes
from gear_trainer.errors import ConfigError
from gear_trainer.evaluation.held_out import HeldOut
from gear_trainer.evaluation.scores import Record
from gear_trainer.rollout import Rollout
from gear_trainer.runs.files import write_whole
from gear_trainer.tasks.base import Problem

SETTINGS, ROLLOUTS, RESULT = "settings.json", "rollouts.jsonl", "result.json"


def digest(problem: Problem) -> str:
    """A name of what a problem asks: its messages, tools and answer."""
    asked = [problem.messages, problem.tools, problem.answer]
    return hashlib.blake2b(json.dumps(asked, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def record(held: HeldOut, r: Rollout) -> Record:
    """A rollout as one JSON object."""
    decode = held.chat.tokenizer.decode
    last = [token for token, turn, own in zip(r.ids, r.turn_ids, r.mask, strict=True) if own and turn == r.turns - 1]
    text = decode(last[:-1]) if last and r.status.value != "length" else None  # a turn that was cut answers nothing
    return {
        "index": r.group,
        "sample": r.sample,
        "problem": r.problem.id,
        "digest": digest(r.problem),
        "category": r.problem.category,
        "end": r.status.value,
        "success": r.success,
        "reward": r.reward,
        "metrics": r.metrics,
        "vote": None if text is None else held.task.vote(r.problem, text),
        "turns": r.turns,
        "calls": r.calls,
        "errors": r.errors,
        "tokens": len(r.policy_positions),
        "failures": r.failures,
        "texts_escaped": r.escaped,
        "replies_cut": r.cut,
        "answer": r.problem.answer,
        "prompt": None if r.sample else decode(r.prompt_ids),  # the same for all samples of a problem
        "response": decode(r.ids),
        "passages": passages(r, decode),
    }


def passages(r: Rollout, decode: Callable[[list[int]], str]) -> list[tuple[int, int]]:
    """Where the response's turns end: (turn, characters) for each, in order; turn is -1 for the replies between them."""
    owners = [turn if own else -1 for turn, own in zip(r.turn_ids, r.mask, strict=True)]
    last = [i for i, owner in enumerate(owners) if owners[i + 1 : i + 2] != [owner]]
    ends = [len(decode(r.ids[: i + 1])) for i in last]  # of all that is before: a part by itself may decode otherwise
    return [(owners[i], end - begin) for i, begin, end in zip(last, [0, *ends], ends, strict=False)]


class Folder:
    """The files of one evaluation of one set. Raises ConfigError where an evaluation of other settings stands there."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, json.loads(json.dumps(settings, default=str))
        keep_settings(path, self.settings, "an evaluation")

    def begun(self, chunks: Sequence[Sequence[int]], samples: int) -> dict[int, list[Record]]:
        """The rollouts of the chunks that are there whole, by the chunk's number; the rest is removed from the file.

        A chunk in which an environment broke off is not: it is sampled again, for the service may be back.
        """
        found: dict[int, list[Record]] = {}
        lines = read_records(self.path)
        for number, chunk in enumerate(chunks):
            wanted = {(i, k) for i in chunk for k in range(samples)}
            own = [r for r in lines if (r["index"], r["sample"]) in wanted]
            if len(own) == len(wanted) and not any(r["end"] == "error" for r in own):
                found[number] = own
        kept = [json.dumps(r) + "\n" for records in found.values() for r in records]
        write_whole(self.path / ROLLOUTS, "".join(kept))
        return found

    def add(self, records: Sequence[Record]) -> None:
        """Append a chunk and have it on the disk."""
        with (self.path / ROLLOUTS).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json; the same rollouts give the same bytes."""
        write_whole(self.path / RESULT, json.dumps(result, indent=1))


def keep_settings(path: Path, settings: dict[str, Any], what: str) -> None:
    """Write the settings of `what` into its folder. Raises ConfigError where one of other settings stands there."""
    path.mkdir(parents=True, exist_ok=True)
    before = read_json(path / SETTINGS) if (path / SETTINGS).is_file() else settings
    if differing := changes(before, settings):
        raise ConfigError(f"{path} holds {what} of other settings ({'; '.join(differing[:4])}): give another --out, or remove it")
    write_whole(path / SETTINGS, json.dumps(settings, indent=1))


def read_records(path: Path) -> list[Record]:
    """The rollouts of an evaluation's folder; a last line that a kill cut short is left out."""
    file, found = path / ROLLOUTS, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def read_result(path: Path) -> dict[str, Any]:
    """The result of a finished evaluation's folder. Raises ConfigError where there is none."""
    if not (path / RESULT).is_file():
        near = ", ".join(sorted(str(p.parent) for p in path.glob(f"*/{RESULT}"))) or "none below it"
        raise ConfigError(f"{path}: no finished evaluation there ({RESULT} is missing; {near}): give its folder")
    return read_json(path / RESULT)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of an evaluation holds. Raises ConfigError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}): remove the folder and evaluate again") from None
