"""ACEBench normal and special: one turn, calls or a diagnosis, judged by the official checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from gear_trainer.tasks.acebench.calls import Call, call_list, diagnosis, gold_calls, schemas
from gear_trainer.tasks.acebench.data import (
    DIALOGUES,
    GROUPS,
    NORMAL,
    SPECIAL,
    Item,
    categories_of,
    read_items,
    split_items,
    without_outdated,
)
from gear_trainer.tasks.acebench.package import AceBench, load
from gear_trainer.tasks.base import End, Episode, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import SOLUTION, load_template, taught
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.tool_calls import OPEN, ToolCall, calls_turn, read_call, split_calls, spoken

LONGEST = 20_000  # characters of a turn that are parsed; the longest gold answer has 1,700
# The leaderboard's weights; what a task has not is left out, and the rest weighed to 1.
WEIGHTS = {"normal": 0.578, "special": 0.2676, "agent": 0.1545}


class AceEpisode(Episode):
    """One turn. A turn cut by the length limit never reaches `step`, so it scores 0, as `cut`."""

    def __init__(self, ace: AceBench, problem: Problem):
        self.ace, self.item, self.native = ace, problem.data["item"], problem.tools is not None
        self.text: str | None = None

    def step(self, text: str) -> Reply:
        """Keep the turn; it is checked once, in `outcome`."""
        self.text = spoken(text).strip()[:LONGEST]
        return Reply(calls=self.text.count(OPEN if self.native else "("))

    def outcome(self, end: End) -> Outcome:
        """1 where the official checker accepts the turn. metrics: the reason of a 0, a share each in a report."""
        verdict = "cut" if self.text is None else self._verdict(self.text)
        reasons = ("cut", "undecodable", "checker_failed", "wrong")
        return Outcome(float(verdict == "right"), verdict == "right", {name: float(verdict == name) for name in reasons})

    def _verdict(self, text: str) -> str:
        item = self.item
        try:
            if item.category in SPECIAL:
                checked = self.ace.checker.check_special_answer(text, item.truth, item.category)
            else:
                try:
                    calls = self._calls(text)
                except Exception:  # model text: whatever the parser trips over is no call
                    return "undecodable"
                checked = self.ace.checker.check_normal_answer(item.row["function"], calls, item.truth, item.category)
        except Exception:  # the official checker raises on some schemas and values
            return "checker_failed"
        return "right" if checked["valid"] else "wrong"

    def _calls(self, text: str) -> list[Call]:
        if not self.native:
            return self.ace.parser.decode_calls(text, self.item.category)
        names = [function["name"] for function in self.item.row["function"]]
        read = [read_call(body, names) for body in split_calls(text)]
        if not read or any(isinstance(call, str) for call in read):
            raise ValueError("no call, or a broken one")
        return [{call.name: call.arguments} for call in read if not isinstance(call, str)]


@dataclass(frozen=True)
class AceBenchTask(Task):
    """ACEBench normal and special (English). It is a test set: every row is held out unless `train_share` says otherwise.

    path: the folder with `data_<category>.json` and `possible_answer/`. categories: groups (normal, special, atom, single_turn,
    multi_turn) and categories, parted by commas. prompt: "official", text calls as the leaderboard has them; "tools", schemas and
    tool calls through the chat template, another protocol (special problems keep the official prompt, their answers are
    sentences of it). teacher_template: a text file with {prompt} and {answer}.
    """

    path: str
    categories: str = "normal,special"
    seed: int = 0
    prompt: Literal["official", "tools"] = "official"
    train_share: float = 0.0
    teacher_template: str | None = None

    def __post_init__(self) -> None:
        if self.prompt not in ("official", "tools"):
            raise TaskError(f'prompt: {self.prompt!r} is not "official" or "tools"')
        _ = self._ace, self._template, self._items  # what is wrong with them is said before any engine starts

    @cached_property
    def _ace(self) -> AceBench:
        return load()

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    @cached_property
    def _items(self) -> tuple[list[Item], list[Item]]:
        items = read_items(self.path, categories_of(self.categories, (*NORMAL, *SPECIAL)))
        return split_items(without_outdated(items), self.train_share)

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(self.seed, len(self._items[0]))

    def gold(self, item: Item) -> str:
        """The turn of an answer, as the prompt asks for it."""
        if item.category in SPECIAL:
            return diagnosis(item.category, item.truth)
        calls = gold_calls(item.truth)
        if self.prompt == "official":
            return call_list(calls)
        return calls_turn(ToolCall(name, arguments) for call in calls for name, arguments in call.items())

    def problem(self, item: Item) -> Problem:
        """The problem of a row."""
        system, question = self._ace.prompts.build_single_turn_prompts(item.row, item.category, "en")
        tools = None
        if self.prompt == "tools" and item.category in NORMAL:
            tools = schemas(item.row["function"])
            system = "\n".join(str(item.row[name]) for name in ("time", "profile") if item.row.get(name))
        head = [{"role": "system", "content": system}] if system else []
        messages, gold = [*head, {"role": "user", "content": question}], self.gold(item)
        return Problem(item.id, messages, taught(messages, self._template, gold), gold, tools, item.category, data={"item": item})

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of the training rows."""
        rows = self._items[0]
        if not rows:
            raise TaskError("ACEBench is a test set, all of it held out: set train_share, as 0.5, to train on a part of it")
        return self.problem(rows[self._order.row(index)])

    def held_out(self, count: int) -> list[Problem]:
        """Held-out rows in a mixed order, the rows of a dialogue side by side."""
        return [self.problem(item) for item in self._items[1][:count]]

    def episode(self, problem: Problem) -> AceEpisode:
        return AceEpisode(self._ace, problem)

    def report(self, scored: Sequence[tuple[Problem, Outcome]]) -> dict[str, float]:
        """The means of the metrics, accuracies of categories and groups, and `overall` by the leaderboard's weights.

        A dialogue counts where all its rows are right; `multi_turn_process` is the share of right rows.
        """
        return super().report(scored) | accuracies(scored)


