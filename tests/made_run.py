"""Runs, an audit, an evaluation and a study as their files, made without a model: what the report's tests open.

Weights are credit_weights' own. The study is the committed one, with a run that failed planted in it.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch

from gear_kernels import credit_weights
from gear_kernels.methods import METHODS
from gear_trainer.audit import file as audit_file
from gear_trainer.evaluation import scores
from gear_trainer.runs.records import SCHEMA, to_bytes

STEPS, GROUPS, SIZE = 12, 8, 4
HOSTILE = (  # pieces that a page or a terminal would obey if it took them for more than text
    "<script>globalThis.planted = 1</script>", "<img src=x onerror=planted=1>", "</script><script>planted=1</script>", "<!--",
    "\x1b[31mred", "\x1b]0;title\x07", "\u202eevil\u2066", "\u200b", "\x00", "\ufffd", "&lt;b&gt;", "'\"`${planted=1}`", "]]>",
)  # fmt: skip
WORDS = (" so", " the", " sum", " of", " 12", " and", " 30", " is", " 42", ".", "\n", "<tool_call>", '{"name":', ' "add"', "}")
REPLY = (
    "<|im_end|>\n",
    "<|im_start|>user\n",
    "<tool_response>",
    "42",
    "</tool_response>",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
)
FLOATS = ("logprobs", "teacher_logprobs", "entropy", "raw_signal", "teacher_entropy", "forward_kl")


def make_run(folder, seed=0, credit="gear", steps=STEPS, hostile=True, **args):
    """A run's folder: config.json, metrics.jsonl, rollouts of every step, in groups whose members begin alike."""
    (folder / "rollouts").mkdir(parents=True)
    cfg = {"name": folder.name, "credit": credit, "credit_args": args, "task": "sums", "seed": seed, "train": {"steps": steps}}
    (folder / "config.json").write_text(json.dumps(cfg))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics(seed, steps)))
    (folder / "state.json").write_text(json.dumps({"state": "finished", "step": steps, "why": ""}))
    for step in range(1, steps + 1):
        rng = random.Random(1000 * seed + step)
        rows = [row(rng, step, group, sample, hostile) for group in range(GROUPS) for sample in range(SIZE)]
        weigh(rows, credit, args)
        (folder / "rollouts" / f"step-{step:05d}.parquet").write_bytes(to_bytes(pa.Table.from_pylist(rows, schema=SCHEMA)))
    return folder


def metrics(seed, steps):
    """Numbers of a step as a healthy run has them, with what is nested, missing, or counted at evaluations only."""
    rng = random.Random(seed)
    yield {"step": 0, "held_out_success": 0.2, "held_out": {"all": {"success": 0.2}}}
    for step in range(1, steps + 1):
        wave = rng.random() / 10
        found = {"step": step, "reward_mean": step / steps + wave, "success": min(1, step / steps), "entropy": 0.5 - wave}
        found |= {
            "share_above_threshold": 0.3 + wave,
            "segments_per_trajectory": 3 + wave,
            "share_unclosed": wave,
            "tool_calls": 1.0,
        }
        found |= {"mean_weight_positive": 1.02, "mean_weight_negative": 0.98, "teacher_gain_success": 0.2 + wave, "lr": 1e-4}
        found |= {"teacher_gain_failure": None, "response_length": 20 + wave, "logprob_gap_mean": 1e-5, "mean_signal": 0.1}
        found |= {"outcome": {"format": 1.0, "exact": wave}, "seconds": {"rollout": 1 + wave, "score": 0.5, "step": 2 + wave}}
        yield found | ({"held_out_success": 0.2 + step / steps / 2} if step % 4 == 0 else {})


