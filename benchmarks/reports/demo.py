"""The demo, GEAR beside GRPO: `python -m benchmarks.reports.demo [--seeds 0,1,2] [--runs DIR] [--read]`.

Trains `mathapi_cpu.yaml` on two ranks with each method and seed in turn (a minute and a half each on two cores), and keeps what
the runs say: held-out success by step, and the seconds of a step by phase. Then takes one step's scoring apart, on the rollouts
that the first GEAR run kept. Writes demo.json, from which the page is drawn. --read takes the runs that lie in DIR already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from gear_kernels import FusedHead, TokenStats, credit_weights
from gear_trainer.policy.batching import MicroBatch, micro_batch, split_rows
from gear_trainer.policy.model import hidden_states
from gear_trainer.policy.packing import pack_attention
from gear_trainer.rollout import Rollout
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.records import read_records
from gear_trainer.tasks import make_task

from ..harness.environment import RESULTS, ROOT, environment
from ..harness.measure import OtherLoad, elapsed_ms, interleave, keep_freed_blocks, one_thread
from ..harness.tables import keep_for_page

CONFIG = "gear_trainer/configs/mathapi_cpu.yaml"
FILE = "demo.json"
METHODS = ("grpo", "gear")
PHASES = ("rollout", "score", "credit", "update", "push")
SCORED_STEP = 5  # whose scoring is taken apart: early enough for half of the trajectories to have an advantage
STUDENT, TEACHER = ("logprobs", "entropy"), ("logprobs", "entropy", "teacher_logprobs")


def train(config: str, folder: Path, name: str, options: Sequence[str]) -> None:
    """One run, into folder/NAME; raises with the end of what it said where it fails."""
    options = [*options, f"name={name}", f"output_dir={folder}"]
    launch = [str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error", "--num_gpus", "2"]
    command = [*launch, "gear_trainer/run.py", "--config", config, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(options)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def summary(path: Path) -> dict:
    """A run's figures, from its metrics.jsonl: held-out success by step, and medians over its steps: seconds by phase, of the
    whole step without the held-out evaluation, policy tokens, share of trajectories whose advantage is 0.
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
    """The summaries of a folder's runs."""
    named = [(method, seed) for seed in seeds for method in METHODS]
    return [{"method": m, "seed": s, **summary(folder / f"{m}-{s}" / "metrics.jsonl")} for m, s in named]


# --- what scoring is made of --------------------------------------------------------------------------------------------------


def scoring(run: Path, rounds: int = 15) -> dict:
    """The parts that scoring a step of a kept run is made of, in milliseconds, for the trajectories whose advantage is not 0, in
    one process with the run's last policy, on one thread as a rank of the demo.

    parts: "policy" and "teacher", the backbone on the policy's and on the teacher's prompts; "head" as GRPO wants it and "head
    with teacher" as GEAR does; "scan", the credit weights.
    """
    lm, rollouts, advantages, batches = kept_step(run, SCORED_STEP)
    calls = _parts(lm, rollouts, batches, advantages)
    keep_freed_blocks()
    with one_thread(), torch.no_grad():
        first, load = {name: elapsed_ms(call) for name, call in calls.items()}, OtherLoad()
        timings = interleave(calls, first, rounds)
    tokens = sum(len(r.policy_positions) for r in rollouts)
    found = {"step": SCORED_STEP, "trajectories": len(rollouts), "policy_tokens": tokens, "other_load": load.share()}
    return found | {"parts": {name: asdict(t) for name, t in timings.items()}}


