"""A tiny Qwen3 policy with mixed outcomes: built once from a seed by a short supervised phase, then read from the cache.

Group-relative training needs prompts whose rollouts differ. A tiny model either knows a sum or does not, so outcomes are mixed by
its demonstrations instead: some are right, some guess without the tool, some call a wrong tool. Part of every batch shows the
teacher's prompt with right demonstrations only, so that the policy given the ground truth really knows more than without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from filelock import FileLock

from gear_trainer.config import parse_yaml
from gear_trainer.demo.qwen3_tokenizer import COMPACT_TEMPLATE, default_cache, subset_tokenizer
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks import Problem, Task, make_task
from gear_trainer.tasks.base import DemonstrableTask
from gear_trainer.tasks.demonstrations import OFFSET, check_demonstrations, play

CORPUS = 600  # demonstrations whose texts fix the vocabulary; numbers are single digits, so it is complete long before


@dataclass(frozen=True)
class WarmStartSpec:
    """Everything but task and seed that determines the model."""

    # 700 steps of 16 left the reference solution at -1.7 nats (seed 0) and training stuck at 0.72, miscopying digits;
    # 700 of 32 reach -0.93 and -0.85 (seeds 0 and 1), where -0.8 is what the mixed demonstrations allow.
    steps: int = 600
    batch: int = 32
    lr: float = 2e-3
    teacher_share: float = 0.4
    hidden: int = 128
    intermediate: int = 384
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    # Chosen on few seeds, whose spread is as large as what these two change; the batch size above is what counts.
    rope_theta: float = 500.0
    init_std: float = 0.06
    max_length: int = 1024
    # Part of the identity, as the last bits of a sum follow the thread count. One thread makes 4.5 steps a second;
    # two make 7 on a quiet machine and 0.2 on a busy one, waiting for each other.
    threads: int = 1


class Demo(NamedTuple):
    """One demonstration as tokens; the mask is 1 on what the policy writes (each turn and its end-of-turn token)."""

    ids: list[int]
    mask: list[int]


def encode_demo(chat: Chat, task: Task, problem: Problem, turns: list[str], teacher: bool) -> Demo:
    """A demonstration in the trainer's own token layout: prompt, turn, reply, turn, ..."""
    ids = chat.prompt_ids(problem.teacher_messages if teacher else problem.messages, problem.tools, problem.tags)
    mask = [0] * len(ids)
    for turn, replies in zip(turns, play(task, problem, turns), strict=True):
        written = [*chat.encode(turn), chat.tokenizer.eos_token_id]
        ids, mask = ids + written, mask + [1] * len(written)
        if replies:
            answer = chat.observation_ids(replies, problem.tools)
            ids, mask = ids + answer, mask + [0] * len(answer)
    return Demo(ids, mask)


def draw_demo(task: DemonstrableTask, seed: int, index: int, teacher_share: float) -> tuple[Problem, list[str], bool]:
    """The index-th demonstration, a function of (seed, index): its problem, its assistant turns, and whose prompt it takes."""
    rng = random.Random(f"warm-start/{seed}/{index}")
    problem = task.train_problem(OFFSET + index)
    teacher = rng.random() < teacher_share
    kinds, weights = zip(*task.demo_mix, strict=True)
    kind = "right" if teacher else rng.choices(kinds, weights)[0]
    return problem, task.demonstrate(problem, kind, rng), teacher


def _draws(task: DemonstrableTask, seed: int, spec: WarmStartSpec, count: int) -> Iterator[tuple[Problem, list[str], bool]]:
    return (draw_demo(task, seed, index, spec.teacher_share) for index in range(count))


def fingerprint(task: DemonstrableTask, seed: int, spec: WarmStartSpec) -> str:
    """A hash of what determines the model: sizes, versions, the chat template, and 64 demonstrations as the task writes them."""
    import tokenizers
    import transformers

    demos = []
    for p, turns, teacher in _draws(task, seed, spec, 64):
        replies = [[(m.role, m.content) for m in reply] for reply in play(task, p, turns)]
        demos.append((p.messages, p.teacher_messages, p.tools, turns, replies, teacher))
    versions = torch.__version__, transformers.__version__, tokenizers.__version__
    parts = seed, asdict(spec), versions, COMPACT_TEMPLATE.read_text(), task.tools, task.demo_mix, demos
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([code, *parts], sort_keys=True).encode()).hexdigest()[:16]


