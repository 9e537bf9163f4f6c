"""The means that hold on this machine, and how fast they are: `python -m gear_trainer.sandbox`."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from gear_trainer.sandbox.choice import cores, open_sandbox
from gear_trainer.sandbox.interpreter import Limits, Sandbox, SandboxError
from gear_trainer.sandbox.means import MEANS

_CALLS = {
    "print": "print(2**10)",
    "sympy": "import sympy\nx = sympy.symbols('x')\nprint(sympy.solve(x**2 - 5 * x + 6, x))",
}
_REPEATS = 60
_LONG = Limits(seconds=60.0)


def measured(sandbox: Sandbox) -> str:
    """Milliseconds of a call, one at a time, and calls a second on all cores: of print, and of sympy's solve."""
    told: list[str] = []
    for name, code in _CALLS.items():
        times = [_seconds(sandbox, code) for _ in range(_REPEATS)]
        with ThreadPoolExecutor(sandbox.size) as pool:
            began = time.perf_counter()
            list(pool.map(lambda _, code=code: sandbox.run(code, _LONG), range(_REPEATS)))
            rate = _REPEATS / (time.perf_counter() - began)
        told.append(f"{name} {1000 * statistics.median(times):.1f} ms, {rate:.0f} calls/s on {sandbox.size}")
    return "; ".join(told)


def _seconds(sandbox: Sandbox, code: str) -> float:
    began = time.perf_counter()
    sandbox.run(code, _LONG)
    return time.perf_counter() - began


def main() -> None:
    """Open each means, warm and cold; one that does not hold says why."""
    for name in MEANS:
        try:
            began = time.perf_counter()
            sandbox = open_sandbox(name, size=cores())
            start = time.perf_counter() - began
            list(ThreadPoolExecutor(sandbox.size).map(lambda _, box=sandbox: box.run("1", _LONG), range(2 * sandbox.size)))
            print(f"{name}: starts in {start:.1f} s; warm: {measured(sandbox)}", flush=True)
            sandbox.close()
            sandbox = open_sandbox(name, size=1, warm="")
            print(f"{name}: cold: sympy {_seconds(sandbox, _CALLS['sympy']):.2f} s a call", flush=True)
            sandbox.close()
        except SandboxError as error:
            print(error)


if __name__ == "__main__":
    main()
