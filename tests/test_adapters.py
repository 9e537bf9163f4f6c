"""Environments that people have, and worker processes: episodes, rewards, what the teacher sees, and what is refused."""

import json
import sys
import types
from pathlib import Path

import pytest
import stand_in_worlds as worlds

from gear_trainer.config import ConfigError, load_config
from gear_trainer.preflight.checks import check
from gear_trainer.tasks import TaskError, make_task
from gear_trainer.tasks.adapters.mcp import McpTask
from gear_trainer.tasks.awaiting import resolved
from gear_trainer.tasks.tool_calls import call_turn
from gear_trainer.tasks.worker.process import WorkerDied, WorkerError

DEMO = Path(__file__).parents[1] / "gear_trainer" / "configs" / "smollm2_cpu.yaml"
STAND_IN = str(Path(__file__).with_name("stand_in_worker.py"))


@pytest.fixture
def sets(tmp_path):
    """Two files of rows, as `task_args`."""

    def write(rows, held_out):
        paths = {}
        for name, lines in (("path", rows), ("held_out_path", held_out)):
            file = tmp_path / f"{name}.jsonl"
            file.write_text("\n".join(json.dumps(line) for line in lines))
            paths[name] = str(file)
        return paths

    return write


def numbers(sets):
    rows = [{"prompt": "Guess my number.", "number": n} for n in range(4)]
    return sets(rows, [{"prompt": [{"role": "user", "content": "Guess it."}], "number": 7}])


# --- TRL ----------------------------------------------------------------------------------------------------------------


def test_a_trl_class_runs_as_it_is(sets):
    task = make_task("trl", 0, numbers(sets) | {"environment": "stand_in_worlds:Secretive", "teacher_field": "secret"})
    problem = task.held_out(5)[0]
    assert problem.messages == [{"role": "user", "content": "Guess it. It is between 0 and 9."}]
    assert problem.answer == "the number is 7" and "the number is 7" in problem.teacher_messages[-1]["content"]
    assert [schema["function"]["name"] for schema in problem.tools] == ["guess"]  # the teacher's method is no tool
    episode = task.episode(problem)
    said = episode.step("\n".join([call_turn("guess", {"number": 9}), call_turn("guess", {"number": 99}), "<tool_call>{"]))
    assert [m.content for m in said.messages] == [
        "lower",
        "{'error': 'out of range'}",
        "{'error': 'the tool_call block is not closed'}",
    ]
    assert (said.calls, said.errors) == (3, 2)
    assert "unknown tool" in episode.step(call_turn("secret", {})).messages[0].content
    assert episode.step(call_turn("guess", {"number": 7})).messages[0].content == "right"
    assert not episode.step("I have it.").messages
    assert episode.outcome("done").success and task.episode(problem).outcome("turns").reward == 0.0
    assert task.train_problem(11) == make_task(
        "trl", 0, numbers(sets) | {"environment": "stand_in_worlds:Secretive", "teacher_field": "secret"}
    ).train_problem(11)


@pytest.mark.parametrize(
    ("args", "reward"),
    [
        ({"environment": "stand_in_worlds:AsyncGuessing"}, 2.0),
        ({"environment": "stand_in_worlds:Guessing", "reward": "stand_in_worlds:halved"}, 0.5),
    ],
)
def test_trl_rewards_are_the_class_own_or_a_function_and_may_be_async(sets, args, reward):
    task = make_task("trl", 0, numbers(sets) | args)
    episode = task.episode(task.held_out(1)[0])
    assert episode.step(call_turn("guess", {"number": 7})).messages[0].content == "right"
    assert episode.outcome("done").reward == reward


def test_a_row_picks_one_of_several_trl_classes(sets):
    rows = [{"prompt": "Go.", "number": 1, "environment": name} for name in ("plain", "async")]
    args = {"environment": {"plain": "stand_in_worlds:Guessing", "async": "stand_in_worlds:AsyncGuessing"}}
    task = make_task("trl", 0, sets(rows, [rows[0] | {"number": 2}]) | args)
    worlds_met = {type(task.episode(task.train_problem(i)).world).__name__ for i in range(2)}
    assert worlds_met == {"Guessing", "AsyncGuessing"}
    with pytest.raises(TaskError, match=r"path.jsonl, line 1: field 'environment' is 'other': use one of plain, async"):
        make_task("trl", 0, sets([{"prompt": "Go.", "environment": "other"}], [rows[0]]) | args)


