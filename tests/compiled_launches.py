"""What reaches the driver when linear_token_stats runs as on a GPU: printed as JSON by a process in which Triton compiles.

(The tests' own process has the kernels in Triton's interpreter.) The real operator and the real compiler, meta tensors, products
that do nothing; a launch is noted where Triton would hand it to the driver. student alone, 2500 rows: two parts of each block of
columns, and a ragged last block.
"""

import json
from unittest import mock

from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.gates import host_time


def launches(past_triton: bool) -> tuple[list, list, dict]:
    """(kernels that were asked of Triton, every launch, the kernels' intermediate code by name) of one forward."""
    asked, launched, code, run = [], [], {}, JITFunction.run

    def counted(self, *arguments, **options):
        found = run(self, *arguments, **options)
        asked.append(self.__name__)
        return found

    def no_handles(kernel):
        kernel.module = kernel.function = 0
        code[kernel.metadata.name] = kernel.asm["ttir"]
        kernel._run = lambda *given: launched.append((kernel.metadata.name, kernel.hash, str(given[:3]), str(given[9:])))

    with host_time.stubbed(), mock.patch.object(JITFunction, "run", counted):
        call = host_time.linear(4096, rows=2500, columns=2048 * 3 + 640)
        with mock.patch.object(CompiledKernel, "_init_handles", no_handles):
            if past_triton:
                call.forward()
            else:
                with mock.patch("gear_kernels.triton.stats._aligned", lambda tensors: False):
                    call.forward()
    return asked, launched, code


def loads(code: str) -> dict[str, int]:
    """Loads of vectors and of scalars, behind the first reduction and in all."""
    found, late = dict.fromkeys(("vectors", "scalars", "late vectors", "late scalars"), 0), False
    for line in code.splitlines():
        late = late or "tt.reduce" in line
        if "tt.load" in line:
            kind = "vectors" if "tensor<" in line else "scalars"
            found[kind] += 1
            found["late " + kind] += late
    return found


def main() -> None:
    """Both ways of launching, and what the sweep's code loads."""
    asked, launched, code = launches(past_triton=True)
    _, slow, _ = launches(past_triton=False)
    sweeps = {kernel for name, kernel, *_ in launched if name == "_sweep_kernel"}
    found = {"asked": len(asked), "launched": len(launched), "same": launched == slow, "sweeps": len(sweeps)}
    print(json.dumps(found | {"loads": loads(code["_sweep_kernel"])}))


if __name__ == "__main__":
    main()
