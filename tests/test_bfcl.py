"""BFCL and ToolRL: ground truths replayed, official verdicts met, worlds kept apart, calls read behind the thinking only."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from gear_trainer.demo.qwen3_tokenizer import EOS, PAD, qwen3_tokenizer, subset_tokenizer
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks import TaskError, make_task
from gear_trainer.tasks.bfcl.multi_turn import MAX_CALLS, MAX_STEPS, MORE_TOOLS, Item, MultiTurnEpisode
from gear_trainer.tasks.bfcl.schemas import first_call, schema
from gear_trainer.tasks.bfcl.single_turn import CATEGORIES, RELEVANCE
from gear_trainer.tasks.bfcl.world import FAILED, World
from gear_trainer.tasks.demonstrations import check_demonstrations
from gear_trainer.tasks.tool_calls import ToolCall, calls_turn, read_calls
from gear_trainer.tasks.toolrl.reward import call_reward, form_reward, overlap
from gear_trainer.tasks.users import Scripted

pytest.importorskip("bfcl_eval", reason="the package bfcl-eval is not installed")
DATA = os.environ.get("GEAR_DATA")
PAPER = ("parallel", "multiple", "parallel_multiple")
POST = ToolCall("post_tweet", {"content": "hello"})


def why(outcome):
    """The reasons that an outcome gives for being wrong."""
    return [name for name, value in outcome.metrics.items() if name.startswith("fail_") and value]


# --- calls in text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no call", []),
        (calls_turn([POST]), [POST]),
        (calls_turn([POST, POST]), [POST, POST]),
        ("<think>\n<tool_call> goes here\n</think>\n" + calls_turn([POST]), [POST]),
        ("<think>" + calls_turn([POST]) + "</think>nothing to call", []),
        ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', [ToolCall("f", {"x": 1})]),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}\n</tool_call>', [("f", {}), ("g", {})]),
        ('<tool_call>{"name": "f", "arguments": {},\n"id": 7}</tool_call>', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": {}}', ["the tool_call block is not closed"]),
        ("<tool_call>f(1)</tool_call>", ["the call is not valid JSON"]),
        ('<tool_call>\n{"name": "f", "arguments": {}}\nand\n</tool_call>', [("f", {}), "the call is not valid JSON"]),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', ["the call is not valid JSON"]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', ["a call is an object with name and arguments"]),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', ["a call is an object with name and arguments"]),
        ("<tool_call></tool_call>", ["the call is not valid JSON"]),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ["the call is not valid JSON"]),
    ],
)
def test_calls_are_read_behind_the_thinking(text, found):
    assert read_calls(text) == found


def test_a_scripted_user_says_its_lines_and_stops():
    user = Scripted(["a", "b"])
    assert [user.reply([]) for _ in range(4)] == ["a", "b", None, None]


# --- one user turn ------------------------------------------------------------------------------------------------------


def test_ground_truths_of_one_turn_are_accepted():
    """599 of the paper's 600, and all but 5 of the others with calls: those the checker refuses whatever first value is taken."""
    task = make_task("bfcl", 0, {"categories": [*CATEGORIES, *RELEVANCE]})
    refused, counts = [], Counter()
    for problem in task.held_out(10_000):
        episode = task.episode(problem)
        assert not episode.step(calls_turn(problem.data["gold"]) or "No tool does this.").messages
        counts[problem.category] += 1
        if not episode.outcome("done").success:
            refused.append(problem.id)
    assert [counts[category] for category in PAPER] == [200, 200, 200] and counts.total() == 3491
    assert [id for id in refused if "live_relevance" not in id] == [
        "parallel_multiple_26", "live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_507-149-4",
        "live_multiple_862-181-3", "live_multiple_964-207-0",
    ]  # fmt: skip
    assert refused.count("live_relevance_0-0-0") == 1 and len(refused) == 6 + 16  # a call is wanted there; none was made


