"""What ranks of several hosts do, for test_two_hosts.py: HOSTS in the environment says which host each rank is on."""

import os
import socket
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gear_trainer import build, cli
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.runs import ranks


def _host():
    host = os.environ["HOSTS"].split()[int(os.environ["RANK"])]
    os.environ["LOCAL_RANK"] = str(os.environ["HOSTS"].split()[: int(os.environ["RANK"])].count(host))
    return f"host-{host}"


def _begin():
    host = _host()
    socket.gethostname = ranks.machine = lambda: host
    dist.init_process_group("gloo")
    return host


def _beats(folder, limit=600.0):
    return ranks.Beats(Path(folder) / "run", dist.get_rank(), dist.get_world_size(), limit).start()


def _waits(folder):
    (Path(folder) / ".run.ranks" / f"waits-{os.environ['RANK']}").touch()


def wrong_on_one_host(_):
    """Host 0 finds nothing wrong with the run, host 1 does."""

    def check():
        if _host() == "host-1":
            raise ConfigError("model.path=/models/x: not there")
        return 0

    return cli._guarded(check)


def meet_apart(argv):
    """Each host has the folder of its name to itself."""
    ranks.SEEN_WITHIN = 3.0
    host = _begin()
    return cli._guarded(lambda: _beats(Path(argv[0]) / host))


def wait_for_ever(argv):
    """In a wait that nothing ends but the beats."""
    _begin()
    _beats(argv[0], float(argv[1]))
    _waits(argv[0])
    threading.Event().wait()


def add_up(argv):
    """In one collective after another."""
    _begin()
    _beats(argv[0], float(argv[1]))
    _waits(argv[0])

    def endless():
        while True:
            dist.all_reduce(torch.zeros(1))

    return cli._guarded(endless)


def miss(_):
    """One of two ranks comes."""
    import deepspeed

    def limited(**_):
        dist.init_process_group("gloo", timeout=timedelta(seconds=2))

    deepspeed.init_distributed = limited
    return cli._guarded(lambda: build._meet(load_config("gear_trainer/configs/mathapi_cpu.yaml", [])))