def kept_step(run: Path, step: int) -> tuple[Any, list[Rollout], list[float], list[MicroBatch]]:
    """A kept run's last policy, its head fused, and of one of its steps what the policy learned from: trajectories, their
    advantages, and the micro-batches of them, teachers included.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((run / "config.json").read_text())
    lm: Any = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    FusedHead.adopt(lm.get_output_embeddings())
    packed = bool(config["train"].get("packing"))  # a run of before it was a key has padded sequences
    if packed:
        pack_attention(lm)
    task = make_task(config["task"], config["seed"], config["task_args"])
    rollouts, advantages = _rollouts(run, step, task, Chat(AutoTokenizer.from_pretrained(run / "model"), task.tools))
    rows = split_rows(rollouts, list(range(len(rollouts))), config["train"]["tokens_per_micro_batch"], True, packed)
    return lm, rollouts, advantages, [micro_batch(rollouts, part, teacher=True, packed=packed) for part in rows]


def _rollouts(run: Path, step: int, task, chat: Chat) -> tuple[list[Rollout], list[float]]:
    """The step's trajectories that have an advantage, with the prompts that their teacher read."""
    kept = [line for line in read_records(run, step) if line["advantage"] != 0]
    found = []
    for line in kept:
        problem = task.train_problem(line["group"])
        taught = chat.prompt_ids(problem.teacher_messages)
        mask = [bool(m) for m in line["mask"]]
        found.append(Rollout(problem, line["group"], line["sample"], line["prompt_ids"], taught, line["ids"], mask))
    return found, [line["advantage"] for line in kept]


def _parts(lm, rollouts: list[Rollout], batches: list[MicroBatch], advantages: list[float]) -> dict[str, Callable]:
    head = lm.get_output_embeddings()

    def backbone(which: str) -> list[torch.Tensor]:
        return [hidden_states(lm, getattr(b, which)) for b in batches]

    with torch.no_grad():
        hidden = list(zip(batches, backbone("student"), backbone("teacher"), strict=True))

    def stats(names: tuple[str, ...], taught: bool) -> list[TokenStats]:
        return [head(s, b.targets, t if taught else None, stats=names) for b, s, t in hidden]

    with torch.no_grad():
        scored: list[Any] = stats(TEACHER, True)  # of which all that is asked for is there
    signal, entropy = torch.cat([s.logprobs - s.teacher_logprobs for s in scored]), torch.cat([s.entropy for s in scored])
    order = [row for b in batches for row in b.rows]
    own = torch.tensor([advantages[i] for i in order])
    bounds = torch.tensor([0, *(len(rollouts[i].policy_positions) for i in order)]).cumsum(0).int()
    return {
        "policy": lambda: backbone("student"),
        "teacher": lambda: backbone("teacher"),
        "head": lambda: stats(STUDENT, False),
        "head with teacher": lambda: stats(TEACHER, True),
        "scan": lambda: credit_weights(signal, entropy, own, bounds),
    }


# --- all of it ----------------------------------------------------------------------------------------------------------------


def run(seeds: list[int], folder: Path, output: Path, console: Console, read: bool = False) -> dict:
    """Train unless `read`; write demo.json to `output`; what the JSON holds."""
    load = OtherLoad()
    if not read:
        for seed, method in track([(s, m) for s in seeds for m in METHODS], "training", console=console):
            train(CONFIG, folder, f"{method}-{seed}", [f"credit={method}", f"seed={seed}"])
    share = None if read else load.share()  # of runs made earlier nobody knows
    found = {**environment(), "config": CONFIG, "other_load": share, "runs": collect(folder, seeds)}
    found["split"] = scoring(folder / f"gear-{seeds[0]}")
    keep_for_page(found, output / FILE, console)
    return found


def asked(name: str, about: str | None, arguments: list[str] | None) -> tuple[list[int], Path, bool]:
    """The command line of a report that trains: seeds, the folder of runs, and whether they are to be read only."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.reports.{name}", description=about)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--runs", type=Path, help="where the runs go (a temporary folder), or with --read lie")
    parser.add_argument("--read", action="store_true", help="train nothing")
    given = parser.parse_args(arguments)
    if given.read and not given.runs:
        parser.error("--read needs --runs")
    folder = (given.runs or Path(tempfile.mkdtemp(prefix=f"{name}-"))).resolve()
    return [int(s) for s in given.seeds.split(",")], folder, given.read


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    seeds, folder, read = asked("demo", __doc__, arguments)
    run(seeds, folder, RESULTS, Console(), read)


if __name__ == "__main__":
    main()