def test_the_order_of_parallel_calls_does_not_count_and_a_missing_one_does():
    task = make_task("bfcl", 0, {"categories": ["parallel", "parallel_multiple"]})
    reversed_, short = Counter(), 0
    for problem in task.held_out(400):
        gold = problem.data["gold"]
        for calls in (gold[::-1], gold[:-1]):
            episode = task.episode(problem)
            episode.step(calls_turn(calls))
            right = episode.outcome("done").success
            reversed_[problem.category] += right and calls == gold[::-1]
            short += right and len(calls) < len(gold)
    assert reversed_["parallel"] >= 199 and reversed_["parallel_multiple"] >= 198 and short == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I cannot.", "fail_no_call"),
        ("<tool_call>{</tool_call>", "fail_broken_call"),
        (calls_turn([ToolCall("spotify.play", {"artist": "Taylor Swift", "duration": 20})]), "fail_wrong_count"),
        (calls_turn([ToolCall("spotify.stop", {})] * 2), "fail_cannot_find_match"),
        (calls_turn([ToolCall("spotify.play", {"artist": {"a": []}, "duration": [[]]})] * 2), "fail_cannot_find_match"),
    ],
)
def test_a_wrong_answer_has_a_reason(text, reason):
    task = make_task("bfcl", 0, {"categories": ["parallel"]})
    episode = task.episode(task.held_out(1)[0])
    reply = episode.step(text)
    outcome = episode.outcome("done")
    assert (outcome.reward, outcome.success, why(outcome)) == (0.0, False, [reason])
    assert reply.errors == (reason == "fail_broken_call")


def test_a_cut_turn_and_needless_calls_have_a_reason():
    task = make_task("bfcl", 0, {"categories": ["irrelevance"]})
    problem = task.held_out(1)[0]
    assert why(task.episode(problem).outcome("length")) == ["fail_cut"]
    episode = task.episode(problem)
    episode.step(calls_turn([POST]))
    assert why(episode.outcome("done")) == ["fail_needless_call"]


def test_the_official_checker_loads_without_the_vendors():
    """Its module asks for one flag of a module that imports every SDK; a stand-in answers, and is gone afterwards."""
    make_task("bfcl", 0)
    assert "bfcl_eval.constants.model_config" not in sys.modules and "bfcl_eval.model_handler" not in sys.modules


def test_first_values_and_json_types():
    possible = {"f": {"a": ["", 1], "b": ["", 2], "c": [{"x": [3], "y": ["", 4]}], "d": [[{"z": [5, 6]}]]}}
    assert first_call(possible, ["a"]) == ToolCall("f", {"a": 1, "c": {"x": 3}, "d": [{"z": 5}]})
    described = {"type": "dict", "properties": {"a": {"type": "tuple", "items": {"type": "float"}}, "b": {"type": "any"}}}
    shown = schema({"name": "f", "description": "", "parameters": described})["function"]["parameters"]
    assert shown["type"] == "object" and shown["properties"]["b"] == {"type": "string"}
    assert shown["properties"]["a"] == {"type": "array", "items": {"type": "number"}}
    assert described["properties"]["a"]["type"] == "tuple"  # the checker reads the package's own


# --- several user turns -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several():
    return make_task("bfcl-multi-turn", 0)


def play(task, problem, turns):
    """The outcome of the calls of each user turn, in one assistant turn, then words."""
    episode = task.episode(problem)
    replies = [episode.step(text) for calls in turns for text in ([calls_turn(calls)] if calls else []) + ["done"]]
    return replies, episode.outcome("done")


def test_ground_truths_of_several_turns_are_right(several):
    counts = Counter()
    for problem in several.held_out(1000):
        replies, outcome = play(several, problem, problem.data["item"].gold)
        assert not replies[-1].messages and not sum(reply.reward < 0 for reply in replies)
        assert outcome.metrics["right_turns"] == 1.0 and not why(outcome)
        assert sum(r.reward for r in replies) == sum(bool(calls) for calls in problem.data["item"].gold)
        counts[problem.category, outcome.success] += 1
    assert set(counts.values()) == {200} and len(counts) == 4 and all(success for _, success in counts)


def test_verdicts_are_the_packages_own():
    """Ground truths, cut short, changed, reordered, with a call too many or in the wrong turn."""
    import bfcl_episodes

    found = bfcl_episodes.compared(150, seed=3)
    assert {one.kind for one in found} == set(bfcl_episodes.KINDS)
    assert [one for one in found if one.ours.success != one.theirs] == []
    assert all(one.ours.success for one in found if one.kind == "gold")
    changed = [one for one in found if one.kind in ("truncated", "perturbed")]
    moved = [one for one in changed if bfcl_episodes.end_states_differ(one.item, one.item.gold, one.turns)]
    assert len(moved) >= 20 and not any(one.ours.success for one in moved)
    itself = [one for one in changed if bfcl_episodes.changes_state(one)]
    assert len(itself) >= 20 and not any(one.ours.success for one in itself)


