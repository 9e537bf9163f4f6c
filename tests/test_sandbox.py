"""The sandbox under attack, by each means that this machine has: nothing is read, nothing gets out, nothing is left running.

An attack is code that prints GOT where it got what it wanted. How it may end is stated with it; limits end it soon.
"""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gear_trainer.sandbox import MEANS, Limits, SandboxError, choice, open_sandbox
from gear_trainer.sandbox.means import RLimits
from gear_trainer.sandbox.syscalls import MACHINES, seccomp_filter
from gear_trainer.tasks.base import Episode, Outcome, Reply, TaskError
from gear_trainer.tasks.math import python_tool
from gear_trainer.tasks.math.python_tool import PythonEpisode, PythonTool
from gear_trainer.tasks.tool_calls import call_turn

pytestmark = pytest.mark.skipif(os.uname().sysname != "Linux", reason="the sandbox is Linux's")
QUICK = Limits(seconds=0.4, memory=256 << 20)
SECRET = "gold answer 271828"
NUMBERS = platform.machine() == "x86_64"  # the attacks by number are that machine's

# Before each attack: who the run is, what it would like to keep, and system calls by number (x86-64's).
BEFORE = """
import os, sys, ctypes, signal, socket, struct
RUN, CANARY, FOLDER, ABSTRACT, PORT, PACKAGE = {targets}
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = libc.syscall(number, *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def got(what=""):
    print("GOT", what, flush=True)
"""