GUESSING = {"environment": "stand_in_worlds:Secretive", "teacher_field": "secret"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "environment is missing"),
        ({"environment": "stand_in_worlds:Nobody"}, "cannot be loaded"),
        ({"environment": "stand_in_worlds:Client"}, "has no schema"),
        ({"environment": "stand_in_worlds:Broken"}, "a row cannot be begun .*KeyError.*stand_in_worlds.py"),
        ({"environment": "json:JSONDecoder"}, "has no reset"),
        ({"environment": "stand_in_worlds:Restless"}, "two resets of one row differ"),
        ({"environment": "stand_in_worlds:Guessing", "teacher_field": "none"}, "no field 'none'"),
        (GUESSING | {"reward": "stand_in_worlds:none"}, "cannot be loaded"),
        (GUESSING | {"prompt_field": "question"}, "line 1: no field 'question'"),
        (GUESSING | {"max_turns": 0}, "max_turns"),
    ],
)
def test_what_is_wrong_with_a_trl_class_is_said(sets, args, said):
    with pytest.raises(TaskError, match=said):
        make_task("trl", 0, numbers(sets) | args)


def test_a_method_with_a_teacher_refuses_a_task_that_does_not_know_the_truth(sets):
    paths = ", ".join(f"{name}: {path}" for name, path in numbers(sets).items())
    task = f"task_args={{{paths}, environment: stand_in_worlds:Guessing%s}}"
    base = ["task=trl", "model.path=builtin:smollm2"]
    with pytest.raises(
        ConfigError, match="credit=gear has a teacher that sees the ground truth, and task=trl was not told.*teacher_field"
    ):
        check(load_config(DEMO, [*base, task % "", "credit=gear"]))
    check(load_config(DEMO, [*base, task % "", "credit=grpo"]))
    check(load_config(DEMO, [*base, task % ", teacher_field: number", "credit=gear"]))


# --- the others, by stand-ins of their packages ---------------------------------------------------------------------------


def test_reasoning_gym_by_the_name_of_a_generator(monkeypatch):
    class Sums:
        def __init__(self, most):
            self.most = most

        def __getitem__(self, seed):
            a = seed % self.most
            return {"question": f"What is {a} + 1?\n", "answer": str(a + 1), "metadata": {"hint": "count"}}

        def score_answer(self, answer, entry):
            if answer == "boom":
                raise ValueError
            return 1.0 if answer == entry["answer"] else 0.01

    gym = types.ModuleType("reasoning_gym")
    gym.utils = types.ModuleType("reasoning_gym.utils")
    gym.utils.extract_answer = lambda text: text.split("<answer>")[1].split("</answer>")[0] if "<answer>" in text else None
    gym.create_dataset = lambda name, seed, size, most=700: Sums(most) if name == "sums" else {}[name]
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    monkeypatch.setitem(sys.modules, "reasoning_gym.utils", gym.utils)
    task = make_task("reasoning-gym", 2, {"generator": "sums"})
    held_out = {p.messages[0]["content"] for p in task.held_out(1000)}
    assert len(held_out) == 200 and not held_out & {task.train_problem(i).messages[0]["content"] for i in range(300)}
    problem = task.train_problem(5)
    assert (
        problem == make_task("reasoning-gym", 2, {"generator": "sums"}).train_problem(5)
        and problem.answer in problem.teacher_messages[0]["content"]
    )
    for text, reward, reason in (
        (f"<think><answer>0</answer></think><answer>{problem.answer}</answer>", 1.0, None),
        ("<answer>-1</answer>", 0.01, None),
        ("no tags", 0.0, "unanswered"),
        ("<answer>boom</answer>", 0.0, "unscored"),
    ):
        episode = task.episode(problem)
        episode.step(text)
        outcome = episode.outcome("done")
        assert (
            outcome.reward == reward and outcome.success == (reward == 1.0) and (reason is None or outcome.metrics[reason] == 1.0)
        )
    with pytest.raises(TaskError, match="generator=none cannot be made"):
        make_task("reasoning-gym", 0, {"generator": "none"})
    with pytest.raises(TaskError, match="nearly all its questions are held out"):
        make_task("reasoning-gym", 0, {"generator": "sums", "options": {"most": 3}}).train_problem(0)
    with pytest.raises(TaskError, match="teacher_field"):
        make_task("reasoning-gym", 0, {"generator": "sums", "teacher_field": "none"})


