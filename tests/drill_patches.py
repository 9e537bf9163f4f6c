"""What a test changes in a run, from inside: each function is called in every rank of tests/forked_ranks.py before it starts."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

from gear_trainer.hints.endpoint import connect
from gear_trainer.policy import checkpoint
from gear_trainer.rollout import vllm_server
from gear_trainer.train.loop import Trainer
from gear_trainer.train.update import Updater


def _die():
    os.killpg(0, signal.SIGKILL)


def kill_at():
    """Kill all ranks at the moment KILL_AT, a point of a save, of the first save that reaches it."""
    if os.environ["RANK"] != "0":
        return
    point = os.environ["KILL_AT"]
    targets = {
        "before the shards": (checkpoint, "_clear_above", "after"),
        "after the shards": (checkpoint, "_finish", "before"),
        "before the manifest": (checkpoint, "write_whole", "before"),
        "after the manifest": (checkpoint, "write_whole", "after"),
        "before latest moves": (checkpoint, "sync_last", "after"),
        "after latest moved": (checkpoint, "_remove", "before"),
        "while pruning": (shutil, "rmtree", "before"),
    }
    owner, name, when = targets[point]
    if name == "sync_last":  # the folder's names are on the disk, the pointer is next
        owner, name = checkpoint, "sync"
        real, wanted = checkpoint.sync, lambda args: args[0].name == "checkpoints"
    else:
        real, wanted = getattr(owner, name), lambda args: True

    def call(*args, **kwargs):
        if when == "before" and wanted(args) and _in_checkpoints(name, args):
            _die()
        result = real(*args, **kwargs)
        if when == "after" and wanted(args):
            _die()
        return result

    setattr(owner, name, call)


def _in_checkpoints(name, args):
    return name != "rmtree" or str(args[0]).endswith(".removing") and os.path.exists(args[0])


def evaluates():
    """Make this process what `gear-trainer evaluate EVALUATE` starts."""
    from gear_trainer import cli, run

    run.main = lambda argv: cli.main(["evaluate", *json.loads(os.environ["EVALUATE"])])


def audits(argv):
    """What `gear-trainer audit ARGV` starts."""
    from gear_trainer import cli

    return cli.main(["audit", *argv])


def nan_loss_on_one_rank():
    """From step 3 on rank 1's surrogate is NaN in value, with a gradient that a clip has stopped."""
    if os.environ["RANK"] != "1":
        return
    policy_loss, update = Updater._policy_loss, Updater.__call__

    def remember(self, number, *rest):
        self.number = number
        return update(self, number, *rest)

    def broken(self, recipe, logprobs, inputs):
        loss, parts = policy_loss(self, recipe, logprobs, inputs)
        return (loss * 0 + float("nan") if self.number >= 3 else loss), parts

    Updater.__call__, Updater._policy_loss = remember, broken


def error_on_one_rank():
    """Rank 1 raises in the update of step 2."""
    if os.environ["RANK"] != "1":
        return
    update = Updater.__call__

    def broken(self, step, *rest):
        if step == 2:
            raise ZeroDivisionError("planted")
        return update(self, step, *rest)

    Updater.__call__ = broken


def nan_weights_before_the_save():
    """The policy's own shard is not finite when the checkpoint of step 2 is due, on rank 1 alone."""
    if os.environ["RANK"] != "1":
        return
    save = checkpoint.save

    def broken(engine, cfg, step, teacher=None):
        if step == 2:
            next(p for p in engine.module.parameters()).ds_tensor.fill_(float("nan"))
        return save(engine, cfg, step, teacher)

    checkpoint.save = broken


def pushes_end():
    """vLLM gets the weights before training and after steps 1 and 2, and none after."""
    push, pushes = Trainer.push, []

    def push_thrice(self):
        pushes.append(1)
        if len(pushes) <= 3:
            push(self)

    Trainer.push = push_thrice


def change_writer():
    """References are the policy's own for two steps and an endpoint's (WRITER_URL) from then on."""
    write = Trainer.write_references

    def changed(self, step, rollouts, sums):
        if step == 3:
            url = os.environ["WRITER_URL"]
            self.references.model = connect(self.cfg.writer.model_copy(update={"url": url, "max_retries": 0}), 1024)
        write(self, step, rollouts, sums)

    Trainer.write_references = changed


def stand_in_server():
    """Rank 0 starts tests/fake_vllm.py in place of vLLM's server; HELD is the file that says when it has begun to hang."""

    def command(cfg, model_path, url):
        where = urlsplit(url)
        return [
            sys.executable,
            str(Path(__file__).with_name("fake_vllm.py")),
            where.hostname,
            str(where.port),
            os.environ["HELD"],
        ]

    vllm_server.command = command
