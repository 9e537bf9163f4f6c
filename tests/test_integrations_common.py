"""Credit for any trainer: whatever layout the rows come in, the token advantages are those of the hand-packed trajectories."""

import pytest
import torch

from gear_kernels import Gear, GearKernelsError, credit_weights
from gear_kernels.integrations.common import choose, token_advantages
from gear_kernels.methods import METHODS

LENGTHS = (5, 0, 9, 3)
ADVANTAGES = torch.tensor([1.0, 0.7, -0.5, 0.0])


@pytest.fixture(scope="module")
def trajectories():
    """Rows by name, each a list of B tensors; the mask leaves out two tokens of a tool in the third trajectory."""
    draw = torch.Generator().manual_seed(0)
    rows = {
        name: [torch.rand(n, generator=draw) for n in LENGTHS] for name in ("signal", "entropy", "teacher_entropy", "forward_kl")
    }
    rows["turn_rewards"] = [torch.ones(n) for n in LENGTHS]
    rows["anchors"] = [torch.zeros(n, dtype=torch.int64) for n in LENGTHS]
    tool = [torch.ones(n, dtype=torch.int64) for n in LENGTHS]
    tool[2][4:6] = 0
    return rows, tool


def by_hand(trajectories, method):
    rows, tool = trajectories
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    turns = [torch.zeros(n, dtype=torch.int64) for n in LENGTHS]
    turns[2][6:] = 1
    packed = {name: torch.cat(x) for name, x in {**rows, "turn_ids": turns}.items()}
    groups = torch.tensor([0, 0, 1, 1])
    mask = torch.cat(tool).bool()
    return credit_weights(
        packed.pop("signal"), packed.pop("entropy"), ADVANTAGES, bounds, mask=mask, method=method, groups=groups, **packed
    )


def padded(rows, side, fill=0):
    """[B, T] with rubbish on the padding: nothing may read it."""
    out = torch.full((len(LENGTHS), max(LENGTHS) + 2), fill, dtype=rows[0].dtype)
    for b, row in enumerate(rows):
        out[b, slice(0, len(row)) if side == "right" else slice(out.shape[1] - len(row), None)] = row
    return out


def unpadded(x, side):
    return torch.cat([row[:n] if side == "right" else row[len(row) - n :] for row, n in zip(x, LENGTHS, strict=True)])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "grpo"])
@pytest.mark.parametrize("layout", ("right", "left", "listed", "packed", "nested"))
def test_every_layout_gives_the_advantages_of_hand_packed_rows(trajectories, method, layout):
    rows, tool = trajectories
    want = by_hand(trajectories, method)
    groups, step = [0, 0, 1, 1], None
    if layout in ("right", "left"):
        ones = padded([torch.ones(n, dtype=torch.int64) for n in LENGTHS], layout)
        given = {name: padded(x, layout, fill=7 if x[0].dtype == torch.int64 else float("nan")) for name, x in rows.items()}
        tools = padded(tool, layout, fill=1)  # as TRL pads it
        got = token_advantages(ADVANTAGES, ones, method=method, step=step, tool_mask=tools, groups=groups, **given)
        assert got.token_advantages.shape == ones.shape and not got.token_advantages[ones == 0].any()
        found = [unpadded(x, layout) for x in got[:3]]
    elif layout == "listed":
        got = token_advantages(ADVANTAGES.tolist(), [x.tolist() for x in tool], method=method, groups=groups, **rows)
        assert [len(x) for x in got.weights] == list(LENGTHS)
        found = [torch.cat(x) for x in got[:3]]
    elif layout == "packed":
        bounds, flat = torch.tensor([0, *LENGTHS]).cumsum(0).int(), {name: torch.cat(x) for name, x in rows.items()}
        got = token_advantages(ADVANTAGES, torch.cat(tool), method=method, cu_seqlens=bounds, groups=groups, **flat)
        found = got[:3]
    else:
        nest = lambda x: torch.nested.nested_tensor_from_jagged(torch.cat(x), torch.tensor([0, *LENGTHS]).cumsum(0))  # noqa: E731
        given = {name: nest(x) for name, x in rows.items()}
        got = token_advantages(ADVANTAGES, nest(tool), method=method, groups=groups, **given)
        assert got.weights.is_nested
        found = [x.values() for x in got[:3]]
    for x, y in zip(found, (want.token_advantages, want.weights, want.segment_ids), strict=True):
        assert torch.equal(x, y)
    assert got.metrics.keys() == {f"gear/{name}" for name in want.diagnostics}
    assert torch.allclose(got.metrics["gear/share_in_segments"], want.diagnostics["share_in_segments"])


