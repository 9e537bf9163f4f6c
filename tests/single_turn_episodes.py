"""Answers of BFCL's single turns and of ACEBench made from the ground truth: as it is, cut short, changed, reordered; judged by
our episodes and by the package's own way from a model's text to a verdict.

    python tests/single_turn_episodes.py 1000 GEAR_DATA/acebench_en

judges that many of each benchmark, and prints how many of a kind pass and every difference.
"""

from __future__ import annotations

import ast
import importlib
import json
import random
import re
import sys
import types
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bfcl_episodes import changed

from gear_trainer.tasks import Outcome, make_task
from gear_trainer.tasks.acebench import data, package
from gear_trainer.tasks.acebench.agent import FINISH
from gear_trainer.tasks.acebench.calls import call_list, gold_calls
from gear_trainer.tasks.bfcl.package import ast_checker
from gear_trainer.tasks.bfcl.single_turn import CATEGORIES, RELEVANCE
from gear_trainer.tasks.tool_calls import ToolCall, calls_turn

KINDS = ("gold", "truncated", "perturbed", "reordered", "extra", "broken")


class Judged(NamedTuple):
    """One answer under both judges."""

    kind: str
    problem: str
    text: object
    ours: Outcome
    theirs: bool


def mutated(calls, kind, rng):
    """Calls made from those of the ground truth; None where the kind does not apply."""
    calls = [ToolCall(call.name, dict(call.arguments)) for call in calls]
    if not calls:  # where no tool fits
        return calls if kind == "gold" else None
    if kind == "truncated":
        return calls[:-1]
    if kind == "perturbed":
        where = [(call, name) for call in calls for name in call.arguments]
        if not where:
            return None
        call, name = rng.choice(where)
        call.arguments[name] = changed(call.arguments[name], rng)
    if kind == "reordered":
        return calls[::-1] if len(calls) > 1 else None
    if kind == "extra":
        return [*calls, rng.choice(calls)]
    return calls


def answered(task, problem, *turns):
    """Our outcome."""
    episode = task.episode(problem)
    for turn in turns:
        episode.step(turn)
    return episode.outcome("done")


# --- BFCL ---------------------------------------------------------------------------------------------------------------


@cache
def qwen_handler():
    """The two methods of the package's handler for Qwen that read a turn, without the vendors' SDKs that its module imports."""
    file = Path(find_spec("bfcl_eval").submodule_search_locations[0]) / "model_handler" / "local_inference" / "qwen_fc.py"
    wanted = ("decode_ast", "_extract_tool_calls")
    methods = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef) and n.name in wanted]
    for method in methods:
        method.decorator_list = [d for d in method.decorator_list if getattr(d, "id", "") == "staticmethod"]
    body = ast.ClassDef("Handler", [], [], methods, [])
    names = {"re": re, "json": json}
    exec(compile(ast.fix_missing_locations(ast.Module([body], [])), file.name, "exec"), names)
    return names["Handler"]()


def bfcl_verdict(item, category, text):
    """The package's verdict on a turn: as its runner decodes it, then the official checker."""
    try:
        calls = qwen_handler().decode_ast(text, None, False)
    except Exception:  # as the runner does
        calls = None
    if category in RELEVANCE:
        return bool(calls) == (category == "live_relevance")
    plain = isinstance(calls, list) and all(len(call) == 1 and isinstance(next(iter(call.values())), dict) for call in calls)
    return plain and ast_checker()(item["function"], calls, item["ground_truth"], category)["valid"]


def bfcl(count, seed=0):
    """`count` answers to items of every category of one user turn."""
    task, rng, found = make_task("bfcl", 0, {"categories": [*CATEGORIES, *RELEVANCE]}), random.Random(seed), []
    problems = task.held_out(10_000)
    while len(found) < count:
        problem, kind = rng.choice(problems), rng.choice(KINDS)
        item = problem.data["item"]
        gold = [ToolCall(*call) for call in problem.data["gold"]]
        if problem.category == "live_relevance":  # any call is right
            gold = [ToolCall(function["name"], {}) for function in item["function"][:1]]
        if (calls := mutated(gold, kind, rng)) is None:
            continue
        text = calls_turn(calls)
        if kind == "broken":
            text = text[: rng.randrange(len(text))]
        found.append(Judged(kind, problem.id, text, answered(task, problem, text), bfcl_verdict(item, problem.category, text)))
    return found


# --- ACEBench -----------------------------------------------------------------------------------------------------------


def ace_verdict(ace, item, text):
    """The package's verdict on a turn, as its adapter's `match_score` comes to it."""
    try:
        if item.category in data.SPECIAL:
            return ace.checker.check_special_answer(text, item.truth, item.category)["valid"]
        calls = ace.parser.decode_calls(text, item.category)
        return ace.checker.check_normal_answer(item.row["function"], calls, item.truth, item.category)["valid"]
    except Exception:  # text that it cannot decode, values on which its checker raises
        return False