def test_verdicts_on_one_turn_are_the_packages_own():
    """Single-turn answers made from the ground truth, read by the package's handler for Qwen and judged by its checker."""
    import single_turn_episodes

    found = single_turn_episodes.bfcl(200, seed=3)
    assert {one.kind for one in found} == set(single_turn_episodes.KINDS)
    assert [one for one in found if one.ours.success != one.theirs] == []
    assert 0 < sum(one.ours.success for one in found) < len(found)


def test_missing_functions_are_shown_in_a_user_message(several):
    problem = next(p for p in several.held_out(1000) if p.id == "multi_turn_miss_func_0")
    assert "sort" not in [tool["function"]["name"] for tool in problem.tools]
    replies, _ = play(several, problem, problem.data["item"].gold)
    said = [m.content for reply in replies for m in reply.messages if m.role == "user"]
    revealed = next(text for text in said if text.endswith(MORE_TOOLS))
    assert json.loads(revealed.splitlines()[0])["function"]["name"] == "sort" and len(said) == 4


def item(gold, says=(), **scenario):
    return Item(("TwitterAPI",), {"TwitterAPI": {"authenticated": True, **scenario}}, gold, says)


def test_the_user_goes_on_after_a_wrong_turn_and_the_reason_is_the_first():
    episode = MultiTurnEpisode(item(((POST,), (POST,)), ("again",)))
    reply = episode.step("done")
    assert [(m.role, m.content) for m in reply.messages] == [("user", "again")] and reply.reward == 0.0
    episode.step(calls_turn([POST, POST]))
    assert episode.step("done").reward == 1.0  # the state is the ground truth's again, and so are the answers
    outcome = episode.outcome("done")
    assert not outcome.success and why(outcome) == ["fail_no_call"] and outcome.metrics["right_turns"] == 0.5


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([ToolCall("post_tweet", {"content": "bye"})], "fail_state"),
        ([POST, POST], "fail_state"),
        ([ToolCall("no_such_tool", {})], "fail_state"),
    ],
)
def test_another_state_is_wrong(calls, reason):
    episode = MultiTurnEpisode(item(((POST,),)))
    episode.step(calls_turn(calls))
    episode.step("done")
    assert why(episode.outcome("done")) == [reason]


def test_an_answer_that_was_not_asked_for_is_missing():
    look = ToolCall("get_user_tweets", {"username": "john"})
    episode = MultiTurnEpisode(item(((look,),)))
    episode.step(calls_turn([ToolCall("list_all_following", {})]))
    episode.step("done")
    assert why(episode.outcome("done")) == ["fail_response"]


def test_steps_and_calls_are_bounded_and_a_cut_episode_says_so():
    look = calls_turn([ToolCall("list_all_following", {})])
    episode = MultiTurnEpisode(item(((POST,),)))
    for _ in range(MAX_STEPS):
        assert episode.step(look).messages
    assert not episode.step(look).messages and why(episode.outcome("done")) == ["fail_steps"]
    episode = MultiTurnEpisode(item(((POST,),)))
    reply = episode.step(look * (MAX_CALLS + 9))
    assert (len(reply.messages), reply.calls, reply.errors) == (MAX_CALLS + 1, MAX_CALLS + 9, 9)
    assert why(episode.outcome("length")) == ["fail_cut"]


def test_bad_calls_are_answered_and_counted():
    episode = MultiTurnEpisode(item(((POST,),)))
    bad = ["<tool_call>{</tool_call>", calls_turn([ToolCall("__init__", {})]), calls_turn([ToolCall("post_tweet", {"x y": 1})])]
    reply = episode.step("\n".join(bad))
    assert (reply.calls, reply.errors) == (3, 3) and all(m.role == "tool" for m in reply.messages)
    assert reply.messages[1].content == f"{FAILED}name '__init__' is not defined"
    episode.step(calls_turn([POST]))
    episode.step("done")
    assert episode.outcome("done").success


