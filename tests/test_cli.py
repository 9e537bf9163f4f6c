"""Commands: what they take, what they say, how they end; and what a start refuses before any engine."""

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gear_trainer import build, cli, evaluation, run
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.preflight import memory
from gear_trainer.preflight.checks import check
from gear_trainer.recipe import resolve
from gear_trainer.rollout import Completion
from gear_trainer.tasks.base import Episode, Outcome, Problem, Reply, Task

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "gear_trainer" / "configs"
DEMO = str(CONFIGS / "mathapi_cpu.yaml")


@pytest.mark.parametrize("given, code", [([], 2), (["trian"], 2), (["--help"], 0)])
def test_commands_are_listed(capsys, given, code):
    assert cli.main(given) == code
    said = capsys.readouterr()
    text = said.out if code == 0 else said.err
    assert all(f"\n  {name} " in text for name in ("train", "plan", "evaluate", "report"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0 and cli.COMMANDS[command].__doc__.split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_the_package_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "gear_trainer", "report", "/nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("gear_trainer: /nowhere: no run there") and done.stderr.count("\n") == 1
    )


def test_the_installed_command_is_that_program():
    module, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["gear-trainer"].split(":")
    assert getattr(importlib.import_module(module), name) is cli.main


def test_a_plan_and_a_dry_run_are_one(capsys):
    for end in (lambda: cli.main(["plan", "--config", DEMO, "train.stepz=1"]),
                lambda: run.main(["--config", DEMO, "--dry-run", "train.stepz=1"])):  # fmt: skip
        assert end() == 2
        said = capsys.readouterr().err
        assert "unknown key train.stepz: did you mean 'steps'?" in said and said.count("\n") == 1


def test_without_a_launcher_both_ways_say_so(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for end in (lambda: cli.main(["train", "--config", DEMO]), lambda: run.main(["--config", DEMO])):
        assert end() == 2 and "no launcher started this" in capsys.readouterr().err


def test_a_report_of_a_run_and_of_several(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"credit": "gear"}))
        rows = [{"step": s, "success": s / 5, "held_out_success": s / 4, "seconds": {"rollout": 1.0}} for s in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.count("0.000 before, 0.500 after 2 steps") == 2 and (tmp_path / "b" / "report.html").is_file()
    assert cli.main(["report", "--compare", str(tmp_path / "c.png"), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert (tmp_path / "c.png").stat().st_size > 1000


# --- evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluate_wants_a_run_or_a_configuration(capsys, tmp_path):
    for given in (["evaluate"], ["evaluate", "--run", "x", "--config", DEMO], ["evaluate", "--config", DEMO, "--samples", "0"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(given)
        assert ended.value.code == 2
    assert cli.main(["evaluate", "--run", str(tmp_path)]) == 2
    assert "config.json: no such config file" in capsys.readouterr().err


def test_evaluate_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="evaluate is one process, but 2 were launched"):
        build.alone()


class Silent(Task):
    """A task of one turn that nobody solves."""

    max_turns = 1

    def train_problem(self, index):
        return Problem(str(index), [], [], "")

    def held_out(self, count):
        return [self.train_problem(i) for i in range(count)]

    def episode(self, problem):
        return Never()


class Never(Episode):
    def step(self, text):
        return Reply()

    def outcome(self, end):
        return Outcome(0.0, False)


class Engine:
    """Says nothing, and notes the seeds that it was asked with."""

    def __init__(self):
        self.seeds, self.wake = [], lambda: None

    def generate(self, requests):
        self.seeds += [q.seed for q in requests]
        return [Completion([1], [-1.0], False) for _ in requests]


def test_ranks_share_the_held_out_problems_that_one_process_solves():
    cfg = load_config(DEMO, ["eval.prompts=7"])
    chat = type("Chat", (), {"prompt_ids": lambda *_: [1], "escapes": lambda *_: 0})()
    (held,) = evaluation.sets_of(cfg, Silent(), chat)
    whole, halves = Engine(), [Engine(), Engine()]
    everything = held.sample(whole)
    parts = [held.sample(engine, (rank, 2)) for rank, engine in enumerate(halves)]
    assert [r.group for r in everything] == list(range(7)) and [[r.group for r in p] for p in parts] == [[0, 2, 4, 6], [1, 3, 5]]
    assert set(whole.seeds) == {*halves[0].seeds, *halves[1].seeds} and len(set(whole.seeds)) == 7


# --- what a start refuses -------------------------------------------------------------------------------------------------


def test_an_engine_over_several_gpus_is_refused():
    """Each rank launches its own: one that spans ranks would wait for the others for ever."""
    with pytest.raises(
        ConfigError, match=r"engine_args.tensor_parallel_size=2: every rank has an engine.*leave it out"
    ) as caught:
        check(load_config(DEMO, ["rollout.vllm.engine_args={tensor_parallel_size: 2}"]))
    assert "\n" not in str(caught.value)
    check(load_config(DEMO, ["rollout.vllm.engine_args={tensor_parallel_size: 1}"]))


CARDS = {"qwen3_4b_1gpu": (141, 80), "qwen3_8b": (80, 40), "qwen3_8b_1gpu": (80, 40), "qwen3_8b_2nodes": (80, 40)}


def test_every_large_configuration_is_tried_on_cards():
    assert {path.stem for path in CONFIGS.glob("qwen3_*.yaml")} == CARDS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_shipped_configurations_plan_for_a_card_that_fits_and_one_that_does_not(name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # the data is the network's: the plan says that it is left out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fits, small = CARDS[name]
    given = ["plan", "--config", str(CONFIGS / f"{name}.yaml"), "--card"]
    assert cli.main([*given, str(fits)]) == 0
    said = capsys.readouterr().out
    assert f"of a card sold as {fits} GB" in said and "left out: task=gsm8k" in said and "deepspeed:" in said
    assert cli.main([*given, str(small)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gear_trainer: memory: ") and f"a card sold as {small} GB" in line and ": set " in line


def test_a_real_start_refuses_what_cannot_fit_on_its_card(monkeypatch):
    """The card that is there is known; one that is only assumed refuses nothing, for the run may be meant for another machine."""
    cfg = load_config(CONFIGS / "qwen3_8b.yaml")
    start = (cfg, resolve(cfg), ((256, 512), 1024))
    large, small = (memory.card(cfg, gb) for gb in (80, 40))
    for card, fits in ((large, True), (small, False), (small._replace(assumed=True), True)):
        monkeypatch.setattr(memory, "card", lambda *_, card=card: card)
        if fits:
            memory.check_start(*start)
        else:
            with pytest.raises(ConfigError, match="memory: rollout takes .* more than a card sold as 40 GB"):
                memory.check_start(*start)


def test_a_model_of_unknown_sizes_is_let_through():
    cfg = load_config(DEMO, ["model.path=nobody/nothing-of-that-name"])
    assert memory.planned(cfg, resolve(cfg), ((100, 100), 100), memory.card(cfg, 80)) is None
    memory.check_start(cfg, resolve(cfg), ((100, 100), 100))
