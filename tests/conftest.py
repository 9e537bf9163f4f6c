"""Without a GPU the Triton kernels are loaded in Triton's interpreter, so that every test of back ends runs them too. Seeds of
drawn cases are pinned, and pytest's first lines say so: see fuzzing.py.
"""

import os
from functools import cache

import fuzzing  # registers hypothesis' profiles and loads one
import pytest
import side_by_side
from forked_ranks import Server


def pytest_report_header():
    return "fuzz: pinned seeds" if fuzzing.SEED is None else f"fuzz: repeat with GEAR_FUZZ={fuzzing.SEED}"


@pytest.fixture(scope="session")
def server():
    """The process that runs of the trainer are forked off."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def alone():
    """A process group of this process only."""
    import torch.distributed as dist  # the controller loads no torch

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _load_interpreted():
    # The variable counts when triton is imported, when a kernel is decorated and when the first one runs; the processes that
    # tests start do not see it.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import torch

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


def _look_up_types():
    """The interpreter makes a table of numpy's types to look one up, and the constants of a shape for every value that has it: a
    quarter of its time. Both are made once here."""
    import numpy
    from triton import language
    from triton.runtime import interpreter

    of_scalar, address, plain = cache(interpreter._get_np_dtype), numpy.dtype(numpy.uint64), language.core.tensor.__init__

    def np_dtype(kind):
        scalar = kind.scalar
        return address if isinstance(scalar, language.pointer_type) else of_scalar(scalar)

    def made(self, handle, type):
        if type.is_block() and (shared := vars(type).get("of_its_tensors")):
            self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, shared
            return
        plain(self, handle, type)
        if type.is_block():
            type.of_its_tensors = self.shape, self.numel

    def with_element_ty(self, scalar):
        other = object.__new__(language.block_type)
        vars(other).update(vars(self), element_ty=scalar, name=f"<{self.shape}, {scalar}>")
        return other

    interpreter._get_np_dtype = np_dtype
    language.core.tensor.__init__ = made
    language.block_type.with_element_ty = with_element_ty


def pytest_configure(config):
    if side_by_side.is_controller(config):
        return  # it runs no test
    side_by_side.share_cores()
    import torch

    if not torch.cuda.is_available():
        _load_interpreted()
        _patch_once()
        _look_up_types()


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    side_by_side.arrange(items)


# `make test-verl` runs these, in an environment with verl, whose pins clash with the other tests'
collect_ignore = ["in_verl"]
