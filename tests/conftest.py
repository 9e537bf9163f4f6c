"""Without a GPU the Triton kernels are loaded in Triton's interpreter, so that every test of back ends runs them too."""

import os

import torch


def _load_interpreted():
    # The variable counts when triton is imported, when a kernel is decorated and when the first one runs; the processes that
    # tests start do not see it.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import gear_kernels

        with gear_kernels.backend("triton"):
            gear_kernels.token_stats(torch.zeros(1, 1), stats=("entropy",))
            gear_kernels.credit_weights(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.tensor([0, 1]))
    finally:
        del os.environ["TRITON_INTERPRET"]


def _patch_once():
    """The interpreter looks through triton.language at every call of a device function, half of all its time; the launch has
    patched that module already, and what is patched for the standard library stays so: once is enough."""
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def call(self, *args, **kwargs):
        if self.fn not in done:
            patch(self.fn)
            done.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if not torch.cuda.is_available():
    _load_interpreted()
    _patch_once()