def ace_answer(task, item, kind, rng):
    """An answer as text and, where it has calls, as calls; None where the kind does not apply."""
    if item.category in data.SPECIAL:
        text = task.gold(item)
        cut = {"truncated": text[: len(text) // 2], "broken": text[: rng.randrange(len(text))], "gold": text, "extra": text * 2}
        at = rng.randrange(2, len(text) - 2)
        cut["perturbed"] = text[:at] + "x" + text[at + 1 :]
        return (cut[kind], None) if kind in cut else None
    gold = [ToolCall(name, given) for call in gold_calls(item.truth) for name, given in call.items()]
    if (calls := mutated(gold, kind, rng)) is None:
        return None
    text = call_list([{call.name: call.arguments} for call in calls])
    return (text[: rng.randrange(len(text))], None) if kind == "broken" else (text, calls)


def acebench(folder, count, seed=0):
    """`count` answers to normal and special rows, each as the leaderboard's text and, where they are calls, as tool calls too."""
    tasks = {prompt: make_task("acebench", 0, {"path": folder, "prompt": prompt}) for prompt in ("official", "tools")}
    items, ace, rng, found = data.read_items(folder, (*data.NORMAL, *data.SPECIAL)), package.load(), random.Random(seed), []
    while len(found) < count:
        item, kind = rng.choice(items), rng.choice(KINDS)
        if (answer := ace_answer(tasks["official"], item, kind, rng)) is None:
            continue
        text, calls = answer
        ours = answered(tasks["official"], tasks["official"].problem(item), text)
        found.append(Judged(kind, item.id, text, ours, ace_verdict(ace, item, text)))
        if calls is not None:  # as tool calls: the package's checker is given what was meant
            ours = answered(tasks["tools"], tasks["tools"].problem(item), calls_turn(calls))
            check, given = ace.checker.check_normal_answer, [{call.name: call.arguments} for call in calls]
            try:
                theirs = bool(calls) and check(item.row["function"], given, item.truth, item.category)["valid"]
            except Exception:  # its checker raises on some values
                theirs = False
            found.append(Judged(kind, item.id, calls, ours, theirs))
    return found


@cache
def ace_runner():
    """The package's own loop of multi_step; what it writes for a dashboard is left out, and with it two dozen packages."""
    names = ("evalscope", "evalscope.api", "evalscope.api.agent", "evalscope.api.messages", "evalscope.api.model")
    names += ("evalscope.utils", "evalscope.utils.logger")
    package.load()
    bare = {name: types.ModuleType(name) for name in names}
    root = Path(next(iter(find_spec("evalscope").submodule_search_locations))).parent
    for name in ("evalscope", "evalscope.benchmarks", "evalscope.benchmarks.acebench"):
        bare[name] = bare.get(name) or types.ModuleType(name)
        bare[name].__path__ = [str(root.joinpath(*name.split(".")))]
    for module in bare.values():
        module.__getattr__ = lambda name: lambda *args, **kwargs: types.SimpleNamespace()
    before = {name: sys.modules.get(name) for name in bare}
    sys.modules.update(bare)
    try:
        return importlib.import_module("evalscope.benchmarks.acebench.rollout")
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


def agent_verdict(item, says):
    """End state and process accuracy of the package's own loop around an agent that says this."""
    runner, said = ace_runner(), iter(says)
    ace = package.load()
    worlds = ace.scenarios.load_scenario_instances(item.row.get("initial_config") or {}, item.row["involved_classes"], "en")
    result = types.SimpleNamespace(messages=[], process=[])
    for name in ("_record_execution", "_record_finish", "_record_max_steps"):
        setattr(runner, name, lambda *rest: None)
    runner._agent_step = lambda *rest: next(said)
    runner._run_multi_step(None, {"question": item.row["question"]}, worlds, 40, result)
    states = ace.scenarios.snapshot_states(worlds)
    right = bool(ace.checker.check_agent_end_state(states, item.truth)["valid"])
    return right, 1.0 if right else ace.checker.milestone_accuracy(result.process, item.milestones)


def agents(folder, count, seed=0):
    """`count` episodes of multi_step whose agent says the milestones: all, cut short, changed, reordered, with one more."""
    task, rng, found = make_task("acebench-agent", 0, {"path": folder}), random.Random(seed), []
    problems = task.held_out(100)
    while len(found) < count:
        problem, kind = rng.choice(problems), rng.choice(KINDS)
        item = problem.data["item"]
        stones = item.milestones[0] if isinstance(item.milestones[0], list) else item.milestones
        says = [stone.strip() for stone in stones]  # the package's loop reads no calls before a blank at the end, ours does
        at = rng.randrange(len(says))
        if kind == "truncated":
            says.pop()
        elif kind == "perturbed":
            says[at] = says[at].replace("='", "='x", 1)
        elif kind == "reordered":
            says.reverse()
        elif kind == "extra":
            says.insert(at, says[at])
        elif kind == "broken":
            says[at] = says[at][:-2]
        says.append(FINISH if len(says) > 1 else "")
        says.append(FINISH)
        ours = answered(task, problem, *says[: -1 if says[-2] == FINISH else None])
        right, process = agent_verdict(item, says)
        found.append(Judged(kind, item.id, says, ours, right == ours.success and process == ours.metrics["process"]))
    return [one._replace(theirs=one.ours.success if one.theirs else not one.ours.success) for one in found]


def main(count, folder):
    """Print what of each kind passes, and every difference."""
    for name, found in (("BFCL", bfcl(count)), ("ACEBench", acebench(folder, count)), ("agent", agents(folder, count // 5))):
        passing, made = Counter(one.kind for one in found if one.ours.success), Counter(one.kind for one in found)
        print(f"{name}: {len(found)} answers;", ", ".join(f"{kind} {passing[kind]} of {made[kind]}" for kind in KINDS))
        differing = [one for one in found if one.ours.success != one.theirs]
        print(f"  {len(differing)} verdicts differ from the package's")
        for one in differing:
            print("  differs:", one)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
