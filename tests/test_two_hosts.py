"""A run on two hosts, one rank each, started as on machines without ssh: `deepspeed --no_ssh --hostfile ...` on both.

The hosts are namespaces of this machine: each has its own network (a cable between the two), name and process table. Where a user
may not make those, the two launchers meet on loopback addresses. What ranks of several hosts say of one another is at the end.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from forked_ranks import DEMO, ROOT, free_port

from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.metrics import MEASURED
from gear_trainer.runs.records import records_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = ["rollout.prompts_per_step=2", "rollout.group_size=4", "eval.every=0", "checkpoint.export=false", "train.steps=3"]
UNSHARE = "unshare --net" if os.geteuid() == 0 else "unshare --net --map-root-user"
OWN = "unshare --net --uts --mount --pid --fork --kill-child --mount-proc"
# arguments: host A's command line, then host B's. Each host waits for its end of the cable, and ends with its command's code.
TWO_HOSTS = rf"""
host() {{
    {OWN} sh -c '
        until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
        hostname "$1"; ip link set lo up; ip address add "$2"/24 dev eth0; ip link set eth0 up
        eval "exec $3"' sh "$@" &
}}
here=$(readlink /proc/self/ns/net)
host gear-a 10.77.0.1 "$1"; a=$!
host gear-b 10.77.0.2 "$2"; b=$!
for pid in $a $b; do until [ "$(readlink /proc/$pid/ns/net)" != "$here" ]; do sleep 0.05; done; done
ip link add to-a type veth peer name to-b && ip link set to-a netns $a name eth0 && ip link set to-b netns $b name eth0
wait $a; first=$?; wait $b; echo codes $first $?
"""


@cache
def not_permitted():
    """Why this user cannot have such hosts; empty where it can."""
    trial = f"ip link add to-a type veth peer name to-b && {OWN} true"
    try:
        done = subprocess.run([*UNSHARE.split(), "sh", "-c", trial], capture_output=True, text=True, timeout=60)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def launch(out, hostfile, node, address, port, interface):
    """The command line of one host."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error", "--no_ssh", "--hostfile", str(hostfile)]
    launcher += ["--node_rank", str(node), "--master_addr", address, "--master_port", str(port)]
    run = ["gear_trainer/run.py", "--config", DEMO, "name=two", f"output_dir={out}", *SMALL]
    # gloo takes the address that the host's name has in the DNS: these have none
    return shlex.join(["env", f"GLOO_SOCKET_IFNAME={interface}", *launcher, *run]) + f" > {out}/{node}.log 2>&1"


def finish(command, out):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=1200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    logs = "\n".join((out / f"{node}.log").read_text()[-3000:] for node in (0, 1) if (out / f"{node}.log").exists())
    assert said.strip() == "codes 0 0", said + logs
    return logs