def test_skyrl_steps_are_turns_and_their_rewards_add_up(sets, monkeypatch):
    class Env:
        closed = 0

        def __init__(self, env_config, extras):
            self.left = extras["reward_spec"]["ground_truth"]

        def init(self, prompt):
            return [*prompt[:-1], {"role": "user", "content": prompt[-1]["content"] + f" ({self.left} left)"}], {}

        def step(self, text):
            self.left -= 1
            return {"observations": [{"role": "user", "content": f"{self.left} left"}], "reward": 0.5, "done": self.left == 0}

        def close(self):
            Env.closed += 1

    gym = types.ModuleType("skyrl_gym")
    gym.registry = {"down": Env}
    gym.make = lambda name, **given: gym.registry[name](**given)
    monkeypatch.setitem(sys.modules, "skyrl_gym", gym)
    rows = [{"prompt": f"Count {n}.", "env_class": "down", "reward_spec": {"ground_truth": n}} for n in (2, 3)]
    task = make_task("skyrl", 0, sets(rows[:1], rows[1:]) | {"teacher_field": "reward_spec.ground_truth"})
    problem = task.train_problem(0)
    assert problem.messages[-1]["content"] == "Count 2. (2 left)" and problem.answer == "2"
    episode = task.episode(problem)
    assert [m.content for m in episode.step("one").messages] == ["1 left"] and not episode.step("two").messages
    assert episode.outcome("done").success and episode.outcome("done").reward == 1.0
    closed = Env.closed
    episode.close()
    assert Env.closed == closed + 1
    with pytest.raises(TaskError, match="env=up cannot be made"):
        make_task("skyrl", 0, sets(rows[:1], rows[1:]) | {"env": "up"})


def test_openenv_offers_its_tools_or_takes_turns(sets):
    rows = [{"prompt": "Up.", "reset": {"seed": n}, "goal": "three"} for n in (0, 1)]
    base = sets(rows[:1], rows[1:]) | {"base_url": "x", "client": "stand_in_worlds:Client", "observation_field": "text"}
    task = make_task("openenv", 0, base | {"teacher_field": "goal"})
    problem = task.held_out(1)[0]
    assert problem.messages[-1]["content"] == "Up.\nat 1" and problem.tools[0]["function"]["name"] == "up"
    episode = task.episode(problem)
    assert [m.content for m in episode.step(call_turn("up", {})).messages] == ["at 2"]
    assert episode.step(call_turn("down", {})).errors == 1
    assert not episode.step(call_turn("up", {"by": 1})).messages and episode.outcome("done").reward == 1.0
    episode.close()
    text = make_task("openenv", 0, base | {"action_field": "message"})
    episode = text.episode(text.held_out(1)[0])
    assert episode.step("up").messages[0].role == "user" and not episode.step("up").messages
    episode.close()
    assert worlds.Client.open == 0
    with pytest.raises(TaskError, match="base_url is missing"):
        make_task("openenv", 0, base | {"base_url": ""})


