"""gear_kernels and its peers behind one signature: `function(case) -> {output name: tensor}`, differentiable.

Each is imported when it is loaded, and says what it gives: few give all three outputs, so a time means little without that.
Where a peer offers a choice, it gets the one that is best for it on the device at hand.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .cases import OUTPUTS, Case, plain, runner

OURS, EAGER = "gear_kernels", "eager torch"
UPDATE = OUTPUTS[:2]  # what a policy-gradient update needs; no teacher
Function = Callable[[Case], dict[str, torch.Tensor]]
_TRL_VOCABULARY_CHUNK = 32768  # columns; what TRL's trainers pass


class PeerMissing(ImportError):
    """A peer cannot be imported here; says which package is missing and the version to install."""


@dataclass(frozen=True)
class Peer:
    """One implementation to compare. kind: logits or hidden.  gives: names of outputs; "mean_reverse_kl" is a scalar.  note: what
    a reader of the table must know.  compiles: its first call does.  instead: the uncompiled form of a peer that is better
    compiled.
    """

    name: str
    kind: str
    gives: tuple[str, ...]
    load: Callable[[], Function]
    note: str = ""
    compiles: bool = False
    instead: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


def _imported(module: str, package: str, version: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(f"{module}: {error}; install it with `pip install --no-deps {package}=={version}`") from error


# --- gear_kernels ----------------------------------------------------------------------------------------------------------


def _ours_logits() -> Function:
    from gear_kernels import token_stats

    return lambda case: named(token_stats(case.student, case.teacher, case.targets, stats=OUTPUTS))


def _ours_hidden() -> Function:
    from gear_kernels import linear_token_stats

    return lambda case: named(linear_token_stats(case.student, case.weight, case.targets, case.teacher, stats=OUTPUTS))


def _ours_update() -> Function:
    from gear_kernels import linear_token_stats

    return lambda case: named(linear_token_stats(case.student, case.weight, case.targets, stats=UPDATE), UPDATE)


def named(stats, names: tuple[str, ...] = OUTPUTS) -> dict[str, torch.Tensor]:
    """Some of a TokenStats, by name."""
    return {name: getattr(stats, name) for name in names}


# --- torch -------------------------------------------------------------------------------------------------------------------


def eager_stats(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics of logits [N, V] the way one writes them by hand, in float32 (float64 for float64 logits)."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    log_p = F.log_softmax(student, -1, dtype=wide)
    log_q = F.log_softmax(teacher.detach(), -1, dtype=wide)
    p = log_p.exp()
    return {
        "logprobs": log_p.gather(-1, targets[:, None]).squeeze(-1),
        "entropy": -(p * log_p).sum(-1),
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
    }


def eager_linear_stats(student, weight, teacher, targets) -> dict[str, torch.Tensor]:
    """The same from hidden states; logits take the inputs' dtype, as from an `nn.Linear` head."""
    with torch.no_grad():
        teacher_logits = teacher @ weight.T
    return eager_stats(student @ weight.T, teacher_logits, targets)


def _eager(wrap: Callable[[Callable], Callable] = lambda f: f) -> Function:
    stats, linear = wrap(eager_stats), wrap(eager_linear_stats)

    def call(case: Case) -> dict[str, torch.Tensor]:
        if case.weight is None:
            return stats(case.student, case.teacher, case.targets)
        return linear(case.student, case.weight, case.teacher, case.targets)

    return call


def _compiled() -> Function:
    return _eager(lambda f: torch.compile(f, dynamic=False))


# --- products alone ---------------------------------------------------------------------------------------------------------


def gemms(case: Case, dtype: torch.dtype, passes: str) -> Callable[[], None]:
    """The head's matrix products alone, into buffers that exist: both heads' logits, stacked as one product.

    Backward: the logits again (keeping them is what nobody can afford), then the gradients of hidden states and of the weight.
    Operands are cast to `dtype` beforehand, at no cost here.
    """
    n = len(case.targets)
    weight, hidden = case.weight.detach().to(dtype), torch.cat([case.student.detach(), case.teacher]).to(dtype)
    logits = torch.zeros(2 * n, len(weight), dtype=dtype)
    grad_hidden, grad_weight = torch.zeros_like(hidden[:n]), torch.zeros_like(weight)

    def forward():
        torch.mm(hidden, weight.T, out=logits)

    def both():
        forward()
        forward()
        torch.mm(logits[:n], weight, out=grad_hidden)
        torch.mm(logits[:n].T, hidden[:n], out=grad_weight)

    return forward if passes == "forward" else both