def test_advantages_by_token_are_taken_by_trajectory(trajectories):
    rows, tool = trajectories
    want = by_hand(trajectories, "gear").token_advantages
    each = [torch.full((n,), float(a)) for n, a in zip(LENGTHS, ADVANTAGES, strict=True)]
    each[2][4:6] = 0.0  # verl writes 0 where the mask is 0
    got = token_advantages(each, tool, signal=rows["signal"], entropy=rows["entropy"])
    assert torch.equal(torch.cat(got.token_advantages), want)
    each[2][0] = 3.0
    with pytest.raises(GearKernelsError, match="advantages: given .* in trajectory 2"):
        token_advantages(each, tool, signal=rows["signal"], entropy=rows["entropy"])


def test_a_trajectory_of_nothing_but_padding_passes(trajectories):
    rows, tool = trajectories
    mask = padded(tool, "right")
    mask[0] = 0
    given = {name: padded(rows[name], "right") for name in ("signal", "entropy")}
    got = token_advantages(ADVANTAGES, mask, **given)
    assert not got.token_advantages[0].any() and got.token_advantages[2].any()
    assert all(x.isfinite() for x in got.metrics.values())


def test_the_step_reaches_a_method_that_changes(trajectories):
    rows, tool = trajectories
    early, late = (token_advantages(ADVANTAGES, tool, method="rlsd", step=s, signal=rows["signal"]).weights for s in (1, 51))
    assert torch.equal(late[0], torch.ones(5)) and not torch.equal(early[0], late[0])


def test_rows_that_do_not_fit_are_refused_by_name(trajectories):
    rows, tool = trajectories
    signal, entropy = rows["signal"], rows["entropy"]
    with pytest.raises(GearKernelsError, match="entropy: given packed rows"):
        token_advantages(ADVANTAGES, tool, signal=signal, entropy=torch.cat(entropy))
    with pytest.raises(GearKernelsError, match=r"signal: given \(4, 0, 9, 3\)"):
        token_advantages(ADVANTAGES, tool, signal=[signal[0][1:], *signal[1:]], entropy=entropy)
    with pytest.raises(GearKernelsError, match="padded rows without a mask"):
        token_advantages(torch.ones(2), signal=torch.rand(2, 3), entropy=torch.rand(2, 3))
    with pytest.raises(GearKernelsError, match="packed rows without cu_seqlens"):
        token_advantages(torch.ones(2), torch.ones(3), signal=torch.rand(3))
    with pytest.raises(GearKernelsError, match="inputs: given entropies"):
        token_advantages(ADVANTAGES, tool, entropies=entropy)
    with pytest.raises(GearKernelsError, match="neither a mask"):
        token_advantages(ADVANTAGES, method="grpo")


def test_a_trainer_is_asked_for_no_more_than_it_has():
    gives = ("signal", "entropy", "teacher_entropy", "turn_ids")
    assert choose("gear", gives) == (METHODS["gear"], "k1")
    assert choose("grpo", ()) == (METHODS["grpo"], None)
    assert choose("gear", gives, args={"alpha": 0.4, "segmenter": "token"}).method == Gear(alpha=0.4, segmenter="token")
    assert choose("sgcd", gives, signals=("k1", "reverse_kl")).signal == "reverse_kl"
    with pytest.raises(GearKernelsError, match="credit 'gigpo' reads anchors, groups, turn_rewards, which TRL does not have"):
        choose("gigpo", gives, trainer="TRL")
    with pytest.raises(GearKernelsError, match="signal reverse_kl in TRL"):
        choose("rlsd", gives, signals=("k1", "reverse_kl"), signal="reverse_kl", trainer="TRL")
    with pytest.raises(GearKernelsError, match="given beta; expected fields"):
        choose("gear", gives, args={"beta": 1})