PROCESSES = {
    "fork": "os.fork(); got()",
    "fork bomb": "while True:\n    try: os.fork(); got()\n    except OSError: pass",
    "double fork into the background": "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    got()",
    "vfork by number": "call(58); got()",
    "clone by number": "call(56, 17, 0, 0, 0, 0); got()",
    "clone3": "call(435, b'\\0' * 64, 64); got()",
    "a thread": "import threading; threading.Thread(target=got).start()",
    "a bomb of threads": "import _thread\nwhile True:\n    try: _thread.start_new_thread(got, ())\n    except RuntimeError: pass",
    "subprocess": "import subprocess; got(subprocess.run([sys.executable, '-c', 'print(1)']))",
    "os.system": "os.system('true') == 0 and got()",
    "posix_spawn": "os.posix_spawn('/proc/self/exe', ['x'], {}); got()",
    "exec": "os.execv(sys.executable, [sys.executable, '-c', 'print(\"GOT\")'])",
    "multiprocessing": "import multiprocessing as m; p = m.get_context('fork').Process(target=got); p.start(); p.join()",
    "zombies": "pids = [os.fork() for _ in range(100)]; got(pids)",
    "a session of its own": "os.setsid(); got()",
    "a process group of its own": "os.setpgid(0, 0); got()",
}
SPENDING = {
    "a long string": ("x = 'a' * (4 << 30); got()", {"memory"}),
    "a list that grows": ("x = [0]\nwhile True: x += x", {"memory"}),
    "mapped memory": ("import mmap\nm = [mmap.mmap(-1, 1 << 28) for _ in range(64)]; got()", {"error", "memory"}),
    "memory in a file without a name": ("f = os.memfd_create('x'); os.write(f, b'x' * 100); got()", {"error"}),
    "shared memory": ("from multiprocessing.shared_memory import SharedMemory as S; S('x', True, 1 << 20); got()", {"error"}),
    "System V shared memory": ("call(29, 0, 1 << 20, 0o1600); got()", {"error"}),
    "locked memory": ("libc.mlockall(3) == 0 and got()", {"done"}),
    "pipes full of data": (
        "n = 0\ntry:\n    while True:\n        r, w = os.pipe(); os.set_blocking(w, False)\n"
        "        n += os.write(w, b'x' * 65536)\n"
        "except OSError: pass\nn > 64 << 20 and got()",
        {"done"},
    ),
    "many descriptors": ("n = 0\ntry:\n    while True: n = os.dup(1)\nexcept OSError: pass\nn > 100 and got()", {"done"}),
    "a loop": ("while True: pass", {"time"}),
    "a number too large": ("x = 9**9**9", {"time", "memory"}),
    "a regular expression that explodes": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", {"time"}),
    "sleep": ("import time; time.sleep(1e6)", {"time"}),
    "sleep with nothing to print to": ("os.close(1); os.close(2); import time; time.sleep(1e6)", {"time"}),
    "a flood of output": ("while True: print('x' * 1000)", {"output"}),
    "a flood of errors": ("while True: os.write(2, b'x' * 65536)", {"output"}),
    "one endless line": ("while True: sys.stdout.write('x')", {"output", "time"}),
    "a recursion without end": ("def f(): f()\nf()", {"error"}),
    "nested brackets": ("eval('(' * 100000)", {"error", "memory", "killed"}),
    "a raised limit": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); got()", {"error"}),
}
SOCKETS = {
    "TCP": "socket.create_connection(('127.0.0.1', PORT), 1); got()",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)); got()",
    "IPv6": "socket.socket(socket.AF_INET6); got()",
    "a server": "s = socket.socket(); s.bind(('', 0)); s.listen(); got()",
    "Unix sockets": "socket.socket(socket.AF_UNIX); got()",
    "an abstract Unix socket of the run": "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + ABSTRACT); got()",
    "a pair of sockets": "socket.socketpair(); got()",
    "netlink": "socket.socket(16, socket.SOCK_RAW, 0); got()",
    "packets": "socket.socket(17, socket.SOCK_RAW, 0); got()",
    "raw IP": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); got()",
    "the hypervisor": "socket.socket(40, socket.SOCK_STREAM); got()",
    "the kernel's ciphers": "socket.socket(38, socket.SOCK_SEQPACKET); got()",
    "every other family": "for f in range(64):\n    try: socket.socket(f); got(f)\n    except OSError: pass",
    "a host name": "socket.getaddrinfo('localhost', 80, socket.AF_INET, socket.SOCK_STREAM) and socket.socket(); got()",
    "a web page": "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=1); got()",
    "io_uring": "call(425, 8, b'\\0' * 120); got()",
}
READING = {
    "the answers": "got(open(CANARY).read())",
    "the answers by libc": "f = libc.open(CANARY.encode(), 0); f >= 0 and got(os.read(f, 99))",
    "the answers by openat2": "f = call(437, -100, CANARY.encode(), bytes(24), 24); got(os.read(f, 99))",
    "the answers by a way round": "got(open('/usr/lib/../..' + CANARY).read())",
    "the answers by the old root": "os.chdir(FOLDER); got(open('canary').read())",
    "the answers by a link": "os.symlink(CANARY, '/tmp/link'); got(open('/tmp/link').read())",
    "the answers by a hard link": "os.link(CANARY, FOLDER + '/other'); got()",
    "the answers by a handle": "call(303, -100, CANARY.encode(), b'\\x80' + bytes(200), bytes(8), 0); got()",
    "the answers mapped": "import mmap; f = open(CANARY); got(mmap.mmap(f.fileno(), 0, prot=1)[:])",
    "the answers through /proc/<run>/root": "got(open(f'/proc/{RUN}/root{CANARY}').read())",
    "the answers through a descriptor": "import glob\nfor f in glob.glob(f'/proc/{RUN}/fd/*'): got(os.readlink(f))",
    "the folder of the answers": "got(os.listdir(FOLDER))",
    "the root of the file system": "set(os.listdir('/')) >= {'root', 'var'} and got()",
    "the password file": "got(open('/etc/passwd').read())",
    "the host's name": "got(open('/etc/hostname').read())",
    "the environment of the run": "got(open(f'/proc/{RUN}/environ').read())",
    "its own environment": "any(k in os.environ for k in ('GEAR_DATA', 'SANDBOX_SECRET', 'PATH')) and got(dict(os.environ))",
    "its own environment by libc": "libc.getenv.restype = ctypes.c_char_p; v = libc.getenv(b'SANDBOX_SECRET'); v and got(v)",
    "the memory of the run": "got(open(f'/proc/{RUN}/mem', 'rb').seek(0))",
    "the memory of the warm process": "got(open(f'/proc/{os.getppid()}/mem', 'rb').seek(0))",
    "memory by process_vm_readv": "call(310, os.getppid(), b'\\0' * 16, 1, b'\\0' * 16, 1, 0); got()",
    "the command lines": "import glob\nfor f in glob.glob('/proc/[0-9]*/cmdline'): got(open(f).read())",
    "installed packages with answers": "import bfcl_eval; got(bfcl_eval.__file__)",
    "the trainer's modules": "import gear_trainer; got()",
    "the folder that the trainer runs in": "got(open('pyproject.toml').read())",
    "a file of an installed package": "got(open(PACKAGE).read())",
    "open descriptors": "import stat\nfor f in range(3, 4096):\n    try: got(os.fstat(f))\n    except OSError: pass",
    "the warm process's requests": "got(os.read(3, 10))",
    "its input": "got(sys.stdin.read()) if sys.stdin.read() else None",
    "kernel messages": "libc.klogctl(3, b'\\0' * 100, 100) >= 0 and got()",
    "events in the folder": "call(294, 0); got()",
}
SIGNALS = {
    "the run is there": "os.kill(RUN, 0); got()",
    "end the run": "os.kill(RUN, signal.SIGTERM); got()",
    "end everything": "os.kill(-1, signal.SIGKILL); got()",
    "end the group": "os.killpg(0, signal.SIGKILL); got()",
    "end the warm process": "os.kill(os.getppid(), signal.SIGKILL); got()",
    "end it by a thread's number": "call(200, RUN, 15); got()",
    "queue a signal": "call(129, RUN, 15, b'\\0' * 128); got()",
    "a signal by pidfd": "f = os.pidfd_open(RUN); signal.pidfd_send_signal(f, 0); got()",
    "a signal by SIGIO": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, RUN); got()",
    "the run's limits": "import resource; resource.prlimit(RUN, resource.RLIMIT_CPU, (1, 1)); got()",
    "the run's priority": "os.setpriority(os.PRIO_PROCESS, RUN, 19); got()",
    "the run's cores": "os.sched_setaffinity(RUN, {0}); got()",
    "trace the run": "libc.ptrace(16, RUN, 0, 0) == 0 and got()",
    "trace the warm process": "libc.ptrace(16, os.getppid(), 0, 0) == 0 and got()",
    "be traced": "libc.ptrace(0, 0, 0, 0) == 0 and got()",
    "its own abort": "os.abort()",
    "a crash": "ctypes.string_at(0)",
    "a stack that overflows": "sys.setrecursionlimit(10**9)\nimport json\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
}
STUBBORN = {
    "every signal ignored": (
        "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    ),
    "every signal blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n",
    "an alarm that fires all the time": "signal.signal(14, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)\n",
    "an end that is caught": "import atexit; atexit.register(lambda: [0 for _ in iter(int, 1)])\n",
}
FILES = {
    "a huge file": "open('/tmp/huge', 'wb').truncate(1 << 40); got()",
    "a file where it stands": "open('here', 'w').write('x'); got()",
    "a file in memory": "open('/dev/shm/x', 'w').write('x'); got()",
    "a file among the run's": "open(FOLDER + '/new', 'w').write('x'); got()",
    "other answers": "open(CANARY, 'w').write('x'); got()",
    "longer answers": "os.truncate(CANARY, 1 << 30); got()",
    "no answers": "os.unlink(CANARY); got()",
    "moved answers": "os.rename(CANARY, CANARY + '2'); got()",
    "answers for everybody": "os.chmod(CANARY, 0o777); got()",
    "another sympy": "import sympy; open(sympy.__file__, 'a').write('#'); got()",
    "a folder": "os.mkdir('/tmp/folder'); got()",
    "a fifo": "os.mkfifo('/tmp/fifo'); got()",
    "a device": "os.mknod('/tmp/device', 0o60666, 8 << 8); got()",
    "a mount": "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 and got()",
    "another root": "os.chroot('/tmp'); got()",
    "another user": "os.setresuid(1, 1, 1) or got()",
    "a user namespace": "call(272, 0x10000000); got()",
    "the namespace of the run": "call(308, os.open(f'/proc/{RUN}/ns/net', 0), 0); got()",
    "keys": "call(250, 0, -3, 1); got()",
    "a program in the kernel": "call(321, 0, b'\\0' * 64, 64); got()",
    "counters": "call(298, b'\\0' * 128, 0, -1, -1, 0); got()",
    "faults in user space": "call(323, 0); got()",
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); got()",
    "another host's name": "socket.sethostname('x'); got()",
    "an end of the machine": "libc.reboot(0) == 0 and got()",
    "no filter": "libc.prctl(22, 0, 0, 0, 0) == 0 and got()",
    "the second table of calls": "call(0x40000000 | 57); got()",
    "the calls of 32-bit machines": (  # fork by its old number and interrupt
        "import mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(b'\\xb8\\2\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\nctypes.CFUNCTYPE(ctypes.c_int)(at)() >= 0 and got()"
    ),
}