def row(rng, step, group, sample, hostile):
    """A rollout of two turns with a tool's reply between them; siblings share their first four tokens."""
    begin = [WORDS[(group + k) % len(WORDS)] for k in range(4)]
    first = begin + [rng.choice(WORDS) for _ in range(rng.randrange(4, 12))]
    second = [rng.choice(WORDS) for _ in range(rng.randrange(3, 9))] + ([rng.choice(HOSTILE)] if hostile else [])
    tokens = [*first, *REPLY, *second]
    mask = [True] * len(first) + [False] * len(REPLY) + [True] * len(second)
    turn = [0] * len(first) + [-1] * len(REPLY) + [1] * len(second)
    draw = np.random.default_rng(rng.randrange(2**32))
    n = len(tokens)
    own, taught = -draw.exponential(0.5, n).astype(np.float32), -draw.exponential(0.6, n).astype(np.float32)
    numbers = {"logprobs": own, "teacher_logprobs": taught, "raw_signal": own - taught, "entropy": draw.exponential(0.4, n)}
    numbers |= {"teacher_entropy": draw.exponential(0.9, n), "forward_kl": draw.exponential(0.2, n)}
    success = (sample + group) % 3 != 0
    over = {name: [float(np.float32(x)) if m else None for x, m in zip(v, mask, strict=True)] for name, v in numbers.items()}
    rewards = [rng.choice([0.0, 0.5, 1.0]) for _ in range(2)]
    known = {piece: i for i, piece in enumerate((*WORDS, *REPLY, *HOSTILE))}
    taught_at_all = group != GROUPS - 1  # the last group agrees: no advantage, so no teacher looked
    if not taught_at_all:
        over |= dict.fromkeys(("teacher_logprobs", "raw_signal", "teacher_entropy", "forward_kl"))
    return {
        "problem": f"{'sums' if group % 2 else 'words'}/{step}-{group}", "group": group, "sample": sample,
        "success": success, "advantage": (1 if success else -1) * (0.5 + sample / 10) if taught_at_all else 0.0,
        "reward": float(success), "end": rng.choice(["done", "done", "turns"]),
        "calls": 1, "errors": 0, "truncated": False, "failures": [], "dropped": False,
        "texts_escaped": 0, "replies_cut": 0, "prompt": f"question {group} <b>bold</b>\x1b[1m", "response": "".join(tokens),
        "answer": "42", "reference": None, "prompt_ids": [1], "ids": [known[t] for t in tokens], "tokens": tokens, "mask": mask,
        "turn": turn, "sampler_logprobs": over["logprobs"], "versions": [1 if m else None for m in mask], **over,
        "turn_rewards": [rewards[t] if m else None for t, m in zip(turn, mask, strict=True)],
        "anchors": [2**40 + group + 7 * t if m else None for t, m in zip(turn, mask, strict=True)],
    }  # fmt: skip


def packed(rows, needs):
    """credit_weights' arguments of these rollouts' policy tokens."""
    column = {"signal": "raw_signal", "turn_ids": "turn"}
    out = {"signal": None, "entropy": None}
    for need in (n for n in needs if n != "groups"):
        values = [v for r in rows for v, m in zip(r[column.get(need, need)], r["mask"], strict=True) if m]
        out[need] = torch.tensor(values, dtype=torch.int64 if need in ("turn_ids", "anchors") else torch.float32)
    if "groups" in needs:
        out["groups"] = torch.tensor([r["group"] for r in rows])
    lengths = torch.tensor([0, *(sum(r["mask"]) for r in rows)])
    return out | {"advantages": torch.tensor([r["advantage"] for r in rows]), "cu_seqlens": lengths.cumsum(0).to(torch.int32)}


def weigh(rows, credit, args):
    """Give rows what a run's own credit would have: weight, segment, g and token advantages."""
    method = type(METHODS[credit])(**(vars(METHODS[credit]) | args))
    own = [r for r in rows if r["advantage"]]
    found = credit_weights(**packed(own, method.needs), method=method)
    columns = {
        "weight": found.weights,
        "segment": found.segment_ids,
        "signal": found.signal,
        "token_advantages": found.token_advantages,
    }
    for r in rows:
        plain = {"weight": 1.0, "segment": -1, "signal": 0.0, "token_advantages": 0.0}
        r |= {name: [value if m else None for m in r["mask"]] for name, value in plain.items()}
    for name, values in columns.items():
        given = iter(values.tolist())
        for r in own:
            r[name] = [next(given) if m else None for m in r["mask"]]


