"""Without a GPU the Triton kernels are loaded in Triton's interpreter, so that every test of back ends runs them too."""

import os

import torch

if not torch.cuda.is_available():
    # The variable counts when triton is imported, when a kernel is decorated and when the first one runs; the processes that
    # tests start do not see it.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import gear_kernels

        with gear_kernels.backend("triton"):
            gear_kernels.token_stats(torch.zeros(1, 1), stats=("entropy",))
    finally:
        del os.environ["TRITON_INTERPRET"]
