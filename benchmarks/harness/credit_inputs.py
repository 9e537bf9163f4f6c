"""Packed sequences as `credit_weights` takes them: typical and hostile ones. Needs torch and gear_kernels alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gear_kernels import Credit, credit_weights

SMALL_PACK = (1 << 18, 128)  # tokens and sequences: the pack of the gates and of the pytest benchmarks
TOKEN_BYTES = 2 * 4 + 4 * 4 + 4 + 1  # signal and entropy are read; four float32 rows, an int32 and a bool one are written


class Pack(NamedTuple):
    """Inputs of `credit_weights`."""

    signal: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor
    cu_seqlens: torch.Tensor
    mask: torch.Tensor | None = None

    def to(self, device: str) -> Pack:
        """The pack on a device."""
        return Pack._make(None if x is None else x.to(device) for x in self)

    def credit(self, method: object = "gear", **more: torch.Tensor) -> Credit:
        """`credit_weights` of the pack. more: what the method reads beside signal and entropy."""
        return credit_weights(*self[:4], mask=self.mask, method=method, **more)


def pack(tokens: int, sequences: int, masked: float = 0.0, seed: int = 0) -> Pack:
    """Sequences of equal length whose signal has a spike at one token in twenty, as in a two-turn tool run."""
    g = torch.Generator().manual_seed(seed)
    spikes = torch.randn(tokens, generator=g) * (torch.rand(tokens, generator=g) < 0.05)
    signal = spikes + 0.02 * torch.randn(tokens, generator=g)
    entropy = torch.rand(tokens, generator=g) ** 3
    bounds = (torch.arange(sequences + 1, dtype=torch.int64) * tokens // max(sequences, 1)).int()
    mask = torch.rand(tokens, generator=g) >= masked if masked else None
    return Pack(signal, entropy, torch.randn(sequences, generator=g), bounds, mask)


def pairs(tokens: int, sequences: int) -> Pack:
    """Every second token opens a segment and the next one ends it: as many segments as there can be."""
    p = pack(tokens, sequences)
    signal, entropy = torch.full((tokens,), 0.5), torch.full((tokens,), 9.0)
    signal[::2], entropy[::2] = 1.0, 1.0
    return p._replace(signal=signal, entropy=entropy)


def credit_packs(tokens: int = 1 << 20, sequences: int = 512, many: int = 4096) -> dict[str, Pack]:
    """The typical pack first; `tokens` in each but where one sequence or `many` are named. A long sequence has 131072."""
    long = min(131072, tokens)
    return {
        f"typical, {sequences} sequences": pack(tokens, sequences),
        "30 % masked": pack(tokens, sequences, masked=0.3),
        "segments of two tokens": pairs(tokens, sequences),
        "long sequences": pack(tokens, tokens // long),
        "one long sequence": pack(long, 1),
        "one long sequence, segments of two tokens": pairs(long, 1),
        f"{many} sequences of one token": pack(many, many),
        f"{many} empty sequences": pack(0, many),
    }


def credit_inputs(method: Any, p: Pack) -> dict[str, torch.Tensor]:
    """Stand-ins for what a method reads beside signal and entropy."""
    turns = torch.arange(p.signal.numel(), device=p.signal.device) // 50
    sequences = torch.arange(p.advantages.numel(), device=p.signal.device) // 8
    made = {"teacher_entropy": p.entropy, "forward_kl": p.signal.abs(), "turn_rewards": (turns % 3).float()}
    made |= {"turn_ids": turns, "anchors": turns % 7, "groups": sequences}
    return {name: x for name, x in made.items() if name in method.needs}