# --- by each means ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sandlock", "bwrap"])
def sandbox(request):
    """A sandbox of two calls at a time, nothing imported; skipped with the reason where the means does not hold here."""
    os.environ["SANDBOX_SECRET"] = SECRET
    try:
        opened = open_sandbox(request.param, size=2, warm="")
    except SandboxError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()
    assert not await_none(opened), "processes are left after the close"


@pytest.fixture(scope="module")
def attack(sandbox, tmp_path_factory):
    """Runs an attack and looks at what it must not have touched: the answers, the processes, the sockets."""
    folder = tmp_path_factory.mktemp("run")
    canary = folder / "canary"
    canary.write_text(SECRET)
    abstract = f"run-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + abstract)
        for server in (tcp, unix):
            server.listen()
            server.setblocking(False)
        targets = (os.getpid(), str(canary), str(folder), abstract, tcp.getsockname()[1], pytest.__file__)
        state = [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)]

        def run(code, limits=QUICK):
            sandbox.run("pass")
            before = processes(sandbox)
            result = sandbox.run(BEFORE.replace("{targets}", repr(targets)) + code, limits)
            assert "GOT" not in result.text and SECRET not in result.text, result
            assert canary.read_text() == SECRET and os.listdir(folder) == ["canary"]
            assert processes(sandbox) == before, "something is left running, or the warm process was lost"
            assert state == [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)]
            for server in (tcp, unix):
                with pytest.raises(BlockingIOError):
                    server.accept()
            return result

        yield run


