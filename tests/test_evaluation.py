"""Evaluation: figures against counting by hand, chunks that resume to the same bytes, held-out sets of training, comparisons."""

from __future__ import annotations

import itertools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch.distributed as dist

from gear_trainer import cli, evaluation
from gear_trainer.config import make_config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.evaluation import paper, scores
from gear_trainer.evaluation.compare import compare
from gear_trainer.evaluation.records import read_records, read_result
from gear_trainer.evaluation.run import chunks_of, evaluate, trained_with
from gear_trainer.policy.checkpoint import export_step
from gear_trainer.report.build import write_evaluation
from gear_trainer.report.evaluation import comparison, line, page
from gear_trainer.report.samples import passages, samples
from gear_trainer.rollout import Completion, Engine, Request
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks import make_task
from gear_trainer.tasks.base import Episode, Message, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.math.answer import plain_answer

pytest.importorskip("scipy", reason="intervals need scipy: pip install scipy")

COLOURS = ("red", "blue", "green")
WORDS = [*COLOURS, "look", "seen", "say", "a", "colour", "<end>"]
END = WORDS.index("<end>")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} <end> {% endfor %}"

# --- a task, an engine and a model of one's own ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Colours(Task):
    """Name the colour; `look` first if you like. Warm and cold problems; `broken`: those whose tool is out of order."""

    seed: int = 0
    named: int = 12

    max_turns = 2
    broken: ClassVar[set[str]] = set()

    def train_problem(self, index):
        return self.problem(index, "train")

    def problem(self, index, part):
        asked = [{"role": "user", "content": "say a colour"}]
        answer = COLOURS[random.Random(f"{part}/{index}").randrange(3)]
        return Problem(f"{part}-{index}", asked, asked, answer, category=("warm", "cold")[index % 2])

    def held_out(self, count):
        return [self.problem(i, "held-out") for i in range(min(count, self.named))]

    def episode(self, problem):
        return Colour(problem)

    def vote(self, problem, text):
        return text


class Colour(Episode):
    def __init__(self, problem):
        self.problem, self.said, self.looked = problem, None, False

    def step(self, text):
        if self.problem.id in Colours.broken:
            raise ConnectionError("the tool is out of order")
        if text == "look":
            self.looked = True
            return Reply([Message("tool", "seen")], calls=1)
        self.said = text
        return Reply()

    def outcome(self, end):
        right = self.said == self.problem.answer
        return Outcome(float(right), right, {"looked": float(self.looked)})


class Drawn(Engine):
    """One word a turn, drawn by the request's seed. It is interrupted before the batch that `until` counts down to."""

    until: ClassVar[int | None] = None
    asked: ClassVar[list[Request]] = []
    forgotten: ClassVar[int] = 0

    def __init__(self, cfg, model_path):
        pass

    def generate(self, requests):
        if Drawn.until is not None:
            Drawn.until -= 1
            if Drawn.until < 0:
                raise KeyboardInterrupt
        Drawn.asked += requests
        return [self.turn(random.Random(q.seed)) for q in requests]

    def turn(self, rng):
        word = WORDS.index(rng.choice((*COLOURS, "look")))
        return Completion([word, word], [-1.0] * 2, False) if rng.random() < 0.1 else Completion([word, END], [-1.0] * 2, True)

    def push(self, weights):
        pass

    def forget(self):
        Drawn.forgotten += 1


