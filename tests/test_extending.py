"""Each recipe of docs/extending.md, followed to the letter.

What changes the package is done to a copy of its sources: the insertions below are all that is written, in the files that the
recipe names and in no other, and the copy's compiled module is built. The mathematics is held against plain torch in float64.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripted_engine
import test_rollouts
import torch
from scripted_engine import Scripted

import gear_kernels
from gear_kernels import backends
from gear_kernels.backends.reference import Reference
from gear_trainer.config import load_config
from gear_trainer.preflight.checks import check
from gear_trainer.rollout import Limits, Status, engine_class, make_engine, roll_out
from gear_trainer.tasks import make_task

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "gear_trainer" / "configs" / "mathapi_cpu.yaml"
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
(TASK,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.S)

# Which tests follow a recipe.
FOLLOWED_BY = {
    "A statistic": ("test_extending.test_a_statistic_is_written_in_four_files", "test_extending.test_the_new_statistic_is_exact"),
    "A credit method of your own": (
        "test_user_code.test_D11_own_credit_methods_by_name",
        "test_user_code.test_D11_run_by_path_searches_the_working_directory",
        "test_readme.test_the_code_of_a_page_runs_as_it_stands",
    ),
    "A compiled credit method": (
        "test_extending.test_a_compiled_method_is_written_in_six_files",
        "test_extending.test_the_new_method_runs_compiled",
    ),
    "A task": (
        "test_extending.test_the_pages_task_plays",
        "test_user_code.test_D11_the_documented_task_is_found_and_can_be_warmed_up",
    ),
    "A rollout engine": ("test_extending.test_the_pages_engine_serves_a_run",),
    "A back end": ("test_extending.test_a_back_end_is_a_class_in_the_table",),
}


def test_every_recipe_is_followed_by_tests_that_exist():
    assert list(FOLLOWED_BY) == list(SECTIONS)
    for name in {test for tests in FOLLOWED_BY.values() for test in tests}:
        file, function = name.split(".")
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# --- insertions, behind a text that stands once in a file -----------------------------------------------------------------------

STATISTIC = {
    "reference/stats.py": [
        ('    Stat("argmax_agreement", needs_teacher=True),\n', '    Stat("energy", gradient=True),\n'),
        ("teacher have the same most likely token, else 0\n", "    energy: torch.Tensor | None = None  # -log sum exp(z / T)\n"),
        ('    out["entropy"] = _not_negative(log_z - s["first"] / s["z"])\n',
         '    out["energy"] = -(s["max"] * inv_t + log_z)\n'),
        ("    + gZ p", " - gE p"),
        ("        dz += g[\"logprobs\"] * (hit.to(p.dtype) - p)\n", '    if "energy" in g:\n        dz -= g["energy"] * p\n'),
    ],
    "csrc/tables.h": [("X(argmax_agreement, kArgmaxAgreement)", " X(energy, kEnergy)")],
    "csrc/rows.cpp": [
        ("    v[kEntropy] = (float)not_negative(lz - h.s.first / h.s.z);\n",
         "    v[kEnergy] = (float)-(h.s.max * inv_t + lz);\n"),
        ("float logprob, entropy, reverse_kl, forward_kl, jsd, logsumexp", ", energy"),
        ("teacher ? g[kJsd] : 0, g[kLogSumExp]", ", g[kEnergy]"),
        ("const float constant = g.forward_kl + g.logsumexp", " - g.energy"),
        ("else if (g.logprob != 0 || g.entropy != 0 || g.logsumexp != 0", " || g.energy != 0"),
    ],
    "triton/stats.py": [
        ("TEACHER = _constant(_TEACHER_BIT)\n", 'ENERGY = _constant(_BITS["energy"])\n'),
        ("# Columns of the gradients.\n", '_D_ENERGY = _constant(STAT_NAMES.index("energy"))\n'),
        ("values = (logprob, t_logprob, entropy, t_entropy, reverse_kl, forward_kl, zero, s_max * inv_t + log_z, zero, zero",
         ", -(s_max * inv_t + log_z)"),
        ("        factor -= tl.load(grads + _D_ENTROPY) * (x + tl.load(state + _ENTROPY))\n",
         "    if WANT & ENERGY:\n        factor -= tl.load(grads + _D_ENERGY)\n"),
    ],
}  # fmt: skip

METHOD = {
    "reference/credit.py": [
        ("    return (1 + gamma * saliency).clamp(1, cap)\n", '''

def surprise(entropy: torch.Tensor, level: torch.Tensor, gain: float) -> torch.Tensor:
    """More credit where the student was unsure: W = clip(1 + gain (H / level - 1), 0.5, 1.5)."""
    return (1 + gain * (entropy / level - 1)).clamp(0.5, 1.5)


def mean_entropy(entropy: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The level of `surprise`: the mean entropy [n] of a pack where mask is True, at least 1e-6 nats, 0-d."""
    total = entropy.sum() if mask is None else entropy.masked_fill(~mask, 0).sum()
    return (total / _count(entropy, mask)).clamp(min=1e-6)