def processes(sandbox):
    """The numbers of all processes on the machine that belong to a sandbox: its folder stands in their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if (
                    os.fsencode(sandbox.folder) in (entry / "cmdline").read_bytes()
                    and "State:\tZ" not in (entry / "status").read_text()
                ):
                    found.add(int(entry.name))
    return found


def await_none(sandbox):
    """The processes of a sandbox, once there are none or the kernel had time to clear them away."""
    deadline = time.monotonic() + 30
    while (left := processes(sandbox)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def cases(attacks):
    return [
        pytest.param(code, id=name, marks=[] if NUMBERS or "call(" not in code else pytest.mark.skip("x86-64's"))
        for name, code in attacks.items()
    ]


@pytest.mark.parametrize("code", cases(PROCESSES | SOCKETS | READING | SIGNALS | FILES))
def test_an_attack_gets_nothing(attack, code):
    assert attack(code).end in ("error", "killed", "done", "time"), "only loops of the attacks themselves run out of time"


@pytest.mark.parametrize(("code", "ends"), [pytest.param(*case, id=name) for name, case in SPENDING.items()])
def test_spending_ends_at_a_limit(attack, code, ends):
    result = attack(code, QUICK if "time" in ends else replace(QUICK, seconds=30.0))
    assert result.end in ends, result
    assert len(result.text.encode()) <= QUICK.output


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in STUBBORN.items()])
def test_no_signal_game_outlives_the_limit(attack, code):
    assert attack(code + "while True: pass").end == "time"


def test_there_are_more_than_forty_attacks():
    assert len(PROCESSES | SPENDING | SOCKETS | READING | SIGNALS | STUBBORN | FILES) >= 40


def test_a_call_knows_nothing_of_the_one_before(sandbox):
    first = sandbox.run("import builtins, math, random; builtins.left = math.left = 1; random.random()")
    second = sandbox.run(
        "import builtins, math, random; assert not hasattr(builtins, 'left') and not hasattr(math, 'left'); random.random()"
    )
    assert (first.end, second.end) == ("done", "done") and first.text == second.text  # and what it draws is the same each time


def test_what_a_call_prints_comes_back(sandbox):
    assert sandbox.run("print('a'); import sys; print('b', file=sys.stderr)\n1 + 1").text == "a\nb\n2\n"
    assert sandbox.run("x = 1\nx / 0").text == "line 2: ZeroDivisionError: division by zero\n"
    assert sandbox.run("x = (").end == "error" and sandbox.run("exit(3)").end == "error" and sandbox.run("exit()").end == "done"
    assert sandbox.run("'\\ud800 é'; print('\\ud800 é')").text == "\\ud800 é\n"
    assert sandbox.run("").text == "" and sandbox.run("x = '\ud800'").end in ("done", "error")
    assert sandbox.run("print('x' * 99, end='')", Limits(output=99)).end == "done"
    assert sandbox.run("print('x' * 99)", Limits(output=99)).end == "output"


def test_the_libraries_are_there(sandbox):
    assert sandbox.run("import sympy; print(sympy.Rational(1, 3) + 1)", Limits(seconds=60)).text == "4/3\n"


def test_calls_run_beside_each_other_on_no_more_processes_than_asked_for(sandbox):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: sandbox.run(f"print({i} ** 2)", Limits(seconds=60)).text, range(40)))
    assert found == [f"{i**2}\n" for i in range(40)] and len(sandbox.pids()) <= 2


def test_a_lost_process_is_replaced(sandbox):
    sandbox.run("pass")
    lost = sandbox.restarts
    for pid in sandbox.pids():
        os.kill(pid, signal.SIGKILL)
    assert sandbox.run("print(1)").text == "1\n"
    assert sandbox.restarts >= lost and set(processes(sandbox))


def test_processes_lost_together_cost_a_call_one_attempt(sandbox):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(sandbox.run, ["import time; time.sleep(1)"] * 2))
    assert len(sandbox.pids()) == 2
    for warm in sandbox._all:
        warm.process.stdin.close()  # lost, and for a moment still alive to whoever asks
    assert sandbox.run("print(1)").text == "1\n"


@pytest.mark.parametrize("means", ["sandlock", "bwrap"])
def test_nothing_outlives_a_run_that_is_killed(means):
    code = f"""
        import threading, time
        from gear_trainer.sandbox import Limits, open_sandbox
        sandbox = open_sandbox({means!r}, size=1, warm="")
        threading.Thread(target=sandbox.run, args=("while True: pass", Limits(seconds=1000))).start()
        time.sleep(0.5)
        print(sandbox.folder, flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        folder = run.stdout.readline().strip()
        if not folder:
            pytest.skip(run.stderr.read())
        try:
            left = type("Sandbox", (), {"folder": folder})
            assert len(processes(left)) >= 2
        finally:
            run.kill()
        assert not await_none(left)
        shutil.rmtree(folder)  # what a killed run leaves: a folder of links


# --- which means --------------------------------------------------------------------------------------------------------------


def test_without_any_means_the_run_refuses_and_says_why(monkeypatch):
    for name in choice.AUTO:
        monkeypatch.setattr(type(MEANS[name]), "missing", lambda self: f"no {self.name} here")
    with pytest.raises(SandboxError, match=r"sandlock: no sandlock here; bwrap: no bwrap here.*sandbox=rlimits.*the answers too"):
        open_sandbox()
    monkeypatch.setattr(python_tool, "shared_sandbox", choice.shared_sandbox.__wrapped__)  # none that was opened before
    with pytest.raises(TaskError, match="no sandbox holds"):
        PythonTool(3, "auto")


def test_a_means_that_leaks_is_refused_by_its_trial(monkeypatch):
    """Planted: rlimits that claims to hide files."""
    monkeypatch.setattr(RLimits, "hides_files", True)
    with pytest.raises(SandboxError, match="code in it reads a file of the run"):
        open_sandbox("rlimits", warm="")


def test_a_warm_process_that_breaks_at_its_start_says_why():
    with pytest.raises(SandboxError, match="rlimits: .*ZeroDivisionError"):
        open_sandbox("rlimits", warm="1 / 0")


def test_a_run_waits_longer_for_its_first_process_than_a_call_does(monkeypatch):
    monkeypatch.setattr(choice, "START_LIMIT", 0.0)  # in which nothing starts
    opened = open_sandbox("rlimits", size=1, warm="")
    try:
        assert opened.run("print(6 * 7)").text == "42\n"
        opened._end_idle()
        with pytest.raises(SandboxError, match="no answer in time"):
            opened.run("print(6 * 7)")
    finally:
        opened.close()


def test_rlimits_on_request_hold_all_but_files(interpreter, tmp_path):
    (tmp_path / "canary").write_text(SECRET)
    assert interpreter.run(f"print(open('{tmp_path}/canary').read())").text == SECRET + "\n"
    for code in (
        f"open('{tmp_path}/canary', 'w')",
        "import socket; socket.socket()",
        "import os; os.fork()",
        f"import os; os.kill({os.getpid()}, 9)",
    ):
        assert "PermissionError" in interpreter.run(code).text
    assert interpreter.run("while True: pass", QUICK).end == "time"


def test_unknown_names_and_limits_are_refused():
    with pytest.raises(SandboxError, match="'docker' is none of auto, sandlock, bwrap, rlimits"):
        open_sandbox("docker")
    with pytest.raises(ValueError, match="seconds: 0 must be above 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="riscv64: known are x86_64, aarch64"):
        seccomp_filter("riscv64")


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_allows_no_call_that_starts_or_reaches_anything(machine):
    _, numbers = MACHINES[machine]
    assert len(seccomp_filter(machine)) % 8 == 0 and len(set(numbers.values())) == len(numbers)
    refused = "fork vfork clone clone3 execve execveat socket connect kill tgkill ptrace setsid unlink mount bpf memfd_create"
    assert not set(numbers) & set(refused.split())


# --- the tool -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreter():
    """The tool behaves alike under each means; this one is everywhere."""
    opened = open_sandbox("rlimits", size=2, warm="")
    yield opened
    opened.close()


class Answers(Episode):
    """The inner episode: one turn, right where it says 4."""

    said = None

    def step(self, text):
        self.said = text
        return Reply()

    def outcome(self, end):
        return Outcome(float(self.said == "4"), self.said == "4", {"no_answer": float(self.said is None)})


def test_a_rollout_calls_and_answers(interpreter):
    episode = PythonEpisode(Answers(), interpreter, 3)
    reply = episode.step("I compute.\n" + call_turn("python", {"code": "print(2 + 2)"}))
    assert [(m.role, m.content) for m in reply.messages] == [("tool", "4")] and (reply.calls, reply.errors) == (1, 0)
    assert not episode.step("4").messages
    outcome = episode.outcome("done")
    assert outcome.success and outcome.metrics["python_calls"] == 1 and outcome.metrics["python_error"] == 0


def test_calls_that_go_wrong_are_answered_and_counted(interpreter):
    episode = PythonEpisode(Answers(), interpreter, 2)
    turns = {
        "<tool_call>\n{": "error: the tool_call block is not closed",
        call_turn("shell", {"code": "x"}): "error: unknown tool; use python",
        call_turn("python", {"source": "x"}): "error: the argument is code, a string",
        call_turn("python", {"code": 1}): "error: the argument is code, a string",
        call_turn("python", {"code": "1/0"}): "line 1: ZeroDivisionError: division by zero",
        call_turn("python", {"code": "x = 1"}): "(no output)",
        call_turn("python", {"code": "print(1)"}): "error: no calls are left; give the final answer",
    }
    for turn, answer in turns.items():
        reply = episode.step(turn)
        assert [m.content for m in reply.messages] == [answer] and reply.errors == (answer != "(no output)")
    outcome = episode.outcome("turns")
    assert not outcome.success and outcome.metrics["no_answer"] == 1
    assert {name: n for name, n in outcome.metrics.items() if n} == {
        "no_answer": 1,
        "python_calls": 7,
        "python_error": 1,
        "python_refused": 5,
    }


def test_why_a_call_was_stopped_is_said(interpreter):
    limits = replace(QUICK, seconds=30.0)
    for code, said in {
        "while True: print('x')": "cut and stopped: more than 4096 bytes of output",
        "x = 'x' * (4 << 30)": "MemoryError\nstopped: more than 256 MiB of memory",
    }.items():
        assert python_tool.shown(interpreter.run(code, limits), limits).endswith(said)


def test_a_mathematics_task_with_the_tool(interpreter, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    from gear_trainer.tasks import make_task

    for name, a in (("train", 2), ("test", 3)):
        row = f'{{"problem": "What is {a} + {a}?", "solution": "It is \\\\boxed{{{2 * a}}}."}}'
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    files = {"path": str(tmp_path / "train.jsonl"), "held_out_path": str(tmp_path / "test.jsonl")}
    plain = make_task("math", 0, files)
    assert plain.tools is None and (plain.max_turns, plain.concurrency) == (1, 1)
    monkeypatch.setattr(python_tool, "shared_sandbox", lambda choice, limits: interpreter)
    task = make_task("math", 0, files | {"tool": "python"})
    assert [tool["function"]["name"] for tool in task.tools] == ["python"] and task.max_turns == 4 and task.concurrency >= 1
    episode = task.episode(task.train_problem(0))
    assert episode.step(call_turn("python", {"code": "2 + 2"})).messages[0].content == "4"
    assert not episode.step("So \\boxed{4}.").messages and episode.outcome("done").success
    for wrong, said in ({"tool": "bash"}, "tool: 'bash'"), ({"tool": "python", "tool_calls": 0}, "tool_calls: 0"):
        with pytest.raises(TaskError, match=said):
            make_task("math", 0, files | wrong)
