"""The records that pass between the operators and the back ends: a tile of logits with its task, a pack with its credit."""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch

from .errors import GearKernelsError, bad_input, require
from .reference.stats import Rows

# --- statistics ---------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A tile of one head's logits [n, c], raw: what a back end still has to do is softcap * tanh((z + bias) * scale / softcap).

    Back ends that do not apply it themselves (`fused_head`) only ever see None, None, None.
    """

    z: torch.Tensor
    bias: torch.Tensor | None = None  # [c]
    scale: float | None = None
    softcap: float | None = None


class TileTask(NamedTuple):
    """The task on a tile: its rows, the statistics wanted, the mixture's beta, the tile's first column in the vocabulary.

    kept: what a back end works out once for all tiles of a call; None where there is but one tile.  multiplied: dz goes into
    products, where what adds nothing to their sums may be 0.
    """

    rows: Rows
    stats: tuple[str, ...]
    beta: float = 0.5
    first: int = 0
    kept: dict | None = None
    multiplied: bool = False


# --- credit -------------------------------------------------------------------------------------------------------------

FLOAT_INPUTS = ("signal", "entropy", "teacher_entropy", "forward_kl", "turn_rewards")  # [T] each
INPUTS = (*FLOAT_INPUTS, "turn_ids", "anchors", "groups")  # all that a method may read beside the advantages


class Pack(NamedTuple):
    """A checked call of credit_weights: the [T] rows that the method reads (None: it does not), and the dtype to compute in."""

    rows: dict[str, torch.Tensor | None]
    advantages: torch.Tensor  # [B]
    cu_seqlens: torch.Tensor  # [B + 1]
    mask: torch.Tensor | None  # [T]
    total: int  # T
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """The device of every tensor of the pack."""
        return self.cu_seqlens.device

    def row(self, name: str | None) -> torch.Tensor | None:
        """The [T] row of this name in the dtype to compute in, contiguous; None where there is none."""
        x = None if name is None else self.rows[name]
        return None if x is None else x.detach().to(self.dtype).contiguous()

    def own_advantages(self) -> torch.Tensor:
        """The advantages [B] in the dtype to compute in, contiguous."""
        return self.advantages.detach().to(self.dtype).contiguous()

    def sequence(self) -> torch.Tensor:
        """The sequence of each token, int64 [T]."""
        lengths = self.cu_seqlens.diff().long()
        return torch.arange(lengths.numel(), device=self.device).repeat_interleave(lengths, output_size=self.total)


class Credit(NamedTuple):
    """The result of `credit_weights`: six [T] tensors on the inputs' device, and the step's diagnostics.

    Floating tensors are float64 where signal or entropy is, else float32. Tokens outside the mask hold 0, -1 and False.
    """

    token_advantages: torch.Tensor  # weights * A, what the policy-gradient loss multiplies with
    weights: torch.Tensor  # W
    signal: torch.Tensor  # g, the normalised signal, in [0, 1]; for methods without one, the quantity behind the weight
    credit: torch.Tensor  # c, the g of the segment's first token, or the token's own g outside segments
    segment_ids: torch.Tensor  # int32, from 0 within each sequence, -1 outside segments
    onsets: torch.Tensor  # bool, True on the first token of each segment
    diagnostics: dict[str, torch.Tensor]  # 0-d float32 tensors on the same device, see `credit_weights`


def check_nan(pack: Pack) -> None:
    """Raise on a NaN in a policy token's row or in an advantage; looks at values, so for CPU tensors."""
    for name in FLOAT_INPUTS:
        x = pack.rows[name]
        bad = None if x is None else x.isnan() if pack.mask is None else x.isnan() & pack.mask
        if bad is not None and bad.any():
            raise nan_at(name, int(bad.nonzero()[0]), pack.cu_seqlens.tolist())
    check_advantages(pack.advantages)


def nan_at(name: str, place: int, bounds: list[int]) -> GearKernelsError:
    """The error for a NaN in this row at this packed token, told by sequence and position."""
    b = bisect.bisect_right(bounds, place) - 1
    return bad_input(
        f"{name}: given NaN at sequence {b}, position {place - bounds[b]} (packed token {place})",
        "numbers on policy tokens",
        "correct the scores it comes from, or leave the token out of the mask",
    )


def check_advantages(advantages: torch.Tensor) -> None:
    """Raise on a NaN among the advantages [B]."""
    bad = advantages.isnan().nonzero().flatten().tolist()
    require(not bad, f"advantages: given NaN at sequence {bad[:1]}", "numbers", "check the rewards")