def gemm_name(dtype: torch.dtype) -> str:
    """Name of the table row of `gemms` in this dtype."""
    return f"head GEMMs alone, {plain(dtype)}"


# --- TRL ---------------------------------------------------------------------------------------------------------------------


def trl_kernels(module: str):
    """A module of trl.kernels. They import one helper of trl.trainer.utils, and that file imports datasets and pandas.

    Where these are missing, a stand-in provides the helper: it gathers ZeRO-3 partitions, of which there are none here.
    """
    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:
        stand_in = types.ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = stand_in
    return _imported(f"trl.kernels.{module}", "trl", "1.16.0")


def _trl_hidden() -> Function:
    """KL by one function, log-prob by another. The first one's entropy has no gradient, so it serves under no_grad only."""
    _imported("trl", "trl", "1.16.0")
    divergence = trl_kernels("chunked_divergence").ChunkedDivergenceFunction.apply
    logprob = _trl_logprob()

    def call(case: Case) -> dict[str, torch.Tensor]:
        frozen = case.weight.detach()
        kl, entropy = divergence(case.student, case.weight, None, case.teacher, frozen, None, 1.0)
        wanted = ("entropy",) if torch.is_grad_enabled() else ()
        logprobs, with_gradient = logprob(case, wanted)
        return {"logprobs": logprobs, "entropy": with_gradient if wanted else entropy, "reverse_kl": kl}

    return call


