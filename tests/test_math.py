"""The mathematics sets, the judge of their answers, and mixtures of tasks."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from gear_trainer.config import load_config
from gear_trainer.rollout import Rollout, is_mixed, mixed_groups
from gear_trainer.tasks import Outcome, Problem, TaskError, make_task
from gear_trainer.tasks.math.checker import MEMORY_LIMIT, AnswerChecker, Verdict, answer_checker
from gear_trainer.tasks.math.rows import any_row, normalised, read_rows

DATA = os.environ.get("GEAR_DATA")
real = pytest.mark.skipif(DATA is None, reason="GEAR_DATA names no folder with gsm8k/, math/, arpo/ ...")
DEMO = "gear_trainer/configs/mathapi_cpu.yaml"


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


def data(name: str) -> str:
    assert DATA is not None
    return str(Path(DATA) / name)


# --- the sets -----------------------------------------------------------------------------------------------------------

SVAMP = {"ID": "c", "Body": "Dan had $ 3", "Question": "How much?", "Equation": "( 4.0 - 3.0 )", "Answer": 1.0}
MAWPS = {"Question": "Give number0 and number1 .", "Numbers": "8.0 2.5", "Equation": "- + number0 number1 6.0", "Answer": "4.5"}


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        ({"question": "q", "answer": "<<1+1=2>>two\n#### 2"}, ("q", "two", "2")),
        ({"problem": "q", "solution": r"so \boxed{x}"}, ("q", r"so \boxed{x}", "x")),
        ({"id": 60, "problem": "q", "solution": "s", "answer": "204", "url": "u", "question": "q"}, ("q", "s", "204")),
        ({"problem": "q", "answer": 70, "id": "0"}, ("q", "", "70")),
        ({"ID": 1, "Problem": "q", "Solution": "s", "Answer": 7.0}, ("q", "s", "7")),
        (SVAMP, ("Dan had $ 3, How much?", "( 4 - 3 ) = 1", "1")),
        (MAWPS, ("Give 8 and 2.5 .", "(8 + 2.5) - 6 = 4.5", "4.5")),
        ({"reward_model": {"ground_truth": "3"}, "extra_info": {"question": "q"}, "ability": "math"}, ("q", "", "3")),
        ({"reward_model": {"ground_truth": "3"}, "prompt": [{"role": "user", "content": "q"}]}, ("q", "", "3")),
        ({"reward_model": {"ground_truth": {"question": "q", "solution": "s", "target": "3"}}}, ("q", "s", "3")),
    ],
)
def test_any_row_reads_each_sets_columns(raw, row):
    found = any_row(raw)
    assert found is not None and (found.problem, found.solution, found.answer) == row


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.json", "{", r"a\.json is not valid JSON"),
        ("a.json", "{}", r"a\.json holds no JSON array"),
        ("a.json", '[{"Body": "b", "Question": "q"}]', r"a\.json, item 1: no field 'answer' \(the row has 'Body', 'Question'\)"),
        ("a.csv", "Question,Numbers,Equation,Answer\nq,1.0\n", r"a\.csv, line 2 has another number of fields than the header"),
        (
            "a.csv",
            "Question,Numbers,Equation,Answer\nnumber1,1.0,+ 1 1,2\n",
            r"a\.csv, line 2: number1 has no value in 'Numbers'",
        ),
        ("a.csv", "Question,Numbers,Equation,Answer\nq,1.0,+ 1,2\n", r"line 2: the 'Equation' breaks off"),
        (
            "a.csv",
            "Question,Numbers,Equation,Answer\nq,1.0,+ 1 2 3,2\n",
            r"line 2: the 'Equation' goes on behind its end with '3'",
        ),
        ("a.csv", 'Question,Answer\n"q,2\n', r"a\.csv, line [23] is not valid CSV"),
        ("a.jsonl", '{"text": "q"}', r"a\.jsonl, line 1: no field 'problem' or 'question' \(the row has 'text'\)"),
        ("a.txt", "q", r"a\.txt must be a \.jsonl or \.parquet file"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=match):
        read_rows(str(tmp_path / name), None, "train", any_row)


def test_rows_that_cannot_be_judged_are_left_out_and_counted(tmp_path, caplog):
    rows = [
        {"problem": "p1", "answer": "1"},
        {"problem": "p2", "answer": " "},
        {"problem": "p3", "answer": r"\frac{\}{2}"},
        {"problem": "p4", "answer": "x", "ability": "qa"},
        {"problem": "is \x0crac{1}{2} large?", "answer": "no"},
    ]
    found = read_rows(write(tmp_path / "a.jsonl", rows), None, "train", any_row)
    assert [row.problem for row in found] == ["p1", "is \x0crac{1}{2} large?"]
    told = caplog.text
    for line, what in [(2, "have no answer"), (3, "whose braces do not close"), (4, "no mathematics"), (5, "lost a backslash")]:
        assert any(what in text and f"a.jsonl, line {line}" in text for text in told.splitlines()), (line, told)


def test_a_problem_is_the_same_however_it_is_set():
    assert normalised("Find $\\dfrac{1}{2} + x$.\n") == normalised(" find  $\\frac{ 1 }{ 2 }+x\\,$") == "find frac 1 2 + x"
    assert normalised("$x + 1$") != normalised("$x - 1$") and normalised("1 1") != normalised("11") and normalised("?") == "?"
    assert normalised(r"\left( a \right)") == normalised("(a)") and normalised(r"\triangle") == "triangle"


@pytest.fixture
def several(tmp_path):
    train = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]
    one = [{"question": f"What is {i}+1 ?", "answer": f"sum\n#### {i + 1}"} for i in range(3)]
    two = [{"problem": "what is  $7 + 1$?", "answer": 8}, {"problem": "other", "answer": "x"}]
    held_out = {"one": write(tmp_path / "one.jsonl", one), "two": {"path": write(tmp_path / "two.jsonl", two)}}
    return lambda **args: make_task("math", 0, {"path": write(tmp_path / "train.jsonl", train), "held_out_path": held_out} | args)


def test_several_held_out_sets_have_names_and_none_is_trained_on(several, caplog):
    task = several()
    assert task.sets == ("one", "two")
    problems = task.held_out(99)
    assert [p.id for p in problems] == ["one-0", "two-0", "one-1", "two-1", "one-2"]
    assert [p.category for p in problems] == ["one", "two", "one", "two", "one"] and task.held_out(3) == problems[:3]
    trained = {task.train_problem(i).messages[0]["content"].split("\n")[0] for i in range(16)}
    assert trained == {f"What is {i} + 1?" for i in range(20) if i not in (0, 1, 2, 7)}
    assert "4 of 20 problems" in caplog.text and "held out too" in caplog.text


@pytest.mark.parametrize("sets", [{}, {"one": 3}, {"one": {"path": "a.jsonl", "lines": 3}}, {"": "a.jsonl"}, {"one": {}}])
def test_wrong_names_of_held_out_sets(several, sets):
    with pytest.raises(TaskError, match="held_out_path"):
        several(held_out_path=sets)


def test_answers_without_solutions(several, tmp_path):
    task = several()
    unsolved, solved = task.train_problem(0), task.held_out(1)[0]
    taught = unsolved.teacher_messages[0]["content"]
    assert f"The final answer to this problem is {unsolved.answer}." in taught and "solution" not in taught
    assert unsolved.data["solution"] == "" and "Here is a reference solution" in solved.teacher_messages[0]["content"]
    file = tmp_path / "mine.txt"
    file.write_text("{problem} -> {answer}")
    mine = several(teacher_template=str(file))
    assert mine.train_problem(0).teacher_messages[0]["content"].endswith(f"? -> {unsolved.answer}")
    assert mine.held_out(1)[0].teacher_messages[0]["content"] == "What is 0+1 ? -> 1"
    file.write_text("{problem} {solution}")
    with pytest.raises(TaskError, match=r"\{answer\} is missing"):
        several(teacher_template=str(file))


@real
def test_arpos_set_without_the_52_problems_of_maths_test_set(caplog):
    held_out = {
        "math": data("math/test.parquet"),
        **{name: data(f"{name}/test.jsonl") for name in ("math500", "aime24", "aime25")},
    }
    with caplog.at_level(logging.WARNING):
        task = make_task("math", 0, {"path": data("arpo/math_5k.jsonl"), "held_out_path": held_out})
    assert "52 of 4999 problems" in caplog.text and "1 of 5000 problems have no answer" in caplog.text
    assert "3 of 30 problems hold control characters" in caplog.text  # AIME25 as it is published
    ids = [task.train_problem(i).id for i in range(4947)]
    assert len(set(ids)) == 4947 and task.train_problem(4947).id in ids
    assert Counter(p.category for p in task.held_out(200)) == {"math": 70, "math500": 70, "aime24": 30, "aime25": 30}


@real
@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "math500/test.jsonl", "aime24/test.jsonl", "aime25/test_repaired.jsonl"])
def test_gold_answers_score_1(name, tmp_path):
    """Every item of three sets, and every fourth of GSM8K's."""
    path = write(tmp_path / "train.jsonl", [{"problem": "none of them", "answer": "1"}])
    task = make_task("math", 0, {"path": path, "held_out_path": {"it": data(name)}})
    failed = []
    for problem in task.held_out(9999)[:: 4 if name.startswith("gsm8k") else 1]:
        episode = task.episode(problem)
        episode.step(f"<think>hm</think>So \\boxed{{{problem.answer}}}.")
        if episode.outcome("done") != Outcome(1.0, True, {"no_answer": 0.0, "unreadable": 0.0, "check_broken": 0.0}):
            failed.append((problem.id, problem.answer))
    assert not failed