def make_audit(folder, seed=5):
    """An audit's folder: V falls or rises at random and ends at the outcome; the teacher `sibling` is missing once."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    kept = [row(rng, 1, group, sample, hostile=True) for group in range(GROUPS - 1) for sample in range(SIZE)]
    rows = []
    for k, r in enumerate(kept):
        names = ("problem", "group", "sample", "reward", "success", "advantage", "end", "ids", "tokens", "mask", "turn")
        made = {name: r[name] for name in names} | {"step": 20, "v0": 0.5, "value_samples": 64, "deviation": -2}
        made |= {name: [v if v is not None else float("nan") for v in r[name]] for name in ("logprobs", "entropy")}
        v, value = 0.5, []
        for m in r["mask"]:
            v = min(1.0, max(0.0, v + rng.choice([0, 0, 0.125, -0.125]))) if m else v
            value.append(v if m else float("nan"))
        value[-1] = float(r["success"])
        made["value"] = value
        for teacher in audit_file.TEACHERS:
            for column in audit_file.TEACHER_COLUMNS:
                like = {"reverse_kl": "forward_kl"}.get(column, column)
                shown = [x if x is not None else float("nan") for x in r[like]]
                made[f"{column}/{teacher}"] = None if teacher == "sibling" and k == 0 else shown
        rows.append(made)
    columns = {name: [r[name] for r in rows] for name in audit_file.SCHEMA.names}
    audit_file.write(folder / "audit.parquet", columns, {"task": "sums", "model": "m", "step": 20})
    return folder


def make_evaluation(folder, seed=7):
    """An evaluation's folder: six problems of two categories with four samples each, one of which broke off twice."""
    folder.mkdir(parents=True)
    rng, records = random.Random(seed), []
    for group in range(6):
        for sample in range(SIZE):
            r = row(rng, 0, group, sample, hostile=True)
            owners = [t if m else -1 for t, m in zip(r["turn"], r["mask"], strict=True)]
            ends = [i + 1 for i, t in enumerate(owners) if owners[i + 1 : i + 2] != [t]]
            parts = [[owners[b - 1], len("".join(r["tokens"][a:b]))] for a, b in zip([0, *ends], ends, strict=False)]
            names = ("problem", "sample", "reward", "success", "end", "calls", "errors", "failures", "response", "answer")
            made = {name: r[name] for name in names} | {"index": group, "metrics": {}, "vote": str(42 + sample % 2), "turns": 2}
            made |= {"tokens": sum(r["mask"]), "prompt": None if sample else r["prompt"], "passages": parts}
            records.append(made | ({"end": "error", "failures": ["the <b>service</b> is away"]} if group == 5 else {}))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    problems = [SimpleNamespace(id=f"p{i}", category="sums" if i % 2 else "words") for i in range(6)]
    found = scores.summarize(SimpleNamespace(report=lambda scored: {"looked": 0.5}), problems, records)
    settings = {"set": "sums", "task": "sums", "model": "a/model", "samples": SIZE, "temperature": 1.0}
    (folder / "result.json").write_text(json.dumps({"settings": settings, **found}))
    return folder


def make_study(folder):
    """A study's folder: the committed study.json, of it four arms; the last run of grpo failed with markup in its line."""
    folder.mkdir(parents=True)
    found = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "credit_study.json").read_text())
    found["arms"] = {name: found["arms"][name] for name in ("grpo", "gear_k1_1.0", "tilt_1.0", "oracle")}
    run = found["arms"]["grpo"]["runs"][-1]
    run |= {"state": "failed", "why": "ValueError: <script>globalThis.planted = 3</script>", "step": 7}
    (folder / "study.json").write_text(json.dumps(found))
    return folder
