"""Episodes of BFCL made from the ground truth: as it is, cut short, changed, reordered; judged by us and by the package itself.

    python tests/bfcl_episodes.py 1000

plays that many of several user turns, compares each verdict with `multi_turn_checker`, and prints how many of a kind pass.

    python tests/bfcl_episodes.py 512 replay

rolls that many out at a time, of a policy that says the ground truth, and prints their speed and memory.
"""

from __future__ import annotations

import datetime
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from gear_trainer.demo.qwen3_tokenizer import EOS, PAD, qwen3_tokenizer
from gear_trainer.rollout import Completion, Engine
from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.episodes import roll_out
from gear_trainer.rollout.types import Limits, seed_of
from gear_trainer.tasks import Outcome, Problem, make_task
from gear_trainer.tasks.bfcl.multi_turn import MAX_STEPS
from gear_trainer.tasks.bfcl.package import part, rows, turn_checkers
from gear_trainer.tasks.tool_calls import ToolCall, calls_turn

KINDS = ("gold", "truncated", "perturbed", "reordered", "extra", "moved")
CACHES = ("TravelAPI._flight_cost_lookup",)  # book_flight asks anew for the price that it takes


class Compared(NamedTuple):
    """One episode under both judges."""

    kind: str
    problem: Problem
    turns: list[list[ToolCall]]
    ours: Outcome
    theirs: bool

    @property
    def item(self):
        """What the episode was made from."""
        return self.problem.data["item"]


def changed(value, rng):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice((-1, 1, 7))
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1], rng)] if value else ["x"]
    return value[:-1] if isinstance(value, str) and value and rng.random() < 0.5 else f"{value}x"


def mutated(gold, kind, rng):
    """The calls of each user turn, made from the ground truth; None where the kind does not apply."""
    turns = [list(calls) for calls in gold]
    filled = [i for i, calls in enumerate(turns) if calls]
    at = rng.choice(filled)
    if kind == "truncated":
        turns[at].pop()
    elif kind == "perturbed":
        where = [(i, name) for i, call in enumerate(turns[at]) for name in call.arguments]
        if not where:
            return None
        i, name = rng.choice(where)
        call = turns[at][i]
        turns[at][i] = ToolCall(call.name, {**call.arguments, name: changed(call.arguments[name], rng)})
    elif kind == "reordered":
        if len(turns[at]) < 2:
            return None
        turns[at].reverse()
    elif kind == "extra":
        turns[at].append(rng.choice(turns[rng.choice(filled)]))
    elif kind == "moved":
        if at + 1 == len(turns):
            return None
        turns[at + 1].insert(0, turns[at].pop())
    return turns


def played(task, problem, turns, rng):
    """Our outcome: the calls of a user turn in one assistant turn or one a turn, then words."""
    episode = task.episode(problem)
    for calls in turns:
        together = rng.random() < 0.5 or len(calls) > MAX_STEPS  # more turns are forced to quit by the package's runner, not here
        for step in [calls] if together else [[call] for call in calls]:
            if step:
                episode.step("<think>\n<tool_call>\n{}\n</tool_call>\n</think>\n" + calls_turn(step))
        episode.step("done")
    return episode.outcome("done")


