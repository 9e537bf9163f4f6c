"""The demo, GEAR beside GRPO: `python -m benchmarks.demo [--seeds 0,1,2] [--runs DIR] [--read]`.

Trains `mathapi_cpu.yaml` on two ranks with each method and seed in turn (a minute and a half each on two cores), and keeps what
the runs say: held-out success by step, and the seconds of a step by phase. Writes demo.json and the pictures of docs/plots.
--read takes the runs that lie in DIR already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from gear_trainer.runs.files import read_metrics

from .cpu_report import RESULTS, environment
from .measure import OtherLoad
from .scaling import PLOTS, ROOT

CONFIG = "gear_trainer/configs/mathapi_cpu.yaml"
FILE = "demo.json"
METHODS = ("grpo", "gear")
PHASES = ("rollout", "score", "credit", "update", "push")


def train(method: str, seed: int, folder: Path) -> None:
    """One run, into folder/METHOD-SEED; raises with the end of what it said where it fails."""
    options = [f"credit={method}", f"seed={seed}", f"name={method}-{seed}", f"output_dir={folder}"]
    launch = [str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error", "--num_gpus", "2"]
    command = [*launch, "gear_trainer/run.py", "--config", CONFIG, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(options)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def summary(path: Path) -> dict:
    """Of a run's metrics.jsonl: held-out success by step, and medians over its steps: seconds by phase, of the whole step
    without the held-out evaluation, policy tokens, share of trajectories whose advantage is 0.
    """
    lines = read_metrics(path)
    steps = [m for m in lines if "seconds" in m]
    if not steps:
        raise SystemExit(f"{path}: no step with seconds by phase in it; is it the metrics.jsonl of a run that took a step?")
    seconds = {name: statistics.median(m["seconds"][name] for m in steps) for name in PHASES}
    whole = statistics.median(m["seconds"]["step"] - m["seconds"].get("eval", 0.0) for m in steps)
    tokens, idle = (statistics.median(m[name] for m in steps) for name in ("policy_tokens", "zero_advantage"))
    held_out = {str(m["step"]): m["held_out_success"] for m in lines if m.get("held_out_success") is not None}
    figures = {"steps": len(steps), "seconds": seconds, "step": whole, "policy_tokens": tokens, "zero_advantage": idle}
    return {"held_out": held_out, **figures}


def typical(runs: list[dict], method: str) -> dict:
    """Medians over the runs of one method."""
    own = [run for run in runs if run["method"] == method]
    seconds = {name: statistics.median(run["seconds"][name] for run in own) for name in PHASES}
    rest = {name: statistics.median(run[name] for run in own) for name in ("steps", "step", "policy_tokens", "zero_advantage")}
    return {"seconds": seconds, **rest}


def collect(folder: Path, seeds: Iterable[int]) -> list[dict]:
    """What the runs of a folder say."""
    named = [(method, seed) for seed in seeds for method in METHODS]
    return [{"method": m, "seed": s, **summary(folder / f"{m}-{s}" / "metrics.jsonl")} for m, s in named]


def run(seeds: list[int], folder: Path, output: Path, pictures: Path, console: Console, read: bool = False) -> dict:
    """Train unless `read`; write demo.json to `output` and the pictures; what the JSON holds."""
    from . import plots, split

    load = OtherLoad()
    if not read:
        for seed, method in track([(s, m) for s in seeds for m in METHODS], "training", console=console):
            train(method, seed, folder)
    share = None if read else load.share()  # of runs made earlier nobody knows
    found = {**environment(), "config": CONFIG, "other_load": share, "runs": collect(folder, seeds)}
    found["split"] = split.measure(folder / f"gear-{seeds[0]}")
    output.mkdir(parents=True, exist_ok=True)
    (output / FILE).write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {output / FILE} and " + ", ".join(p.name for p in plots.draw_demo(found, pictures)))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--runs", type=Path, help="where the runs go (a temporary folder), or with --read lie")
    parser.add_argument("--read", action="store_true", help="train nothing")
    given = parser.parse_args(arguments)
    if given.read and not given.runs:
        parser.error("--read needs --runs")
    folder = (given.runs or Path(tempfile.mkdtemp(prefix="demo-"))).resolve()
    run([int(s) for s in given.seeds.split(",")], folder, RESULTS, PLOTS, Console(), given.read)


if __name__ == "__main__":
    main()
