"""Ranks without a launcher, each run forked off one process that has imported everything: of a rank's start that is 20 of 24 s.

As a script it is that process: a line of JSON on its input starts a run or asks how one ended, a line on its output answers.
"""

import contextlib
import gc
import importlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = "gear_trainer/configs/mathapi_cpu.yaml"


class Ranks:
    """One run's processes: `pids` by rank, in a process group of their own; `log` holds what they print."""

    def __init__(self, server, pids, log):
        self.server, self.pids, self.log = server, pids, log

    def kill(self, number=signal.SIGKILL):
        os.killpg(self.pids[0], number)

    def codes(self):
        """Exit codes by rank, negative for a signal, None of those that go on."""
        return self.server.ask({"codes": self.pids})

    def wait(self, seconds=600):
        deadline = time.monotonic() + seconds
        while None in (codes := self.codes()):
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {codes}\n{self.log.read_text()[-6000:]}")
            time.sleep(0.1)
        return codes

    def until(self, condition, seconds=600):
        """Wait for what the test waits for, to some milliseconds; the run must not end before."""
        deadline, looked = time.monotonic() + seconds, 0.0
        while not condition():
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                assert None in self.codes() and looked < deadline, self.log.read_text()[-6000:]
            time.sleep(0.003)

    def text(self):
        return self.log.read_text()


class Server:
    """The process that runs are forked off."""

    def __init__(self):
        threads = str(max(1, (os.cpu_count() or 1) // 2))  # what two ranks under a launcher take
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, log, *argv, patch=None, ranks=2, **environment):
        """Fork a run of the trainer; `patch`: `module:function` of tests/, called in every rank before it starts."""
        return self._ranks(log, "gear_trainer.run:main", ["--config", DEMO, *argv], patch, ranks, environment)

    def call(self, log, function, *argv, ranks=2, **environment):
        """Fork ranks that call `function`, `module:name` of tests/, with a list of texts; it returns an exit code or None."""
        return self._ranks(log, function, [str(text) for text in argv], None, ranks, environment)

    def _ranks(self, log, function, argv, patch, ranks, environment):
        order = {"function": function, "argv": argv, "patch": patch, "ranks": ranks, "environment": environment}
        return Ranks(self, self.ask({**order, "log": str(log), "port": free_port()}), log)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def free_port():
    """A port that nobody listens on, for the ranks of a run to meet at some seconds later. The system hands none of these to
    those who ask for any port, as the ranks of a run beside this one do.
    """
    while True:
        with contextlib.suppress(OSError), socket.create_server(("", 20000 + secrets.randbelow(10000))) as taken:
            return taken.getsockname()[1]


def _serve():
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm

    vllm.LLM, vllm.SamplingParams  # noqa: B018  (the package loads them when they are asked for)
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import gear_trainer.build
    import gear_trainer.preflight.memory
    import gear_trainer.report.build
    import gear_trainer.run
    import gear_trainer.train.loop  # noqa: F401

    gc.collect()
    gc.freeze()  # vLLM's start and end collect eight times: half a second each over what was imported here

    codes = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "codes" in question:
            _reap(codes)
            answer = [codes.get(pid) for pid in question["codes"]]
        else:
            answer = [_fork(question, rank) for rank in range(question["ranks"])]
            for pid in answer:
                os.setpgid(pid, answer[0])
        print(json.dumps(answer), file=answers, flush=True)


def _reap(codes):
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        codes[pid] = os.waitstatus_to_exitcode(status)


def _fork(question, rank):
    pid = os.fork()
    if pid:
        return pid
    out = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(old, new)
    world = str(question["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(question["port"])} | question["environment"]
    code = 1
    try:
        if question["patch"]:
            _named(question["patch"])()
        code = _named(question["function"])(question["argv"]) or 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _named(reference):
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    _serve()