# --- the judge ----------------------------------------------------------------------------------------------------------

R, W, N, U = Verdict.RIGHT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.UNREADABLE

# gold; what is in the box, right; what is in it, wrong
BOXED = [
    (r"\frac{1}{2}", [r"\frac12", "1/2", r"\dfrac{1}{2}", r"\tfrac{2}{4}", "0.5", ".5", r"50\%", r"\left(\frac{1}{2}\right)"],
     ["2", r"-\frac{1}{2}", r"\frac{2}{1}", "0.49", r"5\%"]),
    (r"-\frac{5}{2}", ["-2.5", r"\frac{-5}{2}", r"\frac{5}{-2}", r"-2\frac{1}{2}"], ["2.5", r"-\frac{2}{5}", r"2\frac{1}{2}"]),
    (r"\frac{1}{3}", ["1/3", "0.3333333", r"\frac{3}{9}"], ["0.33", "0.3", "3"]),
    ("18", ["18.0", r"\$18", r"18\text{ dollars}", "18 dollars", r"18\ \mathrm{cm}", "18.", "18 cm", "18 km/h", r"18^\circ",
            r"\text{18}", "x = 18", "9+9", r"\mathbf{18}", "{18}", "18 apples", "18 months",
            "18 km per hour", r"\boxed{18}", r"18\%"],
     ["81", "1 8", "18 000", "18, 19", r"18 \text{ or } 19", "18 hundred", "18 million", "18 thousand", "18 tenths",
      "18x", "-18", "180", "x"]),
    (r"50\%", ["50", r"50\%", "0.5", "50 percent"], ["500", r"5\%", "0.05"]),
    ("1000", ["1,000", r"1\,000", "1 000", "1{,}000", "10^3", r"1 \times 10^3"], ["1.000", "100", "1,00"]),
    (r"2\sqrt{2}", [r"\sqrt{8}", r"\sqrt8", r"\sqrt{2}\cdot 2"], [r"\sqrt{2}", "2.8", r"4\sqrt{2}"]),
    (r"2\sqrt{3}\pi", [r"2\pi\sqrt{3}", r"\pi\sqrt{12}"], [r"2\sqrt{3}", r"\pi"]),
    (r"\pi", [r"\pi", r"\frac{2\pi}{2}"], ["3.14", r"\frac{22}{7}", "3"]),
    (r"[1,2)", ["[1, 2)", r"\left[1,2\right)", r"x \in [1,2)"], ["(1,2)", "[1,2]", "(1,2]", "[2,1)", "[1,3)"]),
    (r"(-\infty,-4)\cup (4,\infty)", [r"(-\infty,-4)\cup(4,+\infty)", r"(4,\infty)\cup(-\infty,-4)"],
     [r"(-\infty,4)\cup(4,\infty)", r"(-\infty,-4]\cup[4,\infty)", r"(4,\infty)"]),
    ("(3,-1)", ["(3, -1)", r"\left(3,-1\right)", "(x,y)=(3,-1)"], ["(-1,3)", "(3,1)", "(3,-1,0)"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\frac{\pi}{2})", r"(3, \pi/2)", r"(3,0.5\pi)"],
     [r"(3,\pi)", r"(\frac{\pi}{2},3)"]),
    (r"\{1,2,3\}", [r"\{3,2,1\}", "1,2,3", r"\left\{1, 2, 3\right\}"], [r"\{1,2\}", r"\{1,2,4\}", "1"]),
    ("1,-2", ["-2, 1", r"1\text{ and }-2", r"x=1, x=-2"], ["1", "-2", "1,2", "1,-2,3"]),
    (r"\pm 2", ["2,-2", "-2, 2"], ["2", "-2", r"\pm 4"]),
    ("x^2+2x+1", ["(x+1)^2", "1+2x+x^2", "(x+1)(x+1)"], ["x^2+2x", "(x-1)^2", "(x+1)^3"]),
    ("y=2x+1", ["2x+1", "y = 1+2x", "y=2x + 1"], ["y=2x-1", "2x"]),
    (r"\binom{m+n}{n}", [r"\frac{(m+n)!}{m!n!}"], [r"\binom{m}{n}"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"],
     [r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"]),
    (r"\text{Evelyn}", ["Evelyn", r"\text{evelyn}", r"\textbf{Evelyn}"], [r"\text{Briana}", "5"]),
    (r"\text{(C)}", [r"\text{(C)}", "C", "(C)", r"\textbf{(C)}"], ["D", r"\text{(B)}", "3"]),
    ("C: 7", ["C", "7", "C: 7", "(C) 7", r"\text{(C)}", r"\textbf{(C)}\ 7", "C. 7"],
     ["D", "D: 7", "8", "C: 8", r"\textbf{(A)}\ 7"]),
    ("1011_2", ["1011_2", "1011_{2}"], ["1101_2", "11"]),
    ("8:30", ["8:30", r"8\!:\!30"], ["8:31", "9:30"]),
    (r"120^\circ", ["120", r"120^{\circ}", r"120\text{ degrees}"], ["12", r"60^\circ"]),
    ("73", ["073", "73.00"], ["37", "0.73", "730"]),
    ("6.02 \\times 10^{23}", [r"6.02\cdot 10^{23}", r"6.02 \times 10^{23}\text{ m}"], [r"6.02 \times 10^{22}", "6.02"]),
    ("3x^2 - 4", ["-4+3x^2", "3x^{2}-4"], ["3x^2+4", "3x-4"]),
    (r"\log_2 8", ["3", r"\log_{2} 8"], ["2", r"\log_2 9"]),
]  # fmt: skip

WHOLE = [  # gold, the whole turn, verdict
    ("18", r"First \boxed{9}, then \boxed{18}", R),
    ("9", r"First \boxed{9}, then \boxed{18}", W),
    ("18", "The answer is 18.", R),
    ("18", "The answer is 18 dollars.", R),
    ("18", "9 + 9 = 18\n#### 18", R),
    ("18", "#### 19", W),
    ("18", "so she has 18", N),
    ("18", "", N),
    ("18", "I give up", N),
    ("18", r"\boxed{18", N),
    ("18", r"\boxed{", N),
    ("18", r"\boxed{\frac{36}{2}", N),
    ("18", r"\boxed{}", U),
    ("18", r"\boxed{?}", U),
    ("18", r"\boxed{\rac{36}{2}}", U),
    (r"\frac{1}{2}", "\\boxed{\x0crac{1}{2}}", W),
    (r"\frac{1}{2}", r"\boxed{rac{1}{2}}", W),
    (r"\frac{1}{2}", r"\boxed{\frac{1}}", W),
    (r"\frac{1}{2}", r"oxed{\frac{1}{2}} so it is", N),
    (r"\frac{1}{2}", r"\boxed{frac{1}{2}}", W),
    ("5", r"\boxed{5\text{ hours and }30\text{ minutes}}", N),
    ("18", r"<think>\boxed{18}</think> it is \boxed{19}", W),
    ("18", r"<think>\boxed{19}</think> it is \boxed{18}", R),
]


def generated(seed: int = 0) -> list[tuple[str, str, Verdict]]:
    """Answers whose verdict follows from how they are made: equal values in other spellings, and other values."""
    rng, found = random.Random(seed), []
    for _ in range(20):
        value = Fraction(rng.randint(1, 60), rng.randint(2, 12)) * rng.choice((1, -1))
        top, bottom, k = value.numerator, value.denominator, rng.randint(2, 5)
        gold = f"\\frac{{{top}}}{{{bottom}}}" if bottom > 1 else str(top)
        sign, digits = "-" if top < 0 else "", rng.randint(1, 6)
        found += [
            (gold, f"\\boxed{{{top}/{bottom}}}", R),
            (gold, f"The answer is $\\frac{{{k * top}}}{{{k * bottom}}}$.", R),
            (gold, f"\\boxed{{{sign}\\dfrac{{{abs(top)}}}{{{bottom}}}\\text{{ m}}}}", R),
            (gold, f"\\boxed{{\\frac{{{top + digits}}}{{{bottom}}}}}", W),
            (gold, f"\\boxed{{{-top}/{bottom}}}", W),
        ]
    return found


def judged() -> list[tuple[str, str, Verdict]]:
    cases = [(gold, f"So \\boxed{{{answer}}}.", R) for gold, right, _ in BOXED for answer in right]
    cases += [(gold, f"So \\boxed{{{answer}}}.", W) for gold, _, wrong in BOXED for answer in wrong]
    return cases + WHOLE + generated()


def test_300_answers_are_judged_as_marked():
    checker, cases = answer_checker(10.0), judged()
    assert len(cases) >= 300
    found = [(gold, text, mark.value, checker.judge(gold, text).value) for gold, text, mark in cases]
    wrong = [case for case in found if case[2] != case[3] and not (case[2] == "wrong" and case[3] in ("no_answer", "unreadable"))]
    assert not wrong, wrong


HOSTILE = {
    "a tower": "9^{9^{9^{9^9}}}",
    "a factorial": "(10^9)!",
    "a factorial of a factorial": "99999!!!",
    "an expansion": "(x+y+z+w)^{4000}",
    "memory": "2^{10^{11}}",
    "digits": "9" * 400_000,
    "nesting": "\\frac{1}{" * 3000 + "2" + "}" * 3000,
    "roots": "\\sqrt{" * 2000 + "2" + "}" * 2000,
    "a sum": r"\sum_{i=1}^{10^{9}} \sin(i)",
}


def test_a_hostile_answer_stays_within_its_limits():
    """No verdict is right, none costs more processor time than its limit and a fresh start, and the next answer is judged."""
    checker = AnswerChecker(0.5)
    try:
        assert checker.judge("18", r"\boxed{18}") is R
        assert checker._worker and resource.prlimit(checker._worker.pid, resource.RLIMIT_AS) == (MEMORY_LIMIT, MEMORY_LIMIT)
        for what, answer in HOSTILE.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert checker.judge("18", f"\\boxed{{{answer}}}") in (W, U, Verdict.CHECK_BROKEN), what
            checker.close()  # so that its time and memory are counted
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20, what
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 5 << 20  # KiB, of the largest child there was
        assert checker.judge("18", r"\boxed{18}") is R and checker.timeouts >= 1
    finally:
        checker.close()


def test_a_zero_has_a_reason(several):
    task = several()
    problem = task.train_problem(0)
    for text, reason in [("no idea", "no_answer"), (r"\boxed{?}", "unreadable"), (r"\boxed{99}", None), (None, "no_answer")]:
        episode = task.episode(problem)
        if text is not None:
            episode.step(text)
        outcome = episode.outcome("done" if text else "length")
        assert outcome.reward == 0 and {name for name, value in outcome.metrics.items() if value} == ({reason} - {None}), text


# --- mixtures -----------------------------------------------------------------------------------------------------------

PARTS = {"tools": {"task": "mathapi", "weight": 2}, "sums": {"task": "sums", "weight": 0.5}}


@pytest.fixture(scope="module")
def mixture():
    return make_task("mixture", 3, {"parts": PARTS})


def test_a_mixture_is_a_function_of_the_index(mixture):
    again = make_task("mixture", 3, {"parts": PARTS})
    assert [again.train_problem(i) for i in (700, 3, 41)] == [mixture.train_problem(i) for i in (700, 3, 41)]
    problems = [mixture.train_problem(i) for i in range(100)]
    assert all(Counter(p.category for p in problems[i : i + 5]) == {"tools": 4, "sums": 1} for i in range(0, 100, 5))
    assert len({tuple(p.category for p in problems[i : i + 5]) for i in range(0, 100, 5)}) > 2  # no fixed order within a block
    for name, task in (("tools", "mathapi"), ("sums", "sums")):
        inner = [p.data["problem"] for p in problems if p.category == name]
        alone = make_task(task, 3)
        assert inner == [alone.train_problem(i) for i in range(len(inner))]
    assert mixture.train_problem(1 << 40) == again.train_problem(1 << 40)


def test_a_mixtures_problems_bring_what_their_task_has(mixture):
    tools, sums = (make_task(name, 3) for name in ("mathapi", "sums"))
    held_out = mixture.held_out(10)
    assert [p.category for p in held_out] == ["tools", "sums"] * 5 and len(mixture.held_out(100)) == 100
    assert held_out == make_task("mixture", 9, {"parts": PARTS}).held_out(10)
    first, second = held_out[:2]
    assert (first.tools, first.max_turns, first.id) == (tools.tools, tools.max_turns, f"tools/{tools.held_out(1)[0].id}")
    assert (second.tools, second.max_turns, second.messages) == (None, 1, sums.held_out(1)[0].messages)
    assert (mixture.max_turns, mixture.concurrency, mixture.turn_rewards) == (tools.max_turns, 2, False)
    episode = mixture.episode(second)
    assert not episode.step(second.answer).messages and episode.outcome("done").success


def test_a_mixture_reports_its_parts_apart(several):
    parts = {"math": {"task": "math", "args": {"path": several().path, "held_out_path": several().held_out_path}}, **PARTS}
    task = make_task("mixture", 0, {"parts": parts})
    problems = task.held_out(6)
    assert [p.category for p in problems[:3]] == ["math/one", "tools", "sums"]
    scored = [(p, Outcome(1.0, True, {"no_answer": 0.5} if p.data["part"] == "math" else {})) for p in problems]
    assert task.report(scored) == {"math/no_answer": 0.5}


def test_a_mixture_has_demonstrations_where_all_its_parts_have(several):
    parts = {"small": {"task": "mathapi", "weight": 2, "args": {"max_operand": 20}}, "large": {"task": "mathapi"}}
    mixture = make_task("mixture", 0, {"parts": parts})
    mix, rng = dict(mixture.demo_mix), random.Random(0)
    assert set(mix) == {"right", "other"} and sum(mix.values()) == pytest.approx(1)
    for index in range(20):
        problem = mixture.train_problem(index)
        assert mixture.wrong_answer(problem, rng) != problem.answer
        for kind in mix:
            episode = mixture.episode(problem)
            for turn in mixture.demonstrate(problem, kind, rng):
                episode.step(turn)
            assert episode.outcome("done").success or kind == "other"
    plain = {"math": {"task": "math", "args": {"path": several().path, "held_out_path": several().held_out_path}}}
    assert not hasattr(make_task("mixture", 0, {"parts": plain}), "demonstrate")


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({}, "names no task"),
        ({"a": "mathapi"}, r"parts\.a is 'mathapi': give \{task"),
        ({"a": {"task": "mathapi", "share": 1}}, r"parts\.a is"),
        ({"a": {"task": "mathpai"}}, r"parts\.a: unknown task 'mathpai'"),
        ({"a": {"task": "mathapi", "args": {"x": 1}}}, r"parts\.a: task 'mathapi' has no argument 'x'"),
        ({"a": {"task": "sums", "weight": 0}}, r"parts\.a\.weight is 0: give a number above 0"),
        ({"a": {"task": "sums", "weight": "2"}}, r"parts\.a\.weight is '2'"),
        ({"a": {"task": "sums", "weight": 0.12345}, "b": {"task": "mathapi"}}, "give rounder ones"),
    ],
)
def test_wrong_mixtures(parts, match):
    with pytest.raises(TaskError, match=match):
        make_task("mixture", 0, {"parts": parts})


def group(rewards, threshold=1.0, failed=()):
    rollouts = [
        Rollout(Problem("0", [], [], ""), 0, k, [1], [1], reward=r, success=r >= threshold) for k, r in enumerate(rewards)
    ]
    for k in failed:
        rollouts[k].status = type(rollouts[k].status).ERROR
    return rollouts


def test_groups_of_graded_rewards_are_filtered_by_their_spread():
    assert not is_mixed(group([0.2, 0.8])) and is_mixed(group([0.2, 0.8]), 0.5) and not is_mixed(group([0.2, 0.8]), 0.7)
    assert not is_mixed(group([0.5, 0.5]), 0.0) and is_mixed(group([0.0, 1.0]), 0.5) and is_mixed(group([0.0, 1.0]))
    assert not is_mixed(group([0.2, 0.8], failed=[0]), 0.1)
    batches = [[group([0.2, 0.3]), group([0.2, 0.9])], [group([0.1, 0.9])]]

    def sample(batch, slots):
        return [r for slot, one in zip(slots, batches[batch], strict=True) for r in _numbered(one, slot)]

    rollouts, counts = mixed_groups(sample, 2, 3, 0.5)
    assert [r.reward for r in rollouts] == [0.1, 0.9, 0.2, 0.9] and counts == {"mixed_groups": 1, "resampled_groups": 1}
    assert load_config(DEMO, ["rollout.filter_spread=0.1"]).rollout.filter_spread == 0.1


def _numbered(rollouts, slot):
    for r in rollouts:
        r.group = slot
    return rollouts
