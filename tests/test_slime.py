"""slime's advantage function, called as slime calls it: its dictionary of columns by the sources of 21 August 2026 (0624b824)."""

import importlib
from argparse import Namespace

import pytest
import torch

from gear_kernels import Gear, GearKernelsError, credit_weights
from gear_kernels.integrations import slime

PATH = "gear_kernels.integrations.slime.advantages"  # of --custom-advantage-function-path
LENGTHS = (6, 3, 8)
REWARDS = [0.7, -1.2, 0.5]


def custom_advantages(args, rollout_data):
    """compute_advantages_and_returns of slime on the last pipeline stage, from where it looks the function up."""
    log_probs = rollout_data.get("rollout_log_probs") if args.use_rollout_logprobs else rollout_data.get("log_probs")
    rollout_data["kl"] = [torch.zeros_like(x, dtype=torch.float32) for x in log_probs or rollout_data["rollout_log_probs"]]
    module, _, name = args.custom_advantage_function_path.rpartition(".")
    getattr(importlib.import_module(module), name)(args, rollout_data)
    return rollout_data["advantages"], rollout_data["returns"]


def given(**settings):
    return Namespace(custom_advantage_function_path=PATH, use_rollout_logprobs=False, context_parallel_size=1, gear=settings)


@pytest.fixture
def rollout_data():
    draw = torch.Generator().manual_seed(0)
    rows = {name: [torch.rand(n, generator=draw) for n in LENGTHS] for name in ("log_probs", "teacher_log_probs", "entropy")}
    masks = [torch.ones(n, dtype=torch.int) for n in LENGTHS]
    masks[2][3:5] = 0
    masks[1][:] = 0  # slime's remove_sample
    return {
        **{name: [-x for x in column] if name != "entropy" else column for name, column in rows.items()},
        "rewards": list(REWARDS),
        "loss_masks": masks,
        "response_lengths": list(LENGTHS),
        "rollout_log_probs": [torch.full((n,), 5.0) for n in LENGTHS],  # the engine's: nothing may read it
    }


def by_hand(data, method):
    signal = torch.cat(data["log_probs"]) - torch.cat(data["teacher_log_probs"])
    bounds, mask = torch.tensor([0, *LENGTHS]).cumsum(0).int(), torch.cat(data["loss_masks"]).bool()
    return credit_weights(signal, torch.cat(data["entropy"]), torch.tensor(REWARDS), bounds, mask=mask, method=method)


@pytest.mark.parametrize(
    "settings, method",
    [({}, "gear"), ({"method": "gear", "args": {"alpha": 0.7}}, Gear(alpha=0.7)), ({"method": "rlsd"}, "rlsd")],
)
def test_the_function_fills_the_advantages_computed_by_hand(rollout_data, settings, method):
    want = by_hand(rollout_data, method)
    assert want.weights.std() > 0.01
    advantages, returns = custom_advantages(given(**settings), rollout_data)
    assert [row.shape for row in advantages] == [(n,) for n in LENGTHS] and advantages[0].dtype == torch.float32
    torch.testing.assert_close(torch.cat(advantages), want.token_advantages)
    torch.testing.assert_close(torch.cat(returns), want.token_advantages)
    assert not advantages[1].any() and not advantages[2][3:5].any()
    for name, value in want.diagnostics.items():
        assert rollout_data[f"gear/{name}"].shape == () and rollout_data[f"gear/{name}"] == value


def test_grpo_needs_no_teacher_and_gives_slimes_own_advantages(rollout_data):
    for name in ("teacher_log_probs", "entropy"):
        del rollout_data[name]
    advantages, _ = custom_advantages(given(method="grpo"), rollout_data)
    for row, reward, mask in zip(advantages, REWARDS, rollout_data["loss_masks"], strict=True):
        assert torch.equal(row, torch.full(row.shape, reward) * mask)


@pytest.mark.parametrize("missing, option", [("teacher_log_probs", "custom-rm-path"), ("entropy", "use-rollout-entropy")])
def test_a_missing_column_is_named_with_the_option_that_brings_it(rollout_data, missing, option):
    del rollout_data[missing]
    with pytest.raises(GearKernelsError, match=f"without {missing}.*{option}"):
        custom_advantages(given(), rollout_data)


def test_log_probs_are_never_the_engines(rollout_data):
    """Where slime scores nothing before its update there are no log-probs but the engine's: they enter no divergence."""
    del rollout_data["log_probs"]
    with pytest.raises(GearKernelsError, match="without log_probs.*get-mismatch-metrics"):
        custom_advantages(given(), rollout_data)


def test_what_it_cannot_serve_is_refused(rollout_data):
    cut = given()
    cut.context_parallel_size = 2
    with pytest.raises(GearKernelsError, match="context-parallel-size 2"):
        slime.advantages(cut, rollout_data)
    with pytest.raises(GearKernelsError, match="given metod"):
        slime.advantages(given(metod="gear"), rollout_data)
    with pytest.raises(GearKernelsError, match="sgcd.*slime"):
        slime.advantages(given(method="sgcd"), rollout_data)