@pytest.fixture(autouse=True)
def fresh():
    Drawn.until, Drawn.asked, Drawn.forgotten, Colours.broken = None, [], 0, set()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def make_model(folder):
    """Fill a folder with a tokenizer of nine words and a configuration; the engine needs no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return folder


def configuration(model, *overrides):
    given = {
        "name": "e", "world_size": 1, "model": {"path": str(model)}, "task": "test_evaluation:Colours",
        "rollout": {"engine": "test_evaluation:Drawn", "max_new_tokens": 4, "max_model_len": 64, "turn_timeout": None},
        "eval": {"samples": 4, "prompts": 12, "temperature": 0.6, "top_p": 0.95},
    }  # fmt: skip
    return make_config(given, list(overrides))


def sets(cfg):
    from transformers import AutoTokenizer

    task = make_task(cfg.task, cfg.seed, cfg.task_args)
    return evaluation.sets_of(cfg, task, Chat(AutoTokenizer.from_pretrained(cfg.model.path), task.tools))


def run(cfg, out, batch=5):
    return dict(evaluate(cfg, sets(cfg), lambda: Drawn(cfg, ""), out, cfg.model.path, batch))


# --- figures ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", (1, 4, 6))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_solved_one(samples):
    for solved, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * solved + [False] * (samples - solved), k))
        assert scores.pass_at(k, solved, samples) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize(
    "votes, solved, expected",
    [
        (["3", "4", "3"], [1, 0, 1], 1.0),
        (["3", "4", "4"], [1, 0, 0], 0.0),
        (["3", "4", None], [1, 0, 0], 0.5),  # as frequent: the mean of both
        ([None, None], [0, 0], 0.0),
        ([None, None, "5"], [0, 0, 1], 1.0),  # who gives no answer does not vote
    ],
)
def test_the_majority(votes, solved, expected):
    assert scores.majority(votes, solved) == expected


def test_an_interval_is_of_problems_and_repeats():
    values = [1.0] * 30 + [0.0] * 70
    low, high = scores.interval(values)
    assert scores.interval(values) == [low, high]
    assert 0.2 < low < 0.225 and 0.375 < high < 0.4  # 0.3 -+ 1.96 * sqrt(0.21 / 100) = 0.21 to 0.39
    wide = scores.interval([1.0] * 3 + [0.0] * 7)
    assert wide[0] < low and wide[1] > high
    assert scores.interval([0.0] * 10) == pytest.approx([0.0, 0.2775], abs=1e-4)  # Wilson's: nothing to draw
    assert scores.interval([1.0] * 10) == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert scores.interval([]) == [0.0, 1.0]


def test_figures_are_those_counted_by_hand(model, tmp_path):
    cfg = configuration(model)
    (folder, result), = run(cfg, tmp_path).items()  # fmt: skip
    records = read_records(folder)
    assert len(records) == 48 and [(r["index"], r["sample"]) for r in records] == list(itertools.product(range(12), range(4)))
    row = result["overall"]
    assert row["problems"] == 12 and row["samples"] == 4 and list(row["pass"]) == ["1", "2", "4"]
    assert row["mean"] == pytest.approx(sum(r["success"] for r in records) / 48) == pytest.approx(row["pass"]["1"])
    by_problem = [[r for r in records if r["index"] == i] for i in range(12)]
    assert row["pass"]["4"] == pytest.approx(sum(any(r["success"] for r in g) for g in by_problem) / 12)
    assert row["interval"][0] < row["mean"] < row["interval"][1]
    assert row["tool_use"] == pytest.approx(sum(r["calls"] > 0 for r in records) / 48) and 0 < row["tool_use"] < 1
    assert row["metrics"]["looked"] == pytest.approx(row["tool_use"])  # Task.report, over Outcome.metrics
    for end in ("done", "turns", "length"):
        assert row["ends"][end] == pytest.approx(sum(r["end"] == end for r in records) / 48) and row["ends"][end] > 0
    warm, cold = (result["categories"][name] for name in ("warm", "cold"))
    assert warm["problems"] == cold["problems"] == 6 and (warm["mean"] + cold["mean"]) / 2 == pytest.approx(row["mean"])
    assert {r["vote"] for r in records if r["end"] == "length"} == {None}  # a turn that was cut gives no answer
    assert all(r["vote"] == r["response"].split()[0] for r in records if r["end"] == "done" and r["turns"] == 1)
    assert row["majority"] is not None and {(q.temperature, q.top_p) for q in Drawn.asked} == {(0.6, 0.95)}


def test_a_page_and_a_plot(model, tmp_path, capsys):
    (folder, result), = run(configuration(model), tmp_path).items()  # fmt: skip
    html = write_evaluation(folder, result)
    text = html.with_suffix(".md").read_text()
    assert html == folder / "result.html" and (folder / "result.png").stat().st_size > 5000
    for said in (
        "| warm | 6 |",
        "| all | 12 |",
        "pass@4",
        "maj@4",
        "tool use",
        "Why episodes ended",
        "| top_p | `0.95` |",
        "looked",
    ):
        assert said in text, said
    assert line(result) in text and "mean of 4 samples; solved by one of them" in line(result)
    made = html.read_bytes()
    for given in (folder, folder / "result.json"):
        html.unlink()
        assert cli.main(["report", str(given)]) == 0 and html.read_bytes() == made
    assert cli.main(["report", str(tmp_path)]) == 2 and f"there are {folder}" in capsys.readouterr().err


def test_rollouts_are_kept_with_their_turns_and_one_prompt_a_problem(model, tmp_path):
    (folder, _), = run(configuration(model), tmp_path).items()  # fmt: skip
    records, table = read_records(folder), samples(folder).to_pylist()
    for r, shown in zip(records, table, strict=True):
        assert "".join(text for _, text in passages(r)) == r["response"] == "".join(shown["tokens"])
        owners = [turn for turn, _ in passages(r)]
        assert owners[::2] == list(range(len(owners[::2]))) and {*owners[1::2]} <= {-1}, "turns and replies take turns"
        assert len(owners[::2]) - r["turns"] in (0, int(r["end"] == "length")), "a turn that was cut is none"
        assert (r["prompt"] is None) == (r["sample"] > 0) and shown["prompt"] == records[4 * r["index"]]["prompt"]
    some = samples(folder, [3, 5]).to_pylist()
    assert [r["tokens"] for r in some] == [r["tokens"] for r in table if r["group"] in (3, 5)] and len(some) == 8
    before = {name: value for name, value in records[0].items() if name not in ("passages", "prompt")}
    assert passages(before) == [(0, before["response"])]


# --- resuming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", (0, 1, 2, 4))
def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(model, tmp_path, batches, capsys):
    cfg = configuration(model)
    (whole, _), = run(cfg, tmp_path / "whole").items()  # fmt: skip
    assert Drawn.forgotten == 3  # chunks, each begun with nothing cached
    Drawn.until = batches
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path / "cut")
    cut = tmp_path / "cut" / whole.name
    assert not (cut / "result.json").exists()
    if batches:
        with (cut / "rollouts.jsonl").open("a") as file:
            file.write('{"index": 11, "sam')  # a kill in the middle of a line
    Drawn.until, Drawn.asked = None, []
    run(cfg, tmp_path / "cut")
    for name in ("result.json", "rollouts.jsonl", "settings.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert ("going on after" in capsys.readouterr().out) == (batches >= 2)  # a chunk of two turns was whole
    Drawn.asked = []
    run(cfg, tmp_path / "cut")
    assert not Drawn.asked  # nothing is left to sample, and no engine is needed


def test_half_a_chunk_is_sampled_again(model, tmp_path):
    cfg = configuration(model)
    (folder, _), = run(cfg, tmp_path).items()  # fmt: skip
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jsonl")}
    lines = (folder / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (folder / "rollouts.jsonl").write_text("".join(lines[:23]))  # of chunks of 20
    Drawn.asked = []
    run(cfg, tmp_path)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert 28 <= len(Drawn.asked) <= 56  # two chunks of 20 and 8, of one or two turns


def test_other_settings_are_refused_by_name(model, tmp_path):
    run(configuration(model), tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(temperature: 0.6 -> 0.3\): give another --out"):
        run(configuration(model, "eval.temperature=0.3"), tmp_path)
    with pytest.raises(ConfigError, match="digest: .* -> .*; problems: 12 -> 11"):
        run(configuration(model, "task_args.named=11"), tmp_path)


def test_two_evaluations_do_not_share_a_folder(model, tmp_path):
    from filelock import FileLock

    with (
        FileLock(tmp_path / ".test_evaluation-Colours.lock"),
        pytest.raises(ConfigError, match="another evaluation: end that one"),
    ):
        run(configuration(model), tmp_path)


def test_a_broken_environment_is_named_and_never_a_zero(model, tmp_path):
    Colours.broken = {"held-out-3"}
    cfg = configuration(model)
    (folder, result), = run(cfg, tmp_path).items()  # fmt: skip
    assert result["overall"]["problems"] == 11 and result["categories"]["cold"]["problems"] == 5
    (lost,) = result["lost"]
    assert lost["problem"] == "held-out-3" and "ConnectionError: the tool is out of order" in lost["failure"]
    assert "1 problem(s) left out" in line(result) and "out of order" in page(result)
    scored = [r for r in read_records(folder) if r["index"] != 3]
    assert result["overall"]["mean"] == pytest.approx(sum(r["success"] for r in scored) / 44)
    Colours.broken, Drawn.asked = set(), []
    (_, mended), = run(cfg, tmp_path).items()  # fmt: skip
    assert mended["overall"]["problems"] == 12 and not mended["lost"]
    assert 20 <= len(Drawn.asked) <= 40  # its chunk alone
    run(cfg, tmp_path / "whole")
    assert (folder / "result.json").read_bytes() == (tmp_path / "whole" / folder.name / "result.json").read_bytes()


def test_a_dead_service_ends_the_evaluation(model, tmp_path):
    Colours.broken = {f"held-out-{i}" for i in range(12)}
    with pytest.raises(RunError, match="18 of 20 rollouts failed twice, .*mend the task or its services, then the same command"):
        run(configuration(model), tmp_path)


def test_chunks_keep_the_engine_busy(model):
    cfg = configuration(model, "eval.samples=16", "rollout.vllm.max_num_seqs=64")
    (held,) = sets(cfg)
    assert [len(chunk) for chunk in chunks_of(cfg, held, None)] == [4, 4, 4]
    assert [len(chunk) for chunk in chunks_of(cfg, held, 7)] == [7, 5]


# --- held-out passes of training --------------------------------------------------------------------------------------------


@pytest.fixture
def ranks(monkeypatch):
    """Ranks one after the other: what each hands over, then all of it."""
    handed = []

    def gather(parts, own):
        handed.append(own)
        parts[:] = handed[-len(parts) :] + [[]] * (len(parts) - len(handed[-len(parts) :]))

    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    return handed


def test_held_out_success_of_one_set_is_the_share_that_it_was(model, ranks):
    cfg = configuration(model, "eval.samples=1")
    engine = Drawn(cfg, "")
    found = evaluation.measure(sets(cfg), engine, (0, 1))
    (held,) = sets(cfg)
    rollouts = held.sample(engine)
    assert found["held_out_success"] == sum(r.success for r in rollouts) / 12
    assert found["held_out"] == {"own": {"looked": sum(r.calls > 0 for r in rollouts) / 12}}
    assert len(held.problems) == 12 and [r.group for r in held.sample(engine, (1, 2))] == [1, 3, 5, 7, 9, 11]


def test_more_sets_add_names(model, ranks):
    more = "eval.sets={few: {task: 'test_evaluation:Colours', task_args: {named: 3}, samples: 2}}"
    cfg = configuration(model, "eval.samples=1", more)
    one, both = (evaluation.measure(s, Drawn(cfg, ""), (0, 1)) for s in (sets(configuration(model, "eval.samples=1")), sets(cfg)))
    assert both["held_out_success"] == one["held_out_success"] and both["held_out"]["own"] == one["held_out"]["own"]
    few = sets(cfg)[1]
    rollouts = few.sample(Drawn(cfg, ""))
    assert len(rollouts) == 6 and both["held_out"]["few"]["success"] == sum(r.success for r in rollouts) / 6


def test_a_rollout_whose_environment_broke_counts_under_its_own_name(model, ranks):
    Colours.broken = {"held-out-0", "held-out-1"}
    cfg = configuration(model, "eval.samples=1")
    found = evaluation.measure(sets(cfg), Drawn(cfg, ""), (0, 1))
    rollouts = [r for r in sets(cfg)[0].sample(Drawn(cfg, "")) if not r.failed]
    assert len(rollouts) < 12 and found["held_out_success"] == sum(r.success for r in rollouts) / len(rollouts)
    assert found["held_out"]["own"]["rollouts_failed"] == 12 - len(rollouts)


def test_a_report_that_fails_says_whose_it_is(model, ranks, monkeypatch):
    monkeypatch.setattr(Colours, "report", lambda self, scored: {"x": scored[0].nothing})
    cfg = configuration(model)
    with pytest.raises(TaskError, match=r"Colours.report fails \(AttributeError: .* at test_evaluation.py:\d+\): mend it"):
        evaluation.measure(sets(cfg), Drawn(cfg, ""), (0, 1))


def test_sets_are_checked_before_anything_starts(model):
    with pytest.raises(ConfigError, match="eval.sets.a.tsk: did you mean 'task'"):
        configuration(model, "eval.sets={a: {tsk: sums, task: sums}}")
    with pytest.raises(ConfigError, match="'a/b': must be letters"):
        configuration(model, "eval.sets={a/b: {task: sums}}")
    with pytest.raises(ConfigError, match="64 leave no room for a prompt in a context of 64: raise eval.max_model_len"):
        configuration(model, "eval.max_new_tokens=64")
    with pytest.raises(ConfigError, match="eval.max_model_len=128: the run's engine has a context of rollout.max_model_len=64"):
        evaluation.check_sets(configuration(model, "eval.max_model_len=128"))
    with pytest.raises(TaskError, match="task 'sums' has no argument 'x'"):
        evaluation.check_sets(configuration(model, "eval.sets={a: {task: sums, task_args: {x: 1}}}"))


# --- two results, and the paper ---------------------------------------------------------------------------------------------


def planted(folder: Path, solved: list[list[bool]], **settings) -> Path:
    """A finished evaluation with these verdicts; calls in category warm alone."""
    folder.mkdir(parents=True)
    lines = [
        {"index": i, "sample": k, "problem": f"p{i}", "digest": str(i), "category": ("warm", "cold")[i % 2], "end": "done",
         "success": bool(right), "reward": float(right), "metrics": {}, "vote": None, "turns": 1, "calls": int(i % 2 == 0),
         "errors": 0, "tokens": 1, "failures": []}
        for i, verdicts in enumerate(solved) for k, right in enumerate(verdicts)
    ]  # fmt: skip
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (folder / "result.json").write_text(json.dumps({"settings": {"temperature": 0.6} | settings}))
    return folder


def test_two_results_problem_by_problem(tmp_path):
    a = planted(tmp_path / "a", [[0, 0], [0, 1], [1, 1], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0], [1, 1]])
    b = planted(tmp_path / "b", [[1, 1], [1, 1], [1, 1], [0, 0], [1, 1], [1, 1], [1, 1], [1, 1]], temperature=0.9)
    found = compare(a, b)
    assert (found["problems"], found["only_a"], found["only_b"]) == (8, 1, 0)
    assert found["overall"]["mean"] == [2.5 / 8, 7 / 8] and found["overall"]["difference"] == pytest.approx(4.5 / 8)
    low, high = found["overall"]["interval"]
    assert 0 <= low < 4.5 / 8 < high <= 1
    assert (found["solved_only_a"], found["solved_only_b"]) == (1, 6)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 7) / 2**7)  # two-sided, 1 of 7 or fewer
    assert found["examples_only_a"] == ["p3"] and found["differing"] == ["temperature: 0.6 -> 0.9"]
    assert found["categories"]["warm"]["tool_use"] == [1.0, 1.0] and found["categories"]["cold"]["tool_use"] == [0.0, 0.0]
    said = comparison(found)
    assert "1 in A alone, 6 in B alone" in said and "* temperature: 0.6 -> 0.9" in said and "+0.562" in said


def test_the_same_result_twice_differs_in_nothing(tmp_path):
    a, b = (planted(tmp_path / name, [[0, 1], [1, 1], [0, 0]]) for name in "ab")
    found = compare(a, b)
    assert found["overall"]["difference"] == 0 and found["overall"]["interval"] == [0, 0] and found["mcnemar_p"] == 1
    assert "What differs in the set-up: nothing." in comparison(found)


def test_what_cannot_be_compared_is_refused(tmp_path):
    a = planted(tmp_path / "a", [[1]])
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="b: no finished evaluation there"):
        compare(a, tmp_path / "b")
    with pytest.raises(ConfigError, match=f"no finished evaluation there .*{a}"):
        read_result(tmp_path)
    other = planted(tmp_path / "c", [[1]])
    (other / "rollouts.jsonl").write_text((other / "rollouts.jsonl").read_text().replace('"digest": "0"', '"digest": "x"'))
    with pytest.raises(ConfigError, match="no problem in common"):
        compare(a, other)


def test_the_papers_figures_and_what_differs(model, tmp_path):
    (_, result), = run(configuration(model), tmp_path).items()  # fmt: skip
    assert paper.beside(result) is None
    cfg = configuration(model, "train.lr=1e-5", "rollout.prompts_per_step=128")
    found = paper.beside(result, "GSM8K", trained_with(cfg))
    assert found["benchmark"] == "gsm8k" and found["figures"]["Qwen3-4B"] == {"grpo": 0.924, "gear": 0.958}
    differs = "\n".join(found["differs"])
    for said in (
        "samples: 4, the paper's 16",
        "problems: 12 of 1319",
        "train.lr: 1e-05, the paper's 1e-06",
        "the paper's Qwen3-4B",
    ):
        assert said in differs, said
    assert not any(text.startswith(("temperature", "top_p", "rollout.prompts")) for text in found["differs"])  # these are its own
    text = page(result, found)
    assert "## Beside the paper: gsm8k" in text and "| gear | Qwen3-4B | 0.958 |  |" in text
    paper.check("aime24", cfg)
    with pytest.raises(ConfigError, match="no figure of mmlu; name one of toolsandbox, bfcl"):
        paper.check("mmlu", cfg)


# --- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        monkeypatch.setenv(name, value)  # the command sets these for its process


def command(model, *more):
    given = ["--model", str(model), "task=test_evaluation:Colours", "rollout.engine=test_evaluation:Drawn"]
    return cli.main(["evaluate", *given, "eval.max_new_tokens=4", "eval.max_model_len=64", "eval.prompts=12", *more])


def test_the_command_without_a_configuration_writes_resumes_and_compares(model, tmp_path, capsys, alone):
    out = ["--out", str(tmp_path / "a")]
    Drawn.until = 2
    assert command(model, "--samples", "2", "--batch", "5", *out) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    Drawn.until = None
    assert command(model, "--samples", "2", "--batch", "5", *out, "--paper", "gsm8k") == 0
    said = capsys.readouterr().out
    assert "going on after 5 of 12 problems" in said and "test_evaluation-Colours: held-out success: 0." in said
    folder = tmp_path / "a" / "test_evaluation-Colours"
    assert "Beside the paper: gsm8k" in (folder / ("result" + ".md")).read_text()
    assert read_result(folder)["settings"]["samples"] == 2 and read_result(folder)["settings"]["max_model_len"] == 64
    assert command(model, "--samples", "2", "--batch", "5", *out, "eval.top_p=0.5") == 2
    assert "top_p: 1.0 -> 0.5" in capsys.readouterr().err
    assert command(model, "--samples", "2", "seed=1", "--out", str(tmp_path / "b")) == 0
    other = tmp_path / "b" / folder.name
    assert cli.main(["evaluate", "--compare", str(folder), str(other), "--out", str(tmp_path / "c")]) == 0
    assert "12 problems that both have scored" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["problems"] == 12


def test_the_command_says_what_it_lacks(model, tmp_path, capsys, alone):
    assert cli.main(["evaluate", "--model", str(model)]) == 2
    assert "the command line: task is missing" in capsys.readouterr().err
    assert command(model, "--paper") == 2
    assert "the paper has no figure of test_evaluation:Colours" in capsys.readouterr().err
    for given in (["--step", "3", "--model", "x"], ["--model", "x", "--batch", "0"], ["--model", "x", "--samples", "0"]):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", *given])


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    with pytest.raises(ConfigError, match="step-4: no finished checkpoint there; the run has none"):
        export_step(tmp_path, 4, "x", "float32")
    (tmp_path / "checkpoints" / "step-4" / "manifest.json").write_text('{"a.pt": [3, "no"]}')
    with pytest.raises(ConfigError, match="a.pt is missing or damaged"):
        export_step(tmp_path, 4, "x", "float32")
    with pytest.raises(ConfigError, match="the run has step-4"):
        export_step(tmp_path, 5, "x", "float32")


def test_vllm_is_told_the_requests_own_sampling(monkeypatch):
    from gear_trainer.rollout import vllm_colocated

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    drawn = vllm_colocated._sampling(Request([1], 7, 3, 0.6, 0.95))
    assert drawn == {"temperature": 0.6, "top_p": 0.95, "seed": 3, "max_tokens": 7, "logprobs": 0, "detokenize": False}
    assert vllm_colocated._sampling(Request([1], 7, 3))["top_p"] == 1.0  # training


@pytest.mark.parametrize(
    "text, vote",
    [
        ("so \\boxed{1,000}", "1000"), ("\\boxed{18.0}", "18"), ("The answer is $18.00$.", "18"), ("#### 18", "18"),
        ("\\boxed{\\dfrac{1}{2}}", "\\frac{1}{2}"), ("\\boxed{\\left( 3, 4\\right)}", "(3,4)"), ("\\boxed{\\$18}", "18"),
        ("hm", None), ("\\boxed{}", None),
    ],
)  # fmt: skip
def test_equal_answers_vote_as_one(text, vote):
    assert plain_answer("18", text) == vote