def test_arithmetic_that_takes_hours_is_refused():
    world = World(("MathAPI",), {})
    for call in (
        ToolCall("power", {"base": 10, "exponent": 10**9}),
        ToolCall("logarithm", {"value": 2, "base": 3, "precision": 10**8}),
        ToolCall("round_number", {"number": 7, "decimal_places": -(10**9)}),
        ToolCall("sum_values", {"numbers": [10**200]}),
    ):
        assert world.run(call) == (f"{FAILED}{next(reversed(call.arguments))} is too large", False)
    assert world.run(ToolCall("power", {"base": 2, "exponent": 10})) == ('{"result": 1024}', True)


def test_episodes_share_no_state():
    """Not the lists that are default values of the package's methods, nor the ground truth's, nor the scenario's."""
    mention = ToolCall("mention", {"tweet_id": 0, "mentioned_usernames": ["@a"]})
    tagged = ToolCall("post_tweet", {"content": "x", "mentions": ["@b"]})
    shared = item(((POST, mention, tagged),), tweets={"7": {"id": 7, "mentions": []}})
    first, second = shared.world(), shared.world()
    for call in (POST, mention, tagged, ToolCall("mention", {"tweet_id": 1, "mentioned_usernames": ["@c"]})):
        assert first.run(call)[1]
    first.run(ToolCall("mention", {"tweet_id": 7, "mentioned_usernames": ["@d"]}))
    assert json.loads(second.run(POST)[0])["mentions"] == [] and tagged.arguments["mentions"] == ["@b"]
    assert shared.world().instances["TwitterAPI"].tweets == {7: {"id": 7, "mentions": []}}


def test_long_context_worlds_share_no_state(several):
    problem = next(
        p for p in several.held_out(1000) if p.category.endswith("long_context") and p.data["item"].classes == ("TravelAPI",)
    )
    one, other = problem.data["item"].world(), problem.data["item"].world()
    cards = one.instances["TravelAPI"].credit_card_list
    for card in cards.values():
        card["balance"] = -1
    assert -1 not in [card["balance"] for card in other.instances["TravelAPI"].credit_card_list.values()]


@pytest.mark.parametrize("name", ["bfcl", "bfcl-multi-turn"])
def test_nothing_is_trained_on_unless_a_share_is_set_aside(name):
    task = make_task(name, 0)
    with pytest.raises(TaskError, match="train_share"):
        task.train_problem(0)
    args = {"categories": ["multi_turn_base", "multi_turn_miss_func"] if "turn" in name else PAPER, "train_share": 0.8}
    shared = make_task(name, 5, args)
    held = {p.key or p.id for p in shared.held_out(1000)}
    drawn = [shared.train_problem(i) for i in range(900)]
    assert not held & {p.key or p.id for p in drawn} and 0.1 < len(held) / len({*held, *(p.key or p.id for p in drawn)}) < 0.3
    assert "parallel_multiple_26" not in {p.id for p in drawn}  # its ground truth cannot be shown
    assert held == {p.key or p.id for p in make_task(name, 6, args).held_out(1000)}
    assert shared.train_problem(3) == drawn[3] != make_task(name, 6, args).train_problem(3)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("bfcl", {"categories": ["exec"]}, "no 'exec' of one turn"),
        ("bfcl", {"categories": []}, "must be a list of names"),
        ("bfcl", {"train_share": 1.0}, "below 1"),
        ("bfcl-multi-turn", {"categories": ["parallel"]}, "no 'parallel' of several turns"),
        ("bfcl-multi-turn", {"classes": ["GorillaFileSystems"]}, "no item of"),
        ("bfcl-one-class", {"setting": "x"}, "use one of files, posts"),
    ],
)
def test_wrong_arguments_are_named(name, args, said):
    with pytest.raises(TaskError, match=said):
        make_task(name, 0, args)


def test_one_class_keeps_its_items(several):
    task = make_task("bfcl-multi-turn", 0, {"categories": ["multi_turn_base"], "classes": ["GorillaFileSystem"]})
    assert {p.data["item"].classes for p in task.held_out(1000)} == {("GorillaFileSystem",)} and len(task.held_out(1000)) == 13


