"""The time in which the served page of a run of full size opens: `python -m benchmarks.reports.report_page`.

The run has 2,000 steps of 1,024 rollouts of 2,000 tokens, and is synthetic. Its metrics are random walks under the names that a
run has. Of the rollouts one step is drawn (signals at random, texts of 2,000 pieces, weights by credit_weights) and stands, as a
hard link, under the names of all steps: 2,000 files of their own would be 260 GB, and the page reads one at a time. The run is
made once in build/ and kept. Chromium (playwright of the extra `test`) opens each view anew; CPU seconds tell on a busy machine
too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from gear_kernels import credit_weights
from gear_trainer.runs.records import SCHEMA, records_path, to_bytes

from ..harness.environment import RESULTS, ROOT, environment

FILE = RESULTS / "report_page.json"
STEPS, ROLLOUTS, TOKENS, SIZE, REPLY = 2000, 1024, 2000, 8, 50  # a reply of REPLY tokens stands in the middle of a rollout
VIEWS = {"curves": "view=curves", "credit": "view=credit", "compare": "view=compare", "tokens": "view=tokens"}
_SAID = {"curves": "curves", "credit": "a rollout's credit"}
ROUNDS = 3
MIB = 1 << 20
NAMES = (
    "reward_mean", "success", "entropy", "response_length", "response_length_p50", "response_length_p99", "tool_calls",
    "tool_errors",
    "zero_advantage", "share_above_threshold", "segments_per_trajectory", "mean_segment_length", "share_unclosed", "mean_signal",
    "share_in_segments", "mean_weight_positive", "mean_weight_negative", "silent_trajectories", "teacher_gain_success",
    "teacher_gain_failure", "logprob_gap_mean", "logprob_gap_max", "mismatch_kl", "effective_sample_size", "loss", "grad_norm",
    "approx_kl", "clip_fraction", "lr", "policy_tokens", "tokens_per_second", "idle_share", "truncated",
    *(f"seconds/{phase}" for phase in ("rollout", "wait", "score", "credit", "update", "push", "records", "step")),
    *(f"memory/{phase}" for phase in ("rollout", "wait", "score", "credit", "update", "push", "records")),
    *(f"outcome/{part}" for part in ("format", "exact", "calls", "order")),
)  # fmt: skip


# --- the run ------------------------------------------------------------------------------------------------------------------


def make_run(folder: Path, steps: int = STEPS, rollouts: int = ROLLOUTS, tokens: int = TOKENS) -> Path:
    """The folder of a synthetic run, as a run of that size leaves it."""
    (folder / "rollouts").mkdir(parents=True)
    rng = np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps({"credit": "gear", "task": "synthetic", "train": {"steps": steps}}))
    walks = rng.normal(size=(len(NAMES), steps)).cumsum(axis=1) / 50 + 1
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            held_out = {"held_out_success": step / steps} if step % 20 == 0 else {}
            numbers = dict(zip(NAMES, walks[:, step - 1].tolist(), strict=True))
            file.write(json.dumps({"step": step} | numbers | held_out) + "\n")
    (folder / "state.json").write_text(json.dumps({"state": "finished", "step": steps, "why": ""}))
    first = records_path(folder, 1)
    first.write_bytes(to_bytes(step_of(rng, rollouts, tokens)))
    for step in range(2, steps + 1):
        os.link(first, records_path(folder, step))
    return folder


def step_of(rng: np.random.Generator, rollouts: int, tokens: int) -> pa.Table:
    """A step's rollouts by SCHEMA, all of one length: two turns with a reply between them."""
    n, group = rollouts * tokens, np.arange(rollouts) // SIZE
    turn = np.tile(np.r_[np.zeros(tokens // 2, int), np.full(REPLY, -1), np.ones(tokens - tokens // 2 - REPLY, int)], rollouts)
    mask, success = turn >= 0, rng.random(rollouts) < 0.5
    ids = rng.integers(0, 2000, n)
    pieces = pa.array([f" {'abcdefghijklmnopqrst'[i % 20]}{i}" for i in range(2000)])
    own, taught = -rng.exponential(0.5, n), -rng.exponential(0.6, n)
    values = {"logprobs": own, "teacher_logprobs": taught, "raw_signal": own - taught, "sampler_logprobs": own}
    values |= {name: rng.exponential(0.4, n) for name in ("entropy", "teacher_entropy", "forward_kl")}
    advantages = np.where(success, 1.0, -1.0)
    policy = {name: torch.from_numpy(values[column][mask]).float() for name, column in
              {"signal": "raw_signal", "entropy": "entropy"}.items()}  # fmt: skip
    bounds = torch.arange(rollouts + 1, dtype=torch.int32) * int(mask.sum() // rollouts)
    credit = credit_weights(**policy, advantages=torch.from_numpy(advantages).float(), cu_seqlens=bounds)
    made = {"weight": credit.weights, "signal": credit.signal, "token_advantages": credit.token_advantages}
    made["segment"] = credit.segment_ids
    for name, found in made.items():
        values[name] = np.zeros(n)
        values[name][mask] = found.double().numpy()
    values |= {"turn_rewards": np.zeros(n), "anchors": group.repeat(tokens) + 7 * turn, "versions": np.ones(n)}
    lists = {"ids": pa.array(ids), "tokens": pieces.take(pa.array(ids)), "mask": pa.array(mask), "turn": pa.array(turn)}
    lists |= {name: pa.array(column, mask=~mask) for name, column in values.items()}
    offsets = pa.array(np.arange(rollouts + 1, dtype=np.int32) * tokens)
    texts = ["".join(part) for part in np.array(lists["tokens"].to_pylist()).reshape(rollouts, tokens)]
    row = {
        "problem": [f"synthetic/{g}" for g in group], "group": group, "sample": np.arange(rollouts) % SIZE,
        "reward": success * 1.0,
        "success": success, "advantage": advantages, "end": ["done"] * rollouts, "response": texts, "dropped": [False] * rollouts,
        "prompt": ["What is it?"] * rollouts, "answer": ["42"] * rollouts, "truncated": [False] * rollouts,
    }  # fmt: skip
    columns = []
    for field in SCHEMA:
        if field.name in lists:
            columns.append(pa.ListArray.from_arrays(offsets, lists[field.name].cast(field.type.value_type, safe=False)))
        else:
            columns.append(pa.array(row[field.name], field.type) if field.name in row else pa.nulls(rollouts, field.type))
    return pa.table(columns, schema=SCHEMA)


# --- its page -----------------------------------------------------------------------------------------------------------------


def measure(folder: Path, rounds: int = ROUNDS) -> dict[str, list[dict[str, Any]]]:
    """Each view opened `rounds` times by a page of its own: seconds, CPU seconds of server and browser, MiB, requests, bytes."""
    from playwright.sync_api import sync_playwright

    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    assert chromium, "no Chromium: apt-get install chromium"
    command = [sys.executable, "-m", "gear_trainer", "report", "--serve", "0", str(folder)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VIEWS}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving, sync_playwright() as play:
        try:
            assert serving.stdout
            url = re.match(r"\S+", serving.stdout.readline())
            assert url, "the server ended"
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            for _ in range(rounds):
                for name, view in VIEWS.items():
                    found[name].append(_opened(browser, f"{url[0]}#{view}", psutil.Process(serving.pid)))
            browser.close()
        finally:
            serving.terminate()
    return found


def _opened(browser: Any, url: str, server: psutil.Process) -> dict[str, Any]:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(600_000)
    sizes: list[int] = []
    page.on("response", lambda answer: sizes.append(int(answer.headers.get("content-length", 0))))
    before, started = (_cpu([server]), _cpu(_browser())), time.perf_counter()
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    seconds = time.perf_counter() - started
    out = {
        "seconds": seconds,
        "server_cpu": _cpu([server]) - before[0],
        "browser_cpu": _cpu(_browser()) - before[1],
        "server_mib": server.memory_info().rss / MIB,
        "page_mib": page.evaluate("performance.memory?.usedJSHeapSize ?? 0") / MIB,
        "requests": len(sizes),
        "bytes": sum(sizes),
    }
    page.close()
    return out


def _browser() -> list[psutil.Process]:
    return [own for own in psutil.Process().children(recursive=True) if "chrom" in own.name()]


def _cpu(processes: list[psutil.Process]) -> float:
    return sum(sum(own.cpu_times()[:2]) for own in processes if own.is_running())


def sentence(found: dict[str, Any]) -> str:
    """The sentence of docs/report.md about the file."""
    best = {name: {key: min(one[key] for one in tries) for key in tries[0]} for name, tries in found["views"].items()}
    most = max(one["server_mib"] for tries in found["views"].values() for one in tries)
    heap = max(one["page_mib"] for one in best.values())
    cpu = {name: one["server_cpu"] + one["browser_cpu"] for name, one in best.items()}
    said = [f"{what} in {best[name]['seconds']:.1f} s ({cpu[name]:.1f} s of CPU)" for name, what in _SAID.items()]
    busy = f"on {found['cores']} cores at a load of {found['load'][0]:.0f}"
    return f"{', '.join(said)} {busy}, with at most {most:.0f} MiB in the server and {heap:.0f} MiB in the page's heap"


def main(arguments: list[str] | None = None) -> int:
    """Make the run where it is not there yet, open its views, write FILE."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.report_page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "large_run", help="where the synthetic run is, or goes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    given = parser.parse_args(arguments)
    if not given.folder.exists():
        part = given.folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        make_run(part).rename(given.folder)
    size = records_path(given.folder, 1).stat().st_size
    shape = {"steps": STEPS, "rollouts": ROLLOUTS, "tokens": TOKENS, "metrics": len(NAMES), "bytes_of_a_step": size}
    load = os.getloadavg()
    found = {"environment": environment(), "cores": psutil.cpu_count(), "load": load, "shape": shape}
    found["views"] = measure(given.folder, given.rounds)
    for name, tries in found["views"].items():
        print(name, *({key: round(value, 2) for key, value in one.items()} for one in tries), sep="\n  ")
    print(sentence(found))
    if not given.dry:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
