"""Task families: tool calls of every malformed kind, disjoint and stateless problems, templates, data files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gear_trainer.tasks import TASKS, Outcome, TaskError, make_task, tool_calls
from gear_trainer.tasks.common import fill, last_number
from gear_trainer.tasks.math.answer import final_answer, last_boxed
from gear_trainer.tasks.math.checker import answer_checker
from gear_trainer.tasks.math.rows import gsm8k_row, math_row
from gear_trainer.tasks.mathapi.task import LIMIT, MAX_CALLS

DATA = os.environ.get("GEAR_DATA")


def call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def named(name: object, arguments: object) -> str:
    return call(json.dumps({"name": name, "arguments": arguments}))


def call_turn(tool: str, a: int, b: int) -> str:
    return tool_calls.call_turn(tool, {"a": a, "b": b})


def texts(reply) -> list[str]:
    assert all(message.role == "tool" for message in reply.messages)
    return [message.content for message in reply.messages]


BAD_CALLS = {
    "no JSON": call("add(1, 2)"),
    "empty": call(""),
    "truncated JSON": call('{"name": "add", "arguments": {"a": 1'),
    "not closed": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}',
    "not an object": call("[1, 2]"),
    "deep nesting": call("[" * 100_000),
    "no arguments": call('{"name": "add"}'),
    "extra key": call('{"name": "add", "arguments": {"a": 1, "b": 2}, "x": 1}'),
    "unknown tool": named("divide", {"a": 1, "b": 2}),
    "dunder": named("__init__", {"a": 1, "b": 2}),
    "name is a list": named(["add"], {"a": 1, "b": 2}),
    "missing argument": named("add", {"a": 1}),
    "extra argument": named("add", {"a": 1, "b": 2, "c": 3}),
    "wrong argument": named("add", {"x": 1, "y": 2}),
    "arguments are a list": named("add", [1, 2]),
    "string": named("add", {"a": "1", "b": 2}),
    "code": named("add", {"a": "__import__('os')", "b": 2}),
    "bool": named("add", {"a": True, "b": 2}),
    "null": named("add", {"a": None, "b": 2}),
    "NaN": call('{"name": "add", "arguments": {"a": NaN, "b": 2}}'),
    "infinite": call('{"name": "add", "arguments": {"a": 1e999, "b": 2}}'),
    "too large": named("multiply", {"a": LIMIT * 10, "b": 2}),
    "400 digits": call('{"name": "multiply", "arguments": {"a": ' + "9" * 400 + ', "b": 2}}'),
    "5000 digits": call('{"name": "multiply", "arguments": {"a": ' + "9" * 5000 + ', "b": 2}}'),
    "control characters": call('{"name": "add\x00", "arguments": {}}'),
}


@pytest.fixture(scope="module")
def mathapi():
    return make_task("mathapi", 0, {})


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_bad_call_is_a_counted_tool_error(mathapi, kind):
    episode = mathapi.episode(mathapi.train_problem(0))
    reply = episode.step(BAD_CALLS[kind])
    assert (reply.calls, reply.errors, len(reply.messages)) == (1, 1, 1)
    assert list(json.loads(texts(reply)[0])) == ["error"]
    assert len(texts(reply)[0]) < 80  # fixed texts: an error never echoes what the model wrote
    assert episode.outcome("done").reward == 0.0


def test_good_calls_run_on_the_tool(mathapi):
    episode = mathapi.episode(mathapi.train_problem(0))
    two = call_turn("multiply", 12, 34) + "\n" + named("add", {"a": 0.1, "b": 0.2})
    reply = episode.step(two)
    assert texts(reply) == ['{"result": 408}', '{"result": 0.3}'] and (reply.calls, reply.errors) == (2, 0)
    assert texts(episode.step(named("subtract", {"a": 1.5, "b": 4.5}))) == ['{"result": -3}']


def test_a_runaway_list_of_calls_is_bounded(mathapi):
    reply = mathapi.episode(mathapi.train_problem(0)).step(call_turn("add", 1, 2) * 500)
    assert (len(reply.messages), reply.calls, reply.errors) == (MAX_CALLS + 1, 500, 500 - MAX_CALLS)


def test_reward_is_the_last_number_of_an_ended_answer(mathapi):
    problem = mathapi.train_problem(5)
    wrong = str(int(problem.answer) + 1)
    for turns, reward in [
        ([problem.answer], 1.0),
        ([f"{wrong}, no: {problem.answer}.0"], 1.0),
        ([f"{problem.answer} or {wrong}"], 0.0),
        (["no number"], 0.0),
        ([], 0.0),
        ([problem.answer, call_turn("add", 1, 1)], 0.0),  # the last turn is a call, so no answer was given
    ]:
        episode = mathapi.episode(problem)
        for turn in turns:
            episode.step(turn)
        assert episode.outcome("done").reward == reward, turns


def test_demonstrations_score_as_named(mathapi):
    import random

    rng = random.Random(0)
    for index in range(50):
        problem = mathapi.train_problem(index)
        for kind, success in (("right", True), ("guess", False)):
            episode = mathapi.episode(problem)
            for turn in mathapi.demonstrate(problem, kind, rng):
                assert episode.step(turn).errors == 0
            assert episode.outcome("done").success is success


@pytest.mark.parametrize("name", ["mathapi", "sums"])
def test_problems_are_stateless_and_held_out_ones_disjoint(name):
    task, again = make_task(name, 3, {}), make_task(name, 3, {})
    order = [again.train_problem(i) for i in (700, 3, 41)]
    assert order == [task.train_problem(i) for i in (700, 3, 41)]
    assert task.train_problem(7) != make_task(name, 4, {}).train_problem(7)
    held_out = task.held_out(200)
    assert held_out == make_task(name, 9, {}).held_out(200)
    pairs = {(p.data["a"], p.data["b"]) for p in held_out}
    assert not pairs & {(p.data["a"], p.data["b"]) for p in map(task.train_problem, range(3000))}
    assert len({p.messages[0]["content"] for p in held_out}) == len(held_out) == (200 if name == "mathapi" else 17)


def test_a_report_averages_what_outcomes_measured(mathapi):
    """Beside success, each number over the outcomes that have it."""
    problem = mathapi.train_problem(0)
    scored = [(problem, Outcome(1.0, True, {"turns": 2.0, "cost": 5.0})), (problem, Outcome(0.0, False, {"turns": 1.0}))]
    assert mathapi.report(scored) == {"turns": 1.5, "cost": 5.0} and mathapi.report([]) == {}


def test_sums_episode():
    task = make_task("sums", 0)
    problem = task.train_problem(0)
    for text, reward in ((f"{problem.answer}", 1.0), (f" The answer is {problem.answer}.", 1.0), ("99", 0.0), ("", 0.0)):
        episode = task.episode(problem)
        assert not episode.step(text).messages
        assert episode.outcome("done").reward == reward
    assert task.episode(problem).outcome("done").reward == 0.0


def test_numbers():
    assert last_number("12-7") == "7" and last_number("= -5") == "-5" and last_number("$1,234.50.") == "1234.50"
    assert last_number("٣") is None and last_number("v1.2.3") is not None and last_number("") is None


def test_teacher_shows_the_truth_and_student_does_not(mathapi):
    problem = mathapi.train_problem(11)
    tool, a, b = (problem.data[k] for k in ("tool", "a", "b"))
    taught = problem.teacher_messages[0]["content"]
    assert json.dumps({"name": tool, "arguments": {"a": a, "b": b}}) in taught and problem.answer in taught
    assert taught.startswith(problem.messages[0]["content"]) and "name" not in problem.messages[0]["content"]


def test_teacher_template_of_the_user(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("{question} // {calls} // {answer}\n")
    problem = make_task("mathapi", 0, {"teacher_template": str(file)}).train_problem(0)
    assert problem.teacher_messages[0]["content"].endswith(f" // {problem.answer}")
    file.write_text("{question} {answer}")
    with pytest.raises(TaskError, match=r"mine\.txt.*\{calls\}.*missing"):
        make_task("mathapi", 0, {"teacher_template": str(file)})
    with pytest.raises(TaskError, match="nowhere.txt"):
        make_task("sums", 0, {"teacher_template": str(tmp_path / "nowhere.txt")})


def test_fill_reads_no_placeholders_in_values():
    assert fill("{problem} {x} {answer}", problem="\\frac{answer}{2}", answer="7") == "\\frac{answer}{2} {x} 7"


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("mathpai", {}, "unknown task 'mathpai'.*mathapi, sums, gsm8k, math"),
        ("nowhere.module:Task", {}, "cannot be loaded"),
        ("json:loads", {}, "no class"),
        ("json:JSONDecoder", {}, "not a gear_trainer|no argument|cannot"),
        ("mathapi", {"max_operands": 9}, r"no argument 'max_operands'.*max_operand \(int\)"),
        ("mathapi", {"max_operand": "9"}, "max_operand is '9', must be int"),
        ("mathapi", {"max_operand": True}, "must be int"),
        ("mathapi", {"max_operand": 3}, "max_operand: 3"),
        ("sums", {"teacher_template": 3}, "teacher_template is 3, must be str | None"),
        ("gsm8k", {}, "needs the argument 'path'"),
        ("gsm8k", {"path": "none.jsonl", "held_out_path": "none.jsonl"}, "none.jsonl does not exist"),
        ("math", {"path": "a.jsonl"}, "held_out_path is missing"),
    ],
)
def test_wrong_arguments(name, args, match):
    with pytest.raises((TaskError, TypeError), match=match if name != "json:JSONDecoder" else None):
        make_task(name, 0, args)


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, gear_trainer.tasks as t; t.make_task('mathapi', 0)\nprint({'torch', 'bfcl_eval'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()" and "mathapi" in TASKS


GOOD = [{"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(1, 41)]


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


@pytest.fixture
def gsm8k(tmp_path):
    held_out = write(tmp_path / "test.jsonl", GOOD[:8])
    return lambda rows=GOOD, **args: make_task(
        "gsm8k", 0, {"path": write(tmp_path / "train.jsonl", rows), "held_out_path": held_out} | args
    )


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ('{"question": "a", ', r"train\.jsonl, line 3 is not valid JSON.*mend or delete"),
        ("[1]", r"train\.jsonl, line 3 is not a JSON object"),
        ({"question": "a"}, r"train\.jsonl, line 3: no field 'answer' \(the row has 'question'\)"),
        ({"question": " ", "answer": "#### 1"}, r"line 3: no field 'question'"),
        ({"question": "a", "answer": "it is 5"}, r"line 3: the answer does not end in a line '#### n'"),
    ],
)
def test_a_broken_line_names_file_and_line(gsm8k, row, match):
    with pytest.raises(TaskError, match=match):
        gsm8k([*GOOD[:2], row, *GOOD[2:]])


def test_empty_binary_and_overlapping_files(gsm8k, tmp_path):
    with pytest.raises(TaskError, match="holds no problems"):
        gsm8k([])
    with pytest.raises(TaskError, match="held out too"):
        gsm8k(GOOD[:8])
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(TaskError, match=r"x\.parquet is not a readable parquet file"):
        make_task("math", 0, {"path": str(broken), "held_out_path": str(broken)})


def test_epochs_reshuffle_and_leave_held_out_rows_out(gsm8k):
    task = gsm8k()
    epochs = [[task.train_problem(e * 32 + i).messages[0]["content"] for i in range(32)] for e in range(3)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) and len(set(epochs[0])) == 32
    assert epochs[0] != epochs[1] != epochs[2] and epochs[1][5] == gsm8k().train_problem(32 + 5).messages[0]["content"]
    assert not set(epochs[0]) & {p.messages[0]["content"] for p in task.held_out(99)}


def test_math_teacher_prompt_and_answers(gsm8k):
    task = gsm8k(limit_s=2.0)
    problem = task.held_out(1)[0]
    student, taught = problem.messages[0]["content"], problem.teacher_messages[0]["content"]
    assert taught.startswith("What is 1 + 1?") and "It is 2." in taught and "<<" not in taught and "####" not in taught
    assert student.splitlines()[-1] == taught.splitlines()[-1]
    for text, reward in (("\\boxed{2}", 1), ("so \\boxed{\\frac{4}{2}}.", 1), ("\\boxed{3}", 0), ("", 0), ("(" * 9999, 0)):
        episode = task.episode(problem)
        episode.step(text)
        assert episode.outcome("done").reward == reward, text[:20]
    assert task.episode(problem).outcome("done").reward == 0.0


def test_a_degenerate_answer_cannot_hang(gsm8k):
    task = gsm8k(limit_s=1.0)
    episode = task.episode(task.held_out(1)[0])
    episode.step("\\boxed{9^{9^{9^{9^9}}}}")
    assert episode.outcome("done").reward == 0.0
    episode.step("\\boxed{2}")
    assert episode.outcome("done").reward == 1.0  # a new worker took over


JUDGED = [
    # the last box alone, whatever stands before, behind or between
    ("18", r"\boxed{9} ... then \boxed{18}", True),
    ("18", r"First $\boxed{9}$, then $\boxed{18}$.", True),
    ("18", r"The answers are $\boxed{9}$ and $\boxed{18}$", True),
    ("9", r"First $\boxed{9}$, then $\boxed{18}$.", False),
    ("18", r"\boxed{18}. But $20$ is also nice, and the answer is $20$", True),
    ("20", r"\boxed{18}. But $20$ is also nice, and the answer is $20$", False),
    ("18", r"The answer is 18. \boxed{", False),
    ("18", r"so \boxed 18", True),
    ("18", r"so \fbox{18}", True),
    (r"\{1,2\}", r"\boxed{\left\{1,2\right\}}", True),
    # without one: a last line, a last sentence, or nothing but the answer
    ("18", "The answer is 18.", True),
    ("18", "**The answer is: 18.**", True),
    ("18", "He pays twice.\n**Answer:** 18 dollars", True),
    ("18", r"Answer: \$18", True),
    ("3.5", "The answer is 3.5.", True),
    (r"\frac12", r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", True),
    (r"\frac12", r"so the answer is \frac{1}{2}.", True),
    ("18", "9 + 9 = 18\n#### 18", True),
    ("18", "#### 18\nor 20", False),
    ("18", "18", True),
    (r"\frac12", r"$\frac{1}{2}$", True),
    ("18", "The answer is 18. But 20 is also nice", False),
    ("20", "The answer is 18. But 20 is also nice", False),
    ("18", "so she has 18", False),
    # values joined by words
    *[(gold, text, False) for gold in ("5", "30") for text in (
        "5 hours and 30 minutes", "The answer is 5 hours and 30 minutes.", r"\boxed{5\text{ hours and }30\text{ minutes}}",
        r"\boxed{5 hours and 30 minutes}", "#### 5 hours and 30 minutes",
    )],
    (r"5\text{ hours and }30\text{ minutes}", r"\boxed{5\text{ hours and }30\text{ minutes}}", True),
    ("1,2", r"\boxed{1 \text{ and } 2}", True),
    ("50", r"\boxed{50\text{ cm}^2}", True),
    ("4,20", r"$\boxed{4^\circ, 20^\circ}$", True),
    # thousands
    *[("70000", text, True) for text in (
        "70 000", r"\boxed{70 000}", r"\boxed{70\,000}", r"\boxed{70\ 000}", r"\boxed{70~000}", r"\boxed{\$70\,000}",
        "\\boxed{70\u202f000}", r"\boxed{70,000}", r"\boxed{70{,}000}", "#### 70 000", "The answer is 70 000.",
    )],
    ("70 000", r"\boxed{70000}", True),
    ("1234567", r"\boxed{1 234 567}", True),
    ("70000", r"\boxed{70 0000}", False),
    ("5", r"\boxed{" * 9999, False),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "text", "right"), JUDGED)
def test_D7_what_counts_as_the_answer(gold, text, right):
    assert answer_checker(10.0).equal(gold, text) is right


@pytest.mark.parametrize(
    "part", ["answer is ", "1 ab ", "#### ", "\\boxed{1", "\\text{a", "^", "70 000 ", "{", "\\", "5 aa ", "9", "C: "]
)
def test_D7_a_degenerate_turn_is_read_in_linear_time(part):
    start = time.process_time()
    for text in (part * 20_000, "\\boxed{" + part * 20_000 + "}"):
        final_answer("1", text)
    assert time.process_time() - start < 5  # of this process alone: neighbours do not count


def test_rows():
    assert last_boxed(r"a \boxed{1} and \boxed{\frac{1}{2}}.") == r"\frac{1}{2}" and last_boxed("none") is None
    assert math_row({"problem": "p", "solution": r"so \boxed{x}"}).answer == "x"
    assert math_row({"problem": "p", "solution": r"so \boxed{}"}) is None
    assert math_row({"problem": "p", "solution": "s", "answer": 0}).answer == "0"
    assert gsm8k_row({"question": "q", "answer": "x\n#### 1,200"}).answer == "1200"
    assert math_row({"problem": "p", "answer": "1"}).solution == ""
    with pytest.raises(TaskError, match="no field 'answer' or 'target'"):
        math_row({"problem": "p"})


@pytest.mark.skipif(DATA is None, reason="GEAR_DATA names no folder with gsm8k/ and math/")
@pytest.mark.parametrize(("name", "ext"), [("gsm8k", "jsonl"), ("math", "parquet")])
def test_gold_answers_of_the_real_sets_score_1(name, ext):
    folder = Path(DATA) / name
    task = make_task(name, 0, {"path": str(folder / f"train.{ext}"), "held_out_path": str(folder / f"test.{ext}")})
    for problem in [*task.held_out(100), *map(task.train_problem, range(100))]:
        episode = task.episode(problem)
        episode.step(f"{problem.data['solution']}\nThe answer is \\boxed{{{problem.answer}}}.")
        assert episode.outcome("done").success, (problem.id, problem.answer)


@pytest.mark.skipif(DATA is None, reason="GEAR_DATA names no folder with gsm8k/ and math/")
@pytest.mark.parametrize(("name", "ext", "end"), [("gsm8k", "jsonl", "\n#### {}"), ("math", "parquet", "")])
def test_D7_gold_solutions_answer_as_their_sets_write_it(name, ext, end):
    """500 held-out solutions of each set, with GSM8K's last line: 998 of the 1,000 passed before the rule, all do now."""
    folder = Path(DATA) / name
    task = make_task(name, 0, {"path": str(folder / f"train.{ext}"), "held_out_path": str(folder / f"test.{ext}")})
    for problem in task.held_out(500):
        assert answer_checker(10.0).equal(problem.answer, problem.data["solution"] + end.format(problem.answer)), problem.id


def test_a_turn_is_rewarded_where_its_call_brings_the_answer(mathapi):
    problem = mathapi.train_problem(0)
    tool, a, b = (problem.data[name] for name in ("tool", "a", "b"))
    assert mathapi.episode(problem).step(call_turn(tool, a, b)).reward == 1
    assert mathapi.episode(problem).step(call_turn(tool, a, b + 1)).reward == 0
    assert mathapi.episode(problem).step(problem.answer).reward == 0  # the outcome is another matter