# --- generated conversations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["files", "posts"])
def test_generated_conversations(setting):
    task = make_task("bfcl-one-class", 3, {"setting": setting})
    check_demonstrations(task)
    held = task.held_out(200)
    assert len({p.answer for p in held}) == 200 and held == make_task("bfcl-one-class", 9, {"setting": setting}).held_out(200)
    assert not {p.answer for p in held} & {task.train_problem(i).answer for i in range(500)}
    for index in range(60):
        problem = task.train_problem(index)
        for kind, _ in task.demo_mix:
            episode = task.episode(problem)
            replies = [episode.step(turn) for turn in task.demonstrate(problem, kind, random.Random(index))]
            assert not replies[-1].messages and episode.outcome("done").success is (kind == "right"), (problem, kind)
            assert sum(r.reward for r in replies) == (2 if kind == "right" else sum(r.reward for r in replies))


# --- prompts ------------------------------------------------------------------------------------------------------------


def test_tags_of_a_problem_are_spelled_out_and_no_others(tmp_path):
    chat = Chat(subset_tokenizer(["say x"], tmp_path))
    text = [{"role": "user", "content": "say <tool_call>x</tool_call><|im_end|>"}]
    tags = ("<tool_call>", "</tool_call>")
    ids = [chat.tokenizer.convert_tokens_to_ids(tag) for tag in (*tags, "<|im_end|>")]
    plain, meant = chat.prompt_ids(text), chat.prompt_ids(text, None, tags)
    assert [plain.count(i) for i in ids] == [0, 0, 1] and [meant.count(i) for i in ids] == [1, 1, 1]  # im_end: the template's
    assert (chat.escapes(text), chat.escapes(text, tags), chat.escapes([{**text[0], "content": "<tool_call>"}], tags)) == (
        1,
        1,
        0,
    )


@pytest.mark.skipif(find_spec("trl") is None, reason="the package trl is not installed")
def test_whole_rollouts_replay_the_ground_truth(several, tmp_path):
    """Under Qwen3's own template: tools in the prompt, answers and users between the turns."""
    import bfcl_episodes
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen3_tokenizer(), eos_token=EOS, pad_token=PAD)
    template = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text()
    problems = [p for p in several.held_out(1000) if p.id in ("multi_turn_base_5", "multi_turn_miss_func_0")]
    for rollout in bfcl_episodes.replayed(several, Chat(tokenizer), problems, 1 << 15):
        assert rollout.success and rollout.status.value == "done" and rollout.errors == 0
        text = tokenizer.decode(rollout.prompt_ids + rollout.ids)
        assert '"name": "cd"' in text and text.count("<|im_start|>assistant") == rollout.turns and "<tool_response>" in text
        for words in rollout.problem.data["item"].says:
            assert f"<|im_start|>user\n{words}<|im_end|>" in text


# --- ToolRL -------------------------------------------------------------------------------------------------------------

F, G = ToolCall("f", {"a": 1, "b": "x"}), ToolCall("g", {})


@pytest.mark.parametrize(
    ("calls", "reward"),
    [
        ([F, G], 3.0),
        ([G, F], 3.0),
        ([], -3.0),
        ([F, "broken"], -3.0),
        ([ToolCall("h", {})], -3.0),
        ([F], -3 + 6 * (1 / 2 + 3) / 5),  # names 1 of 2; of f the keys and two values; of g nothing. At most 1 + 3 + 1
        ([G], -3 + 6 * (1 / 2 + 1) / 5),
        ([ToolCall("f", {"a": 1, "c": 0}), G], -3 + 6 * (1 + (1 / 3 + 1) + 1) / 5),
        ([F, F, G], -3 + 6 * (2 / 3 + 3 + 1) / 5),
        ([ToolCall("f", {"a": 2, "b": "x"}), F, G], -3 + 6 * (2 / 3 + 3 + 1) / 5),  # the better one of f serves
    ],
)
def test_toolrl_rewards_by_hand(calls, reward):
    assert call_reward([F, G], calls) == pytest.approx(reward, abs=1e-12)