def _corpus(task: DemonstrableTask, seed: int, spec: WarmStartSpec) -> Iterable[str]:
    """Every text the tokenizer must hold whole tokens for, rendered piece by piece (pieces meet at special tokens)."""
    yield "system user assistant tool \n"
    yield from (f"\n{tool['function']['name']}(a, b)# Tools\n\n" for tool in task.tools or [])
    for problem, turns, _ in _draws(task, seed, spec, CORPUS):
        yield from (m["content"] for m in problem.messages + problem.teacher_messages)
        yield from turns
        yield from ("\n" + message.content + "\n" for replies in play(task, problem, turns) for message in replies)


def build_tokenizer(
    task: DemonstrableTask, seed: int, spec: WarmStartSpec, out_dir: Path, cache_dir: Path | str | None = None
) -> Any:
    """The subset tokenizer of the task's texts, tool signatures and tool answers included, saved in `out_dir`."""
    tokenizer = subset_tokenizer(_corpus(task, seed, spec), out_dir, cache_dir=cache_dir, max_length=spec.max_length)
    # A second pass over whole conversations, rendered by the first one's template, so pieces are seen in their context.
    chat = Chat(tokenizer, task.tools)
    drawn = (p for p, _, _ in _draws(task, seed, spec, CORPUS))
    texts = [chat.render(m, p.tools, p.tags) for p in drawn for m in (p.messages, p.teacher_messages)]
    return subset_tokenizer([*_corpus(task, seed, spec), *texts], out_dir, cache_dir=cache_dir, max_length=spec.max_length)


def build_model(tokenizer: Any, spec: WarmStartSpec) -> Any:
    """A small Qwen3 with an untied head, initialised from torch's global generator."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        initializer_range=spec.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        max_position_embeddings=spec.max_length,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def demo_logprobs(model: Any, demos: list[Demo]) -> list[torch.Tensor]:
    """Log-probs of each demonstration's policy tokens. Right padding needs no attention mask in a causal model."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(d.ids) for d in demos], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(d.mask) for d in demos], batch_first=True)[:, 1:].bool()
    hidden = model.model(ids[:, :-1]).last_hidden_state[mask]  # the head runs on policy tokens only, a quarter of all
    picked = model.lm_head(hidden).log_softmax(-1).gather(-1, ids[:, 1:][mask][:, None])[:, 0]
    return list(picked.split(mask.sum(1).tolist()))


def _rate(step: int, spec: WarmStartSpec) -> float:
    """Linear warm-up over 20 steps, then a cosine to a tenth of the peak."""
    return spec.lr * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / spec.steps))


def train(model: Any, chat: Chat, task: DemonstrableTask, seed: int, spec: WarmStartSpec) -> list[float]:
    """The supervised phase: cross-entropy on policy tokens. Returns the loss of every step."""
    from tqdm import trange

    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    bar = trange(spec.steps, desc="warm start", unit="step", mininterval=1.0)
    for step in bar:
        rows = range(step * spec.batch, (step + 1) * spec.batch)
        drawn = [draw_demo(task, seed, row, spec.teacher_share) for row in rows]
        # Teacher prompts are longer: two passes, one per form, save the padding between them.
        groups = [[encode_demo(chat, task, *d) for d in drawn if d[2] == form] for form in (False, True)]
        count = sum(sum(d.mask) for group in groups for d in group)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, spec)
        total = 0.0
        for demos in filter(None, groups):
            loss = -torch.cat(demo_logprobs(model, demos)).sum() / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    return losses


@torch.no_grad()
def conditioning_report(model: Any, chat: Chat, task: DemonstrableTask, count: int = 100) -> dict[str, dict[str, float]]:
    """Mean log-prob of right and wrong continuations of held-out problems under the student's and the teacher's prompt.

    `right_episode` is the reference solution, `wrong_tool` and `guess` what the mixed demonstrations do wrong; the last two split
    off the final turn after the right call: the true answer and a wrong number of the same length.
    """
    report: dict[str, dict[str, float]] = {}
    rng = random.Random("report")
    kinds = [kind for kind, _ in task.demo_mix]
    cases: dict[str, list[tuple[Problem, list[str], int]]] = {}
    for problem in task.held_out(count):
        for kind in kinds:
            cases.setdefault(f"{kind}_episode", []).append((problem, task.demonstrate(problem, kind, rng), 0))
        right = task.demonstrate(problem, "right", rng)
        cases.setdefault("right_answer", []).append((problem, right, len(right) - 1))
        cases.setdefault("wrong_answer", []).append((problem, [*right[:-1], task.wrong_answer(problem, rng)], len(right) - 1))
    for form, teacher in (("student", False), ("teacher", True)):
        report[form] = {name: _mean_logprob(model, chat, task, rows, teacher) for name, rows in cases.items()}
    return report


