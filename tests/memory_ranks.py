"""Measure what a rank of a CPU run really holds, phase by phase, beside its memory plan.

    python tests/memory_ranks.py [--config FILE] [key=value ...]      # the demo, 4 steps, where nothing else is given

Peaks are VmHWM, reset at each phase; blocks of 128 KiB and more are mapped, so that what is freed is gone (glibc would keep it).
"""

import argparse
import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path

M_MMAP_THRESHOLD = -3


def install():
    """The patch of every rank: the peak of each call of a phase is appended to a file of its own."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 128 << 10)
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from gear_trainer.policy.forward import Forward
    from gear_trainer.train import loop
    from gear_trainer.train.sample import StepSampler
    from gear_trainer.train.update import Updater

    tokens = {True: 0, False: 0}
    forward = Forward.__call__

    def counted(self, batch, stats):
        grad = torch.is_grad_enabled()
        tokens[grad] = max(tokens[grad], batch.student.input_ids.numel())
        return forward(self, batch, stats)

    Forward.__call__ = counted
    watched = [(StepSampler, "__call__", "rollout"), (loop, "score", "score"), (Updater, "__call__", "update")]
    watched += [(loop.Trainer, "push", "push"), (DeepSpeedEngine, "step", "step")]
    for owner, name, phase in watched:
        setattr(owner, name, _watched(getattr(owner, name), phase, tokens))


def _watched(call, phase, tokens):
    def watched(*args, **kwargs):
        before = _peak()  # of an outer phase so far: a step lies inside an update
        Path("/proc/self/clear_refs").write_text("5")
        try:
            return call(*args, **kwargs)
        finally:
            peak = _peak()
            with open(f"{os.environ['GEAR_PEAKS']}.{os.environ['RANK']}", "a") as file:
                outer = before if phase == "step" else None
                file.write(json.dumps({"phase": phase, "peak": peak, "outer": outer, "tokens": tokens[True]}) + "\n")

    return watched


def _peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def measured(file):
    """Peak bytes by phase, an update's without its optimizer's step; and the most tokens of a forward with gradients."""
    peaks, tokens = {}, 0
    for row in map(json.loads, file.read_text().splitlines()):
        if row["phase"] != "update":
            peaks[row["phase"]] = max(peaks.get(row["phase"], 0), row["peak"])
        if row["outer"]:
            peaks["update"] = max(peaks.get("update", 0), row["outer"])
        tokens = max(tokens, row["tokens"])
    return peaks, tokens


def main():
    from forked_ranks import DEMO, ROOT, Server

    from gear_trainer.build import resolve_model_path
    from gear_trainer.config import load_config
    from gear_trainer.policy.hub import model_sizes
    from gear_trainer.preflight import memory
    from gear_trainer.preflight.checks import check_prompts, lengths
    from gear_trainer.recipe import resolve
    from gear_trainer.rollout.chat import Chat
    from gear_trainer.tasks import make_task

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=DEMO)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        short = ["train.steps=4", "eval.every=0", "checkpoint.export=false", f"output_dir={folder}", *args.overrides]
        cfg = load_config(ROOT / args.config, short)
        server, peaks = Server(), Path(folder) / "peaks"
        log = Path(folder) / "log"
        run = server.start(
            log, "--config", args.config, *short, patch="memory_ranks:install", ranks=cfg.world_size, GEAR_PEAKS=str(peaks)
        )
        codes = run.wait(3000)
        server.close()
        assert codes == [0] * cfg.world_size, log.read_text()[-3000:]
        found, tokens = measured(peaks.with_suffix(".0"))
    from transformers import AutoTokenizer

    task, recipe = make_task(cfg.task, cfg.seed, cfg.task_args), resolve(cfg)
    chat = Chat(AutoTokenizer.from_pretrained(resolve_model_path(cfg, task)), task.tools, cfg.chat_template_args)
    prompts = check_prompts(cfg, task, recipe, chat)
    planner = memory.Planner(cfg, recipe, model_sizes(cfg.model.path), *lengths(cfg, task, prompts))
    fewer = load_config(ROOT / args.config, [*short, f"train.tokens_per_micro_batch={max(tokens, cfg.rollout.max_model_len)}"])
    plan, as_run = (planner.plan(c, memory.card(c)) for c in (cfg, fewer))
    print(f"MiB a rank; the largest forward with gradients had {tokens} tokens, the plan takes {planner.tokens(cfg)}")
    for phase in (p for p in memory.PHASES if p in found):
        sizes = [size / memory.MIB for size in (plan.total(phase), as_run.total(phase), found[phase])]
        print(f"{phase:8}  planned {sizes[0]:7.0f}, for those tokens {sizes[1]:7.0f}  measured {sizes[2]:7.0f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