def accuracies(scored: Sequence[tuple[Problem, Outcome]]) -> dict[str, float]:
    """Accuracy of each category and group, unweighted means of categories, and the weighted whole."""
    found = {
        c: [(p.data["item"], o.success) for p, o in scored if p.category == c]
        for c in dict.fromkeys(p.category for p, _ in scored)
    }
    means = {category: _accuracy(category, rows) for category, rows in found.items()}
    groups = {}
    for group, members in GROUPS.items():
        here = [means[category] for category in members if category in means]
        if here:
            groups[group] = sum(here) / len(here)
    whole = {name: weight for name, weight in WEIGHTS.items() if name in groups}
    numbers = means | groups
    if whole:
        numbers["overall"] = sum(weight * groups[name] for name, weight in whole.items()) / sum(whole.values())
    rows = [_dialogue_shares(found[category])[1] for category in DIALOGUES if category in found]
    return numbers | ({"multi_turn_process": sum(rows) / len(rows)} if rows else {})


def _accuracy(category: str, rows: list[tuple[Item, bool]]) -> float:
    if category in DIALOGUES:
        return _dialogue_shares(rows)[0]
    return sum(right for _, right in rows) / len(rows)


def _dialogue_shares(rows: list[tuple[Item, bool]]) -> tuple[float, float]:
    """The share of dialogues all right, and the mean share of right rows; the n-th samples of all rows make one dialogue."""
    seen: dict[str, int] = {}
    dialogues: dict[tuple[str, int], list[bool]] = {}
    for item, right in rows:
        sample = seen.get(item.id, 0)
        seen[item.id] = sample + 1
        dialogues.setdefault((item.dialogue, sample), []).append(right)
    shares = [sum(rights) / len(rights) for rights in dialogues.values()]
    return sum(share == 1 for share in shares) / len(shares), sum(shares) / len(shares)