def test_an_mcp_servers_tools_keep_their_state_for_an_episode(sets):
    mcpserver = pytest.importorskip("mcp.server.mcpserver", reason="the package mcp is older than 2, or missing")

    class Local(McpTask):
        @property
        def target(self):  # a server in this process: a process of its own takes seconds to start
            server, total = mcpserver.MCPServer("sums"), [0]

            def add(number: int) -> str:
                """Add a number to the sum so far."""
                total[0] += number
                return str(total[0])

            server.add_tool(add)
            return server

    rows = [{"prompt": "Add up 3 and 4.", "sum": 7}, {"prompt": "Add up 1.", "sum": 1}]
    task = Local(**sets(rows[:1], rows[1:]), server="local", judge="stand_in_worlds:judge", teacher_field="sum")
    problem = task.train_problem(0)
    for _ in range(2):  # each episode has a session of its own
        episode = task.episode(problem)
        said = [resolved(episode.step(call_turn("add", {"number": n}))) for n in (3, 4)]
        assert [reply.messages[0].content for reply in said] == ["3", "7"]
        wrong = resolved(episode.step("\n".join([call_turn("add", {"number": "x"}), call_turn("take", {})])))
        assert wrong.errors == 2 and len(wrong.messages) == 2
        assert not resolved(episode.step("It is 7.")).messages
        assert resolved(episode.outcome("done")).success and not resolved(episode.outcome("length")).success
        resolved(episode.close())
    with pytest.raises(TaskError, match="judge is missing"):
        Local(**sets(rows[:1], rows[1:]), server="local")


# --- workers ------------------------------------------------------------------------------------------------------------


def worker(**args):
    return make_task("worker", 0, {"python": sys.executable, "worker": STAND_IN, "timeout": 20.0} | args)


def test_a_worker_holds_episodes_and_more_are_started():
    task = worker()
    problem = task.train_problem(0)
    assert problem.tools and problem.answer in problem.teacher_messages[-1]["content"] and task.shows_truth
    assert problem == worker().train_problem(0) and {p.id for p in task.held_out(9)} == {f"test-{i}" for i in range(4)}
    episodes = [task.episode(problem) for _ in range(3)]  # two fit into a process
    outcomes = []
    for number, episode in enumerate(episodes):
        right = int(problem.answer.split()[-1])
        reply = episode.step("\n".join([call_turn("open_box", {"box": right if number else -1}), "<tool_call>x"]))
        assert (reply.calls, reply.errors, len(reply.messages)) == (2, 1, 2)
        assert not episode.step("That is all.").messages
        outcomes.append(episode.outcome("done"))
    assert [outcome.success for outcome in outcomes] == [False, True, True]
    assert len({outcome.metrics["pid"] for outcome in outcomes}) == 2
    for episode in episodes:
        episode.close()
    again = task.episode(problem)
    assert again.outcome("done").metrics["pid"] in {outcome.metrics["pid"] for outcome in outcomes}
    task.pool.end()


def test_a_worker_that_dies_hangs_or_refuses_is_an_error_with_its_words():
    task = worker(held_out_split="hostile", timeout=3.0)
    problems = {problem.id: problem for problem in task.held_out(9)}
    for name, error, said in (
        ("dies", WorkerDied, "it ended.*the simulator fell over"),
        ("hangs", WorkerDied, "nothing within 3 s"),
        ("garbles", WorkerError, "RuntimeError: a box is stuck"),
    ):
        episode = task.episode(problems[name])
        with pytest.raises(error, match=said):
            episode.step("go")
        if error is WorkerDied:
            with pytest.raises(WorkerDied, match="is gone"):
                episode.outcome("error")
        episode.close()
    assert not task.episode(problems["hostile-0"]).step("done").messages  # a fresh process serves the next
    task.pool.end()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"python": "no-such-python"}, "is no program"),
        ({"worker": "none.py"}, "is no file: use one of toolsandbox, appworld"),
        ({"split": "broken"}, "KeyError: 'no such split'"),
        ({"options": {"colour": 1}}, "unexpected keyword argument 'colour'"),
        ({"worker": __file__}, "the worker's hello"),
        ({"timeout": 0.0}, "timeout: 0.0 must be above 0"),
    ],
)
def test_what_is_wrong_with_a_worker_is_said_before_a_run(args, said):
    with pytest.raises(TaskError, match=said):
        worker(**args)