def by_the_package(row, gold, turns, name):
    """The package's verdict on the same calls, in its own form."""
    checker = part("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker").multi_turn_checker
    written = [[[f"{c.name}({','.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in calls]] for calls in turns]
    written = [[] if steps == [[]] else steps for steps in written]
    gold_texts = [[f"{c.name}({','.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in calls] for calls in gold]
    return checker(written, gold_texts, row, row["id"].rsplit("_", 1)[0], name)


def end_states_differ(item, one, other):
    """Whether two lists of user turns leave the item's world in different states."""
    worlds = [item.world() for _ in range(2)]
    for world, turns in zip(worlds, (one, other), strict=True):
        for call in (call for turn in turns for call in turn):
            world.run(call)
    return not turn_checkers()[0](worlds[0].instances, worlds[1].instances)["valid"]


def touched(one):
    """Where the first call stands that a changed episode left out or has otherwise: its user turn, and its place there."""
    pairs = enumerate(zip(one.item.gold, one.turns, strict=True))
    return next((at, i) for at, (gold, now) in pairs for i, call in enumerate(gold) if [call] != now[i : i + 1])


def states(item, turns):
    """Every attribute of the item's instances, hidden ones too, after these user turns, as {"class.attribute": text}; without
    clocks, random generators, and what is kept to be quicker."""
    world = item.world()
    for call in (call for turn in turns for call in turn):
        world.run(call)
    named = ((f"{name}.{key}", value) for name, instance in world.instances.items() for key, value in vars(instance).items())
    return {key: written(value) for key, value in named if key not in CACHES and not isinstance(value, random.Random)}


def written(value, above=()):
    """An attribute's content as text; what is above it in its own tree, as a folder's parent, is only named."""
    if id(value) in above or isinstance(value, datetime.datetime):
        return "..."
    if hasattr(value, "__dict__"):
        value = vars(value)
    above = (*above, id(value))
    if isinstance(value, dict):
        return repr({key: written(inner, above) for key, inner in value.items()})
    return repr([written(inner, above) for inner in value]) if isinstance(value, (list, tuple)) else repr(value)


def changes_state(one):
    """Whether the call of the ground truth that a changed episode touches changes an attribute of any instance."""
    at, i = touched(one)
    before = [*one.item.gold[:at], one.item.gold[at][:i]]
    return states(one.item, before) != states(one.item, [*before, [one.item.gold[at][i]]])


def different(one):
    """The attributes that a changed episode leaves otherwise than the ground truth."""
    truth, now = states(one.item, one.item.gold), states(one.item, one.turns)
    return [name for name in truth if truth[name] != now.get(name)]


def compared(count, seed=0, categories=None):
    """`count` episodes under both judges."""
    task = make_task("bfcl-multi-turn", 0, {"categories": categories} if categories else {})
    problems, rng = task.held_out(1000), random.Random(seed)
    originals = {row["id"]: row for category in task.categories for row in rows(category)}
    found = []
    while len(found) < count:
        problem, kind = rng.choice(problems), rng.choice(KINDS)
        item = problem.data["item"]
        if (turns := mutated(item.gold, kind, rng)) is None:
            continue
        ours = played(task, problem, turns, rng)
        theirs = by_the_package(originals[problem.id], item.gold, turns, f"m{seed}x{len(found)}")
        found.append(Compared(kind, problem, turns, ours, theirs["valid"]))
    return found


def main(count):
    """Print what of each kind passes, and every difference."""
    found = compared(count)
    print(Counter((one.kind, one.ours.success) for one in found))
    changes = [one for one in found if one.kind in ("truncated", "perturbed")]
    moving = [one for one in changes if end_states_differ(one.item, one.item.gold, ())]
    itself = [one for one in changes if changes_state(one)]
    other = [one for one in moving if end_states_differ(one.item, one.item.gold, one.turns)]
    for what, some in (
        ("all", changes),
        ("whose ground truth changes the state", moving),
        ("whose left out or changed call itself changes the state", itself),
        ("which end in another state than the ground truth", other),
    ):
        below = sum(not one.ours.success for one in some)
        print(f"truncated or perturbed, {what}: {len(some)}, below 1: {below} ({below / len(some):.1%})")
    for one in changes:
        if one.ours.success:
            at, i = touched(one)
            mover = "changes the state" if one in itself else "only looks"
            print(f"  passes: {one.problem.id}, {one.item.gold[at][i]} -> {one.turns[at][i : i + 1]}: {mover}; {different(one)}")
    differing = [one for one in found if one.ours.success != one.theirs]
    print(f"{len(found)} episodes, {len(differing)} verdicts differ from the package's")
    for one in differing:
        print("  differs:", one)


class Replay(Engine):
    """A policy that says what is written down for a (rollout, turn), known by the request's seed."""

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says = tokenizer, says

    def generate(self, requests):
        ids = [
            [*self.tokenizer.encode(self.says[r.seed], add_special_tokens=False), self.tokenizer.eos_token_id] for r in requests
        ]
        return [Completion(turn, [0.0] * len(turn), True, 0) for turn in ids]

    def push(self, weights):
        pass


def gold_turns(item):
    """The assistant's turns of the ground truth."""
    return [turn for calls in item.gold for turn in ([calls_turn(calls)] if calls else []) + ["done"]]


def replayed(task, chat, problems, max_model_len=1 << 20):
    """Rollouts of the ground truth, one for each problem, all at a time."""
    numbered = list(enumerate(problems))
    says = {
        seed_of("replay", group, 0, turn): text
        for group, problem in numbered
        for turn, text in enumerate(gold_turns(problem.data["item"]))
    }
    limits = Limits(1, 1.0, 4096, max_model_len)
    return roll_out(Replay(chat.tokenizer, says), chat, task, numbered, limits, ("replay",))


def measure(count):
    """Print episodes a second and memory of `count` concurrent episodes, whole rollouts and the environment alone."""
    folder = Path(tempfile.mkdtemp())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen3_tokenizer(folder), eos_token=EOS, pad_token=PAD)
    templates = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
    for categories in (["multi_turn_base"], ["multi_turn_long_context"], None):
        task = make_task("bfcl-multi-turn", 0, {"categories": categories} if categories else {})
        problems = [problem for problem in task.held_out(1000) for _ in range(3)][:count]
        before, begun = peak_mib(), time.process_time()
        episodes = [task.episode(problem) for problem in problems]
        made = time.process_time() - begun
        for problem, episode in zip(problems, episodes, strict=True):
            for turn in gold_turns(problem.data["item"]):
                episode.step(turn)
            assert episode.outcome("done").success
        alone = time.process_time() - begun
        print(f"{categories or 'all'}: {count} environments made in {made:.2f} CPU s, played in {alone:.2f}", end="; ")
        print(f"{count / alone:.0f} a second, {peak_mib() - before:.0f} MiB more")
        del episodes
        before, begun = peak_mib(), time.process_time()
        rollouts = replayed(task, Chat(tokenizer), problems)
        taken = time.process_time() - begun
        assert all(r.success for r in rollouts)
        tokens = sum(len(r.ids) + len(r.prompt_ids) for r in rollouts)
        print(f"  rolled out: {count / taken:.0f} a CPU second, {peak_mib() - before:.0f} MiB more, {tokens:,} tokens")


def peak_mib():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    (measure if "replay" in sys.argv else main)(int(sys.argv[1]))