def _mean_logprob(model: Any, chat: Chat, task: Task, rows: list[tuple[Problem, list[str], int]], teacher: bool) -> float:
    """Mean over problems of the summed log-prob of the turns from `start` on."""
    demos = [encode_demo(chat, task, p, turns, teacher) for p, turns, _ in rows]
    skip = [sum(len(chat.encode(t)) + 1 for t in turns[:start]) for _, turns, start in rows]
    sums = [lp[n:].sum() for lp, n in zip(demo_logprobs(model, demos), skip, strict=True)]
    return round(float(torch.stack(sums).mean()), 4)


@contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    """A private global generator and a fixed thread count; both are put back, since callers go on training in this process."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _build(task: DemonstrableTask, seed: int, spec: WarmStartSpec, out_dir: Path, cache_dir: Path) -> None:
    start = time.perf_counter()
    tokenizer = build_tokenizer(task, seed, spec, out_dir, cache_dir)
    chat = Chat(tokenizer, task.tools)
    with _reproducible(seed, spec.threads):
        model = build_model(tokenizer, spec)
        losses = train(model, chat, task, seed, spec)
        report = conditioning_report(model.eval(), chat, task)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(str(out_dir))
    record = {
        "seed": seed,
        "spec": asdict(spec),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "loss_first": round(losses[0], 4),
        "loss_last": round(sum(losses[-10:]) / len(losses[-10:]), 4),
        "seconds": round(time.perf_counter() - start, 1),
        "mean_log_prob": report,
    }
    (out_dir / "warm_start.json").write_text(json.dumps(record, indent=2) + "\n")
    _print(record)


def _print(record: dict[str, Any]) -> None:
    print(f"warm start: {record['parameters']:,} parameters, {record['seconds']} s, loss {record['loss_last']}")
    student, teacher = record["mean_log_prob"]["student"], record["mean_log_prob"]["teacher"]
    print("mean log-prob on held-out problems     student   teacher")
    for name in student:
        print(f"  {name:34s}{student[name]:10.3f}{teacher[name]:10.3f}")


def ensure_warm_start(task: Task, seed: int, cache_dir: Path | str | None = None, spec: WarmStartSpec | None = None) -> Path:
    """The Hugging Face model directory of this task's warm start: built on the first call, found again afterwards.

    Safe to call from several processes at once (a file lock; the finished folder is renamed into place). The folder holds the
    model, tokenizer, chat template and `warm_start.json` with the conditioning report.
    """
    check_demonstrations(task)
    task = cast(DemonstrableTask, task)
    spec = spec or WarmStartSpec()
    root = Path(cache_dir) if cache_dir else default_cache()
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"warm-start-{type(task).__name__.lower()}-{seed}-{fingerprint(task, seed, spec)}"
    with FileLock(f"{final}.lock"):
        if not final.exists():
            temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
            try:
                _build(task, seed, spec, temporary, root)
                temporary.chmod(0o755)
                os.replace(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return final


def main() -> None:
    """`python -m gear_trainer.demo.warm_start`: build (or find) a warm start, with its report, and print its folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--task", default="mathapi")
    parser.add_argument("--task-args", default="{}", metavar="YAML", help="the task's own, as {steps: 4, spare: 2}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=WarmStartSpec.steps)
    parser.add_argument("--cache", default=None, help="folder of built models (default: $GEAR_CACHE or ~/.cache/gear-kernels)")
    args = parser.parse_args()
    spec = replace(WarmStartSpec(), steps=args.steps)
    print(ensure_warm_start(make_task(args.task, args.seed, parse_yaml(args.task_args)), args.seed, args.cache, spec))


if __name__ == "__main__":
    main()