@pytest.fixture(scope="module")
def one_host(server, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    run = server.start(out / "log", "name=one", f"output_dir={out}", *SMALL, OMP_NUM_THREADS="1")
    assert run.wait() == [0, 0], run.text()[-3000:]
    return out / "one"


def same_steps(one, two):
    def figures(run):
        return [{k: v for k, v in step.items() if k not in MEASURED} for step in read_metrics(run / "metrics.jsonl")]

    assert [step["step"] for step in figures(two)] == [1, 2, 3] and figures(two) == figures(one)
    for step in (1, 2, 3):
        assert records_path(two, step).read_bytes() == records_path(one, step).read_bytes(), "token by token"


def beats(out):
    return [json.loads((out / ".two.ranks" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_hosts_in_namespaces_train_as_one_host_does(one_host, tmp_path):
    if why := not_permitted():
        pytest.skip(f"hosts in namespaces are not permitted here: {why}")
    (tmp_path / "hostfile").write_text("gear-a slots=1\ngear-b slots=1\n")
    commands = [launch(tmp_path, tmp_path / "hostfile", node, "10.77.0.1", 29500, "eth0") for node in (0, 1)]
    finish([*UNSHARE.split(), "sh", "-c", TWO_HOSTS, "sh", *commands], tmp_path)
    same_steps(one_host, tmp_path / "two")
    assert [beat["host"] for beat in beats(tmp_path)] == ["gear-a", "gear-b"]


def test_two_launchers_of_one_machine_train_as_one_does(one_host, tmp_path):
    if not not_permitted() and "GEAR_LOOPBACK" not in os.environ:
        pytest.skip("two hosts in namespaces, which are permitted here, show more; GEAR_LOOPBACK=1 runs this as well")
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    port = free_port()
    commands = [launch(tmp_path, tmp_path / "hostfile", node, "127.0.0.1", port, "lo") for node in (0, 1)]
    finish(["sh", "-c", f"({commands[0]}) & a=$!; ({commands[1]}) & b=$!; wait $a; f=$?; wait $b; echo codes $f $?"], tmp_path)
    same_steps(one_host, tmp_path / "two")
    assert [beat["host"] for beat in beats(tmp_path)] == [socket.gethostname()] * 2


# --- what ranks of several hosts say ----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_shared_is_one_line_on_each_host(server, tmp_path):
    """Also where an earlier start left its beats on the second host."""
    stale = tmp_path / "host-1" / ".run.ranks"
    stale.mkdir(parents=True)
    (stale / "rank-0.json").write_text(json.dumps({"pid": 1, "host": "host-0", "started": 0, "ended": None, "run": "old"}))
    run = server.call(tmp_path / "log", "host_ranks:meet_apart", tmp_path, ranks=3, HOSTS="0 1 1")
    assert run.wait(120) == [2, 2, 2], run.text()
    why = (
        "rank 0 on host-0 does not see there what rank 1 on host-1 wrote: name a folder on a file system that all machines share"
    )
    first, second = sorted(run.text().splitlines(), reverse=True)
    assert first.startswith(f"gear_trainer: output_dir={tmp_path}/host-0: {why}"), first
    assert second.startswith(f"[rank 1] gear_trainer: output_dir={tmp_path}/host-1: {why}"), second


def test_what_one_host_alone_finds_wrong_is_said_there(server, tmp_path):
    """Once, by its first rank: rank 0 knows nothing of it, and waits for the others."""
    run = server.call(tmp_path / "log", "host_ranks:wrong_on_one_host", ranks=3, HOSTS="0 1 1")
    assert run.wait(120) == [0, 2, 2] and run.text() == "[rank 1] gear_trainer: model.path=/models/x: not there\n"


def test_a_rank_writes_its_stacks_when_it_is_asked(server, tmp_path):
    run = server.call(tmp_path / "log", "host_ranks:wait_for_ever", tmp_path, 600, ranks=1, HOSTS="0")
    run.until((tmp_path / ".run.ranks" / "waits-0").exists)
    os.kill(run.pids[0], signal.SIGUSR2)
    file = tmp_path / ".run.ranks" / "rank-0.stack"
    run.until(lambda: "in wait_for_ever" in file.read_text() and "in _beat" in file.read_text())
    assert run.codes() == [None]
    run.kill()


def test_a_rank_killed_on_another_host_is_named_by_its_neighbours(server, tmp_path):
    """Rank 0 cannot look for the process; rank 1, on its machine, leaves word. Nothing breaks a connection here, as with NCCL."""
    run = server.call(tmp_path / "log", "host_ranks:wait_for_ever", tmp_path, 600, ranks=3, HOSTS="0 1 1")
    run.until(lambda: len(list((tmp_path / ".run.ranks").glob("waits-*"))) == 3)
    os.kill(run.pids[2], signal.SIGKILL)
    assert run.wait(120) == [1, 1, -9], run.text()
    assert run.text() == f"gear_trainer: rank 2 was killed (pid {run.pids[2]}): --resume goes on from the last checkpoint\n"


def test_the_only_rank_of_another_host_is_named_by_its_silence(server, tmp_path):
    run = server.call(tmp_path / "log", "host_ranks:add_up", tmp_path, 600, HOSTS="0 1")
    run.until(lambda: len(list((tmp_path / ".run.ranks").glob("waits-*"))) == 2)
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait(120) == [1, -9], run.text()
    why = f"rank 1 has been silent for 10 s (pid {run.pids[1]} on host-1)"
    assert run.text() == f"gear_trainer: {why}: --resume goes on from the last checkpoint\n"


def test_a_rank_stopped_on_another_host_leaves_when_it_is_continued(server, tmp_path):
    run = server.call(tmp_path / "log", "host_ranks:wait_for_ever", tmp_path, 12, HOSTS="0 1")
    run.until(lambda: len(list((tmp_path / ".run.ranks").glob("waits-*"))) == 2)
    os.kill(run.pids[1], signal.SIGSTOP)
    run.until(lambda: run.codes()[0] is not None)
    said = run.text()
    assert run.codes() == [1, None] and "rank 1 stands in\n  no answer\n" in said and "in wait_for_ever" in said
    why = f"rank 1 has been silent for 12 s (pid {run.pids[1]} on host-1)"
    assert said.splitlines()[-1] == f"gear_trainer: {why}: --resume goes on from the last checkpoint"
    os.kill(run.pids[1], signal.SIGCONT)
    assert run.wait(120) == [1, 1] and run.text() == said


def test_ranks_that_do_not_meet_are_one_line(server, tmp_path):
    run = server.call(tmp_path / "log", "host_ranks:miss", WORLD_SIZE="2", ranks=1)
    assert run.wait(120) == [1], run.text()
    (line,) = [line for line in run.text().splitlines() if line.startswith("gear_trainer:")]
    assert "the 2 ranks did not meet at 127.0.0.1:" in line and "1/2 clients joined" in line and "DEEPSPEED_TIMEOUT" in line