'''),
    ],
    "rules.py": [
        ('    gamma: float = 1.0\n    cap: float = 2.0\n    second: str | None = None\n    cut: Cut = Cut()\n', '''

@dataclass(frozen=True)
class SurpriseRule(Rule):
    """The rule surprise, against the pack's mean of `second`."""

    name = "surprise"
    gain: float = 0.2
    second: str = "entropy"

    def level(self, second: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The pack's mean."""
        return reference.mean_entropy(second, mask)
'''),
        ("AtLeastRule, LiftRule", ", SurpriseRule"),
        ("            own = (rule.gamma, rule.cap)\n", "        case SurpriseRule():\n            own = (rule.gain,)\n"),
    ],
    "csrc/tables.h": [("X(lift, kLift)", " X(surprise, kSurprise)")],
    "csrc/scan.cpp": [
        ("g_[i] = weight_[i] = bounded(second_[i]) / (bounded(second_[i]) + level);\n        break;\n", """\
      case kSurprise:
        for (int64_t i = 0; i < n_; ++i)
          g_[i] = second_[i] / level, weight_[i] = clip(T(1) + a * (g_[i] - T(1)), T(0.5), T(1.5));
        break;
"""),
    ],
    "triton/scan.py": [
        ('("gear", "ratio", "gated_ratio", "share", "margin", "at_least", "lift")\n)\n',
         '_SURPRISE = _constant([rule.name for rule in RULES].index("surprise"))\n'),
        ("        shown = _divide(_bounded(e), _bounded(e) + level)\n        weight = shown\n",
         "    elif RULE == _SURPRISE:\n        shown = _divide(e, level + e * 0)\n"
         "        weight = _clip(1 + a * (shown - 1), 0.5, 1.5)\n"),
    ],
    "methods.py": [
        ("    ShareRule,\n", "    SurpriseRule,\n"),
        ("        return _turns(tokens, step, self.weight)\n", '''

@dataclass(frozen=True)
class Surprise(Method):
    """More credit where the student was unsure: W = clip(1 + gain (H / mean H - 1), 0.5, 1.5), the mean over the pack."""

    gain: float = 0.2
    needs = ("entropy",)

    def rule(self) -> Rule:
        return SurpriseRule(self.gain)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        level = reference.mean_entropy(tokens.entropy)
        return _unsegmented(tokens, reference.surprise(tokens.entropy, level, self.gain), tokens.entropy / level)
'''),
        ('    "gigpo": Gigpo(),\n', '    "surprise": Surprise(),\n'),
    ],
}  # fmt: skip


def insert(package, edits):
    """Makes the insertions; returns the files that are no longer what they were."""
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    for name, insertions in edits.items():
        text = (package / name).read_text()
        for anchor, new in insertions:
            assert text.count(anchor) == 1, f"{name}: {anchor!r} stands there {text.count(anchor)} times"
            text = text.replace(anchor, anchor + new)
        (package / name).write_text(text)
    after = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    return {path.relative_to(package).as_posix() for path in after if after[path] != before.get(path)}


def named(section):
    """The files that the numbered steps of a recipe name, each in bold type's step: `gear_kernels/...`."""
    steps = re.findall(r"^\d\. \*\*.*?`gear_kernels/([\w./]+)`", SECTIONS[section], re.M | re.S)
    assert len(steps) == len(re.findall(r"^\d\. ", SECTIONS[section], re.M)), f"a step of {section!r} names no file"
    return set(steps)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the sources with a statistic and a method more: (its folder, the files that each recipe changed)."""
    folder = tmp_path_factory.mktemp("extended")
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "gear_kernels", folder / "gear_kernels", ignore=unwanted)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    changed = [insert(folder / "gear_kernels", edits) for edits in (STATISTIC, METHOD)]
    return folder, *changed


@pytest.fixture(scope="module")
def built(copy):
    """The copy with its compiled module, by the project's own CMakeLists.txt; module and bindings unoptimised."""
    source, build = copy[0], copy[0] / "build"
    options = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0", f"-DPython_EXECUTABLE={sys.executable}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (["cmake", "-S", source, "-B", build, *options], ["cmake", "--build", build, "--parallel", "2"]):
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (module,) = build.glob("_native.*")
    shutil.copy(module, source / "gear_kernels")
    return source


def computed(folder, what):
    """The errors that extended_copy.py finds in the copy."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "extended_copy.py", what, DEMO],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(folder)
    return found["worst"]


# --- 1: a statistic ------------------------------------------------------------------------------------------------------------


def test_a_statistic_is_written_in_four_files(copy):
    assert copy[1] == set(STATISTIC) == named("A statistic") and len(copy[1]) <= 4


@pytest.mark.slow
def test_the_new_statistic_is_exact(built):
    """Values and gradients, of logits and of hidden states, alone and beside others; ignored rows are 0 and pass nothing."""
    worst = computed(built, "statistic")
    runs = ("alone", "linear", "among", "teacher")
    assert set(worst) == {f"{name} {run}" for name in ("reference", "native", "triton") for run in runs}
    assert max(worst.values()) < 2e-6, worst


# --- 3: a compiled method -------------------------------------------------------------------------------------------------------


def test_a_compiled_method_is_written_in_six_files(copy):
    assert copy[2] == set(METHOD) == named("A compiled credit method") and len(copy[2]) == 6


@pytest.mark.slow
def test_the_new_method_runs_compiled(built):
    """Both scans, in both dtypes, to the last bit what the statement says; the trainer knows its name."""
    worst = computed(built, "method")
    scans = [error for name, error in worst.items() if not name.startswith("reference")]
    assert len(scans) == 4 and set(scans) == {0.0}, worst
    assert len(worst) == 6 and max(worst.values()) < 2e-7, f"`apply` sums its level over the policy tokens alone: {worst}"


# --- 4 and 5: a task, an engine ------------------------------------------------------------------------------------------------


@pytest.fixture
def lookup(tmp_path, monkeypatch):
    """The module of docs/tasks.md in the working directory; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "lookup_extending.py").write_text(TASK)
    yield "lookup_extending"
    sys.modules.pop("lookup_extending", None)


class Chat(test_rollouts.Chat):
    """What the scripted engine's tokens mean to the task: one turn in two looks, the others guess a number."""

    tokenizer = SimpleNamespace(decode=lambda ids: "look" if len(ids) % 2 else str(len(ids)))


def play(engine, task, schedule):
    problems = [(i, task.train_problem(i)) for i in range(6)]
    return roll_out(engine, Chat(), task, problems, Limits(4, 1.0, 64, 1000, None, schedule), ("key",))


def test_the_pages_task_plays(lookup):
    """In under 60 lines; by its name in a configuration whose preflight passes; the same rollouts under both schedules."""
    assert len(TASK.splitlines()) < 60
    options = [f"task={lookup}:LookupTask", "task_args.largest=40", "rollout.schedule=continuous"]
    task, recipe = check(load_config(DEMO, options))
    assert task == make_task(f"{lookup}:LookupTask", 0, {"largest": 40}) and recipe.method is not None
    lockstep, continuous = (
        [replace(r, problem=None) for r in play(Scripted(None, None, slots=5), task, schedule)]
        for schedule in ("lockstep", "continuous")
    )
    assert lockstep == continuous and len(lockstep) == 24 and not any(r.failed or r.dropped for r in lockstep)
    assert {r.turns for r in lockstep} == {1, 2}, "some look, others guess at once"
    assert any(r.status is Status.DONE for r in lockstep)


def test_the_pages_engine_serves_a_run(lookup):
    """In under 80 lines; by its name in a configuration whose preflight passes; a push is a new version."""
    assert len(Path(scripted_engine.__file__).read_text().splitlines()) < 80
    options = [f"task={lookup}:LookupTask", "rollout.engine=scripted_engine:Scripted", "rollout.engine_options.slots=3"]
    cfg = load_config(DEMO, options)
    task, _ = check(cfg)
    engine = make_engine(cfg, "folder")
    assert type(engine) is engine_class(cfg) is Scripted and engine.slots == 3
    taken = iter([("model.norm.weight", torch.ones(4))])
    engine.push(taken)
    assert engine.version == 1 and next(taken, None) is None
    rollouts = [play(engine, task, schedule) for schedule in ("lockstep", "continuous")]
    assert [r.ids for r in rollouts[0]] == [r.ids for r in rollouts[1]] and not engine.running


# --- 6: a back end --------------------------------------------------------------------------------------------------------------


class Counting(Reference):
    """The reference, which counts its tiles."""

    name = "counting"
    tiles = 0

    def sweep(self, student, teacher, task, sums):
        self.tiles += 1
        super().sweep(student, teacher, task, sums)


def test_a_back_end_is_a_class_in_the_table(monkeypatch):
    """It serves both operators, their backward and the credit by its name, and is asked for as the others are."""
    own = Counting()
    monkeypatch.setitem(backends.BACKENDS, own.name, own)
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(n, 8, generator=g) for n in (5, 90, 5))
    targets, found = torch.arange(5), {}
    for name in ("counting", "reference"):
        with gear_kernels.backend(name):
            leaf = hidden.clone().requires_grad_()
            stats = gear_kernels.linear_token_stats(leaf, weight, targets, teacher, stats=("logprobs", "entropy", "reverse_kl"))
            (stats.logprobs + stats.reverse_kl).sum().backward()
            credit = gear_kernels.credit_weights(
                stats.reverse_kl.detach(), stats.entropy.detach(), torch.ones(1), torch.tensor([0, 5])
            )
            found[name] = (*(x.detach() for x in stats if x is not None), leaf.grad, credit.weights)
    assert own.tiles > 0 and all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    monkeypatch.setenv("GEAR_KERNELS_BACKEND", "counting")
    assert backends.choose(torch.device("cpu"), torch.float32) == "counting"
