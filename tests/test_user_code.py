"""Tasks and credit methods of the user's own: found from the working directory, and checked before any work."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gear_trainer.config import load_config
from gear_trainer.demo.warm_start import draw_demo
from gear_trainer.errors import ConfigError
from gear_trainer.preflight.checks import check
from gear_trainer.recipe import resolve
from gear_trainer.tasks import Demonstrable, TaskError, make_task
from gear_trainer.tasks.demonstrations import check_demonstrations

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "gear_trainer" / "configs" / "mathapi_cpu.yaml"
(TASK,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.S)
METHOD = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "credit.md").read_text(), re.S)[1].split("\n\n\ncredit =")[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with modules, which Python does not search by itself; `write(name, source)` adds one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    names = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        names.append(name)
        return tmp_path

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_D11_the_documented_task_is_found_and_can_be_warmed_up(here):
    here("lookup_a", TASK)
    task = make_task("lookup_a:LookupTask", 3, {"largest": 50})
    assert (task.seed, task.largest) == (3, 50) and isinstance(task, Demonstrable)
    check_demonstrations(task)
    for index in range(20):
        problem, turns, _ = draw_demo(task, 0, index, 0.4)
        episode = task.episode(problem)
        for turn in turns:
            episode.step(turn)
        assert episode.outcome("done").success == (len(turns) == 2)
    assert check(load_config(DEMO, ["task=lookup_a:LookupTask"]))[0].largest == 20


def test_D11_run_by_path_searches_the_working_directory(here):
    """As launchers start it: Python then looks beside run.py, not where the user is."""
    folder = here("lookup_b", TASK)
    here("surprise_b", "import torch\n" + METHOD)
    options = ["--config", DEMO, "--dry-run", "task=lookup_b:LookupTask", "credit=surprise_b:Surprise", "credit_args.gain=5e-1"]
    done = subprocess.run(
        [sys.executable, ROOT / "gear_trainer" / "run.py", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Surprise(gain=0.5)" in done.stdout and "in 2 turn(s)" in done.stdout


BROKEN_TASKS = {
    "no seed": ("    seed: int = 0\n", "", "LookupTask takes no `seed`: add it"),
    "no method": ("def held_out", "def other", "LookupTask has no held_out: write them"),
    "no task": ("(Task)", "", "LookupTask is not a gear_trainer.tasks.Task"),
    "constructor": ("    def _problem", "    def __post_init__(self):\n        1 / 0\n\n    def _problem",
                    r"LookupTask\(...\) fails \(ZeroDivisionError: division by zero at own\w+.py:\d+\)"),
    "problem": ('return self._problem(f"train', 'return print(f"train', r"train_problem\(0\) gives NoneType: make it a "),
    "held out": ("for i in range(count)]", "for i in range(count)][0]", r"held_out\(1\) returns Problem: return a list"),
    "chat": ('[{"role": "user", "content": question}]', '[{"role": "assistant", "content": question}]',
             r"train_problem\(0\).messages must be a list .* ends with a user turn"),
    "episode": ("return LookupEpisode(problem)", "return problem", r"gives Problem, without step\(\)"),
    "episode fails": ("return LookupEpisode(problem)", 'raise KeyError("x")', r"episode\(problem\) fails \(KeyError: 'x' at own"),
    "turns": ("max_turns = 2", 'max_turns = "2"', "max_turns is '2'"),
    "import": ("import random\n", "import random\nimport nothing_there\n", "No module named 'nothing_there'"),
    "syntax": ("class LookupTask", "klass LookupTask", "SyntaxError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_TASKS)
def test_D11_a_wrong_task_is_one_line(here, kind):
    old, new, message = BROKEN_TASKS[kind]
    name = f"own_{kind.replace(' ', '_')}"
    assert TASK.count(old) == 1, old
    here(name, TASK.replace(old, new))
    with pytest.raises(TaskError, match=message) as caught:
        make_task(f"{name}:LookupTask", 0)
    assert "\n" not in str(caught.value) and name in str(caught.value)


BROKEN_DEMOS = {
    "mix": ("    demo_mix = (", "    mix = (", "LookupTask has no demo_mix, which a warm start asks for"),
    "wrong answer": ("def wrong_answer", "def wrong", "LookupTask has no wrong_answer"),
    "no right": ('("right", 0.6)', '("good", 0.6)', r'demo_mix has no kind "right", only \'good\', \'guess\''),
    "weights": ('("right", 0.6), ("guess", 0.4)', '("right", 0), ("guess", 0)', "with a sum above 0"),
    "turns": ('["look", problem.answer] if', '"look" if', r"demonstrate\(problem, 'right', rng\) gives 'look'"),
    "answer": ("return str(rng.choice(", "return problem.answer\n        return str((", "a text other than the answer"),
    "index": ('self._problem(f"train-{index}"', 'self._problem("x" * (index < 9 or 1 / 0)',
              r"a demonstration fails \(ZeroDivisionError: division by zero at own_demo_index.py:\d+\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_DEMOS)
def test_D11_what_a_warm_start_demands_is_checked_before_it(here, kind, tmp_path):
    old, new, message = BROKEN_DEMOS[kind]
    name = f"own_demo_{kind.replace(' ', '_')}"
    assert TASK.count(old) == 1, old
    here(name, TASK.replace(old, new))
    with pytest.raises(TaskError, match=message):
        check(load_config(DEMO, [f"task={name}:LookupTask", f"cache_dir={tmp_path}/cache"]))
    assert not (tmp_path / "cache").exists()


def test_D11_own_credit_methods_by_name(here):
    here("surprise_a", "import torch\n" + METHOD)
    cfg = load_config(DEMO, ["credit=surprise_a:Surprise", "credit_args.gain=0.5"])
    assert check(cfg)[1].method.gain == 0.5 and check(cfg)[1].distillation is None
    cfg = load_config(DEMO, ["credit=surprise_a:Surprise+opsd"])
    assert type(resolve(cfg).method).__name__ == "Surprise" and resolve(cfg).distillation.coefficient == 0.1


BROKEN_METHODS = {
    "class": ("class Surprise", "class Other", "has no attribute 'Surprise'"),
    "argument": ("gain: float", "loss: float", "credit_args.gain: unknown; Surprise takes loss"),
    "constructor": ("    needs =", "    def __post_init__(self):\n        1 / 0\n\n    needs =", "Surprise cannot be made .Zero"),
    "needs": ('needs = ("entropy",)', "", "Surprise must have `needs`"),
    "text": ('needs = ("entropy",)', 'needs = "entropy"', "Surprise must have `needs`, a tuple"),
    "apply": ("def apply", "def use", "a method `apply`"),
    "fails": ("tokens.entropy.mean()", "tokens.entropi.mean()", r"fails on two .* \(AttributeError: .*entropi.* at own"),
    "unknown": ('needs = ("entropy",)', 'needs = ("mood",)', "reads mood, which this trainer does not make"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_METHODS)
def test_D11_a_wrong_credit_method_is_one_line(here, kind):
    old, new, message = BROKEN_METHODS[kind]
    name = f"own_credit_{kind}"
    assert METHOD.count(old) == 1, old
    here(name, "import torch\n" + METHOD.replace(old, new))
    options = [f"credit={name}:Surprise", "credit_args.gain=0.5"]
    with pytest.raises(ConfigError, match=message) as caught:
        check(load_config(DEMO, options))
    assert "\n" not in str(caught.value)


def test_D11_the_search_path_ends_with_the_working_directory(here):
    folder = here("lookup_c", TASK)
    make_task("lookup_c:LookupTask", 0)
    make_task("lookup_c:LookupTask", 1)
    assert sys.path[-1] == str(folder) and sys.path.count(str(folder)) == 1