def test_toolrl_form_by_hand():
    calls, words = "<tool_call>\n{}\n</tool_call>", "<response> hi </response>"
    for truth, text, value in [
        (calls, f"<think> a </think>\n{calls}", 1.0),
        (calls, f"<think> <tool_call> a </think>\n{calls}", 1.0),
        (calls, f"<think> a </think>\n\n{calls}", 0.0),
        (calls, calls, 0.0),
        (calls, f"<think> a </think>\n{calls}\n{calls}", 0.0),
        (calls, f"<think> a </think>\n{calls}\n{words}", 0.0),
        (words, f"<think> a </think>\n{words}", 1.0),
        (words, f"<think> a </think>\n{calls}", 0.0),
        (f"{calls}\n{words}", f"<think> a </think>\n{calls}\n{words}", 1.0),
    ]:
        assert form_reward(f"<think> x </think>\n{truth}", text) == value, (truth, text)
    assert overlap([], []) == 1.0 and overlap(["a", "a"], ["a"]) == 0.5


def rlla(truth='<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>', **changes):
    chat = [{"role": "system", "content": "use <tool_call>"}, {"role": "user", "content": "<user> hi </user>"}]
    return {"prompt": chat, "reward_model": {"ground_truth": truth}} | changes


@pytest.fixture
def files(tmp_path):
    def write(train, held_out=None):
        paths = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
        other = rlla(prompt=[{"role": "user", "content": "other"}])
        for path, rows in zip(paths, (train, held_out or [other]), strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(paths[0]), "held_out_path": str(paths[1])}

    return write


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (rlla(prompt=None), "line 2: no chat that ends with a user turn"),
        (rlla(prompt=[{"role": "system", "content": "x"}]), "line 2: no chat"),
        (rlla(reward_model=None), "line 2: no text in 'reward_model.ground_truth'"),
        (rlla("<tool_call>\n{\n</tool_call>"), "line 2: a call of the ground truth cannot be read"),
        ({"instruction": "x", "input": "y"}, "line 2: no text"),
        ([], "line 2: the row is not an object"),
    ],
)
def test_toolrl_names_the_line_of_a_bad_row(files, row, said):
    with pytest.raises(TaskError, match=said):
        make_task("toolrl", 0, files([rlla(), row]))


def test_toolrl_drops_what_is_held_out(files):
    again = rlla(prompt=[{"role": "system", "content": "use  <tool_call>"}, {"role": "user", "content": "<user> hi\n</user>"}])
    raw = {"instruction": "s", "input": "u", "output": "<response> a </response>"}
    task = make_task("toolrl", 0, files([rlla(), raw], [again]))
    assert {task.train_problem(i).category for i in range(6)} == {"response"}
    with pytest.raises(TaskError, match="held out too"):
        make_task("toolrl", 0, files([rlla()], [again]))
    with pytest.raises(TaskError, match="held_out_path is missing"):
        make_task("toolrl", 0, {"path": files([rlla()])["path"]})


@pytest.mark.parametrize(
    ("text", "reward", "reason"),
    [
        ('<think> a </think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>', 4.0, []),
        (calls_turn([ToolCall("f", {})]), 3.0, []),
        ("f", -3.0, ["fail_no_call"]),
        ("<tool_call>{</tool_call>", -3.0, ["fail_broken_call"]),
        (calls_turn([ToolCall("g", {})]), -3.0, ["fail_other_calls"]),
        (None, -3.0, ["fail_cut"]),
    ],
)
def test_toolrl_outcomes_have_reasons(files, text, reward, reason):
    task = make_task("toolrl", 0, files([rlla()]))
    episode = task.episode(task.train_problem(0))
    if text is not None:
        assert not episode.step(text).messages
    outcome = episode.outcome("done" if text else "length")
    assert (outcome.reward, outcome.success, why(outcome)) == (reward, not reason, reason)


@pytest.mark.skipif(not DATA, reason="GEAR_DATA names no folder of data")
def test_toolrl_ground_truths_earn_all():
    folder = Path(DATA) / "toolrl"
    task = make_task("toolrl", 0, {"path": str(folder / "rlla_sft.json"), "held_out_path": str(folder / "test.parquet")})
    rewards = Counter()
    for part, problems in (("test", task.held_out(100)), ("sft", [task.train_problem(i) for i in range(399)])):
        for problem in problems:
            episode = task.episode(problem)
            episode.step(problem.data["row"].truth)
            outcome = episode.outcome("done")
            rewards[part, problem.category, outcome.reward, outcome.success] += 1
    assert rewards == {
        ("test", "calls", 4.0, True): 71, ("test", "response", 1.0, True): 9,  # without calls in it only the form counts
        ("sft", "calls", 4.0, True): 345, ("sft", "response", 1.0, True): 54,
    }  # fmt: skip