def _trl_logprob() -> Callable[[Case, tuple[str, ...]], tuple[torch.Tensor, torch.Tensor | None]]:
    """Log-probs, and the entropy where it is named."""
    logprob = trl_kernels("chunked_logprob").ChunkedLogProbFunction.apply

    def call(case: Case, wanted: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        options = (1.0, _TRL_VOCABULARY_CHUNK, None, 1.0, wanted)
        return logprob(case.student, case.weight, None, case.targets, *options)[:2]

    return call


def _trl_update() -> Function:
    _imported("trl", "trl", "1.16.0")
    logprob = _trl_logprob()
    return lambda case: dict(zip(UPDATE, logprob(case, ("entropy",)), strict=True))


def _trl_divergence() -> Function:
    _imported("trl", "trl", "1.16.0")
    divergence = trl_kernels("chunked_divergence").ChunkedDivergenceFunction.apply

    def call(case: Case) -> dict[str, torch.Tensor]:
        kl, _ = divergence(case.student, case.weight, None, case.teacher, case.weight.detach(), None, 1.0)
        return {"reverse_kl": kl}

    return call


def _trl_logits() -> Function:
    fused = _imported("trl.kernels.logprob_entropy", "trl", "1.16.0").selective_log_softmax_and_entropy

    def call(case: Case) -> dict[str, torch.Tensor]:
        logprobs, entropy = fused(case.student, case.targets)
        return {"logprobs": logprobs, "entropy": entropy}

    return call


# --- Liger, cut-cross-entropy ------------------------------------------------------------------------------------------------


def _liger_hidden(compiled: bool = False) -> Function:
    """beta 1 of its JSD is the reverse KL, as a mean over rows; a second function gives log-prob and entropy."""
    jsd = _imported("liger_kernel.chunked_loss", "liger-kernel", "0.8.5").LigerFusedLinearJSDLoss
    update = _liger_update()
    mean_kl = jsd(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)

    def call(case: Case) -> dict[str, torch.Tensor]:
        kl = mean_kl(case.student, case.weight, case.teacher, case.weight.detach(), case.targets)
        return {**update(case), "mean_reverse_kl": kl}

    return call


def _liger_update() -> Function:
    module = _imported("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel", "0.8.5")
    cross_entropy = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def call(case: Case) -> dict[str, torch.Tensor]:
        nll, entropy = cross_entropy(case.student, case.weight, case.targets, 1.0, -100, 1, True)
        return {"logprobs": -nll, "entropy": entropy}

    return call


def _cut_cross_entropy() -> Function:
    linear_cross_entropy = _imported("cut_cross_entropy", "cut-cross-entropy", "25.1.1").linear_cross_entropy

    def call(case: Case) -> dict[str, torch.Tensor]:
        impl = "torch_compile" if case.student.device.type == "cpu" else "cce"
        return {"logprobs": -linear_cross_entropy(case.student, case.weight, case.targets, reduction="none", impl=impl)}

    return call


# --- verl --------------------------------------------------------------------------------------------------------------------


def _verl():
    """The module of its fused head. Importing verl imports ray, tensordict and more, of which the kernels use none.

    Where that fails, stand-ins take the place of its packages, their files not run, and of the four helpers the kernels import.
    """
    name = "verl.utils.kernel.linear_cross_entropy"
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    if importlib.util.find_spec("verl") is not None:
        for package in ("verl", "verl.utils"):
            sys.modules[package] = importlib.util.module_from_spec(importlib.util.find_spec(package))
        sys.modules["verl.utils.device"] = _verl_device()
    return _imported(name, "verl", "0.9.1")


def _verl_device() -> types.ModuleType:
    """What verl.utils.device gives on CUDA; the file itself asks for more packages."""
    stand_in = types.ModuleType("verl.utils.device")
    stand_in.get_device_capability = torch.cuda.get_device_capability
    stand_in.get_device_name = lambda: "cuda"
    stand_in.get_torch_device = lambda: torch.cuda
    stand_in.is_cuda_available = torch.cuda.is_available()
    return stand_in


def _verl_hidden() -> Function:
    fused = _verl().linear_cross_entropy

    def call(case: Case) -> dict[str, torch.Tensor]:
        logprobs, entropy = fused(case.student, case.weight, case.targets, 1.0, "none")
        return {"logprobs": logprobs, "entropy": entropy}

    return call


_LIGER_GIVES = ("logprobs", "entropy", "mean_reverse_kl")
_LIGER_NOTE = "two functions; KL as a mean only, with its gradients computed in forward, always"
_VERL_NOTE = "no teacher, no KL; Triton, no CPU path; hidden's gradient summed in the inputs' dtype, 9504 columns at a time"
PEERS = (
    Peer(OURS, "logits", OUTPUTS, _ours_logits),
    Peer(EAGER, "logits", OUTPUTS, _eager),
    Peer("torch.compile", "logits", OUTPUTS, _compiled, compiles=True),
    Peer("TRL 1.16", "logits", UPDATE, _trl_logits, "one head only; Triton, no CPU path", devices=("cuda",)),
    Peer(OURS, "hidden", OUTPUTS, _ours_hidden),
    Peer(EAGER, "hidden", OUTPUTS, _eager, "logits in the inputs' dtype"),
    Peer("torch.compile", "hidden", OUTPUTS, _compiled, "logits in the inputs' dtype", compiles=True),
    Peer("TRL 1.16", "hidden", OUTPUTS, _trl_hidden, "two functions, one GEMM more; log-prob's logits in the inputs' dtype"),
    Peer("TRL 1.16, KL alone", "hidden", ("reverse_kl",), _trl_divergence, "no log-prob, no entropy gradient"),
    Peer("Liger 0.8.5", "hidden", _LIGER_GIVES, lambda: _liger_hidden(compiled=True), _LIGER_NOTE, compiles=True),
    Peer("Liger 0.8.5, uncompiled", "hidden", _LIGER_GIVES, _liger_hidden, _LIGER_NOTE, instead=True),
    Peer("verl 0.9", "hidden", UPDATE, _verl_hidden, _VERL_NOTE, devices=("cuda",)),
    Peer("cut-cross-entropy 25.1", "hidden", ("logprobs",), _cut_cross_entropy, "no teacher, no entropy", compiles=True),
)
# The update pass alone, from hidden states of one head: TRL's issue 7244. verl and cut-cross-entropy give no more anyhow.
UPDATE_PEERS = (
    Peer(OURS, "hidden", UPDATE, _ours_update),
    Peer("TRL 1.16", "hidden", UPDATE, _trl_update, "logits in the inputs' dtype"),
    Peer("Liger 0.8.5", "hidden", UPDATE, _liger_update),
    *(peer for peer in PEERS if peer.kind == "hidden" and peer.name.startswith(("cut-cross-entropy", "verl"))),
)


def peers(kind: str, device: str = "cpu", compiled: bool = True) -> list[Peer]:
    """Those for `kind` ("logits" or "hidden") that run on `device`; without `compiled`, only those that never compile."""
    return [p for p in PEERS if p.kind == kind and device in p.devices and not (p.instead if compiled else p.compiles)]


def ours_call(case: Case, passes: str) -> Callable[[], tuple]:
    """A call of gear_kernels alone: (outputs, gradients)."""
    ours = next(peer for peer in PEERS if (peer.name, peer.kind) == (OURS, case.kind))
    return runner(ours.load(), case, passes)
