"""Calls of the compiled pass that the package's own operators make, kept so that replay.py can make them again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import gear_kernels
from gear_kernels.backends import native

from .cases import SMALL, make_case, plain
from .packs import pack

_COUNTED = ("sweep", "mixture", "gradient", "scan")  # `finish` reads no logits: on 16 rows half of its count is the call's
_SHAPE = (16, SMALL["logits"][1])
_TOKENS = (1 << 16, 128)  # and sequences
_STUDENT = ("logprobs", "entropy")
_EVERY = (*_STUDENT, "reverse_kl", "forward_kl", "jsd")
_STATS = {"student alone": _STUDENT, "with teacher": (*_STUDENT, "reverse_kl"), "all divergences": _EVERY}
_PAGE = 4096
# DLPack's code and bits
_KINDS = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16)}
_KINDS |= {torch.int32: (0, 32), torch.int64: (0, 64), torch.bool: (6, 8)}


class Recorder:
    """Takes the compiled module's place: keeps what it is called with, as it was before the call, and calls it.

    calls: (function, arguments), fit for JSON.  arrays: what they read, each from a page's start.
    """

    def __init__(self, native: object):
        self._native, self.calls, self.arrays = native, [], bytearray()

    def __getattr__(self, name: str):
        function = getattr(self._native, name)
        return functools.partial(self._call, name, function) if name in _COUNTED else function

    def _call(self, name: str, function: Callable, *arguments):
        self.calls.append((name, [self._plain(x) for x in arguments]))
        return function(*arguments)

    def _plain(self, x: object):
        """An array becomes its place among `arrays`, the scan's options a dictionary."""
        if isinstance(x, torch.Tensor):
            self.arrays += bytes(-len(self.arrays) % _PAGE)
            at = len(self.arrays)
            self.arrays += x.detach().contiguous().view(torch.uint8).numpy().tobytes()
            return {"at": at, "shape": list(x.shape), "kind": _KINDS[x.dtype]}
        if isinstance(x, list):
            return [self._plain(y) for y in x]
        if isinstance(x, type(None) | bool | int | float | str):
            return x
        return {name: getattr(x, name) for name in dir(x) if not name.startswith("_")}


def recorded(only: str = "") -> tuple[Recorder, list[tuple[str, int]]]:
    """The calls of the operations whose name holds `only`, and for each (its name, logits of one head or tokens)."""
    recorder, names = Recorder(native.load()[0]), []
    with (
        mock.patch.object(native, "load", lambda: (recorder, None)),
        mock.patch.object(torch, "get_num_threads", lambda: 1),
        gear_kernels.backend("native"),
    ):
        for operation, elements, run in _operations():
            if only in operation:
                run()
                names += [(f"{function}, {operation}", elements) for function, _ in recorder.calls[len(names) :]]
    return recorder, names


def _operations() -> Iterator[tuple[str, int, Callable]]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, stats in _STATS.items():
            if dtype == torch.float32 or stats != _EVERY:  # bfloat16 is only read and written in another way
                run = functools.partial(_there_and_back, dtype, stats)
                yield f"{plain(dtype)}, {name}", _SHAPE[0] * _SHAPE[1], run
    yield "typical pack", _TOKENS[0], lambda: pack(*_TOKENS).credit()


def _there_and_back(dtype: torch.dtype, stats: tuple[str, ...]) -> None:
    case = make_case("logits", dtype, *_SHAPE)
    teacher = None if stats == _STUDENT else case.teacher
    found = gear_kernels.token_stats(case.student, teacher, case.targets, stats=stats)
    sum(getattr(found, name).sum() for name in stats).backward()
