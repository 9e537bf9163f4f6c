"""The objective's parts against TRL's, verl's and OpenRLHF's formulas on random batches; what a configuration makes of them."""

import math

import peer_losses as peers
import pytest
import torch
from peer_losses import TrlTrainer

from gear_kernels import GearKernelsError
from gear_kernels.losses import (
    aggregation_weights,
    cispo_loss,
    entropy_loss,
    gspo_loss,
    importance_weights,
    policy_gradient_loss,
    reference_kl_loss,
)
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.preflight.checks import check_reference, warnings
from gear_trainer.recipe import resolve
from gear_trainer.rollout import Rollout, Status
from gear_trainer.tasks.base import Problem
from gear_trainer.train.advantages import group_advantages, overlong_penalty
from gear_trainer.train.experience import pack
from gear_trainer.train.schedule import schedule

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"
SEEDS = range(4)


class Batch:
    """Random completions as TRL has them, [B, T] float64 with a mask, and the same tokens packed."""

    def __init__(self, seed, rows=6, width=17, apart=0.3):
        g = torch.Generator().manual_seed(seed)
        draw = [torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(6)]
        self.new = (-draw[0].abs() - 0.1).requires_grad_()
        self.old, self.sampler, self.reference = (self.new.detach() + apart * x for x in draw[1:4])
        self.entropy = draw[4].abs().requires_grad_()
        self.advantages, self.token_advantages = draw[5][:, 0], draw[5]
        self.lengths = torch.randint(1, width + 1, (rows,), generator=g)
        self.mask = (torch.arange(width) < self.lengths[:, None]).int()
        self.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)]).int()

    def __getattr__(self, name):  # packed_old is old, packed
        return getattr(self, name.removeprefix("packed_"))[self.mask.bool()]

    @property
    def per_token(self):
        return self.advantages[:, None].expand_as(self.mask)[self.mask.bool()]

    def weights(self, mode="seq_mean_token_mean"):
        return aggregation_weights(self.lengths, mode, max_len=self.mask.shape[1]).double()

    def policy(self, loss, mode="seq_mean_token_mean", advantages=None, **options):
        given = self.packed_new, self.packed_old, self.per_token if advantages is None else advantages, self.weights(mode)
        return loss(*given, **options)[0]

    def same(self, ours, theirs):
        """Equal in value and in both gradients; the aggregation weights are float32."""
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-9)
        leaves = (self.new, self.entropy)
        for mine, other in zip(*(torch.autograd.grad(x, leaves, allow_unused=True) for x in (ours, theirs)), strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-9)


# --- losses -------------------------------------------------------------------------------------------------------------------

AGGREGATION = {"grpo": "seq_mean_token_mean", "dapo": "token_mean", "dr_grpo": "seq_mean_token_sum_norm"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", AGGREGATION)
def test_a_whole_objective_is_trls(seed, kind):
    """Clip-higher, truncated importance weights, k3 to a reference in one loss, in each of TRL's means."""
    b, mode = Batch(seed), AGGREGATION[kind]
    theirs = TrlTrainer(
        b.new, b.entropy, loss_type=kind, epsilon_high=0.28, beta=0.04, use_vllm=True, vllm_importance_sampling_correction=True,
        max_completion_length=b.mask.shape[1],
    ).loss(
        b.mask, advantages=b.advantages, old_per_token_logps=b.old, ref_per_token_logps=b.reference,
        importance_sampling_ratio=peers.trl_importance(b.old - b.sampler, b.mask, "token_truncate", None, 1.2),
    )  # fmt: skip
    importance = importance_weights(b.packed_old, b.packed_sampler, cap=1.2)
    policy = b.policy(policy_gradient_loss, mode, clip_high=0.28, importance_weights=importance)
    kl, _ = reference_kl_loss(b.packed_new, b.packed_reference, b.weights(mode), estimator="k3")
    b.same(policy + 0.04 * kl, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_entropy_bonus_is_trls(seed):
    b = Batch(seed)
    theirs = TrlTrainer(b.new, b.entropy, loss_type="dapo", entropy_coef=0.02).loss(
        b.mask, advantages=b.advantages, old_per_token_logps=b.old
    )
    bonus, metrics = entropy_loss(b.packed_entropy, b.weights("token_mean"))
    b.same(b.policy(policy_gradient_loss, "token_mean") + 0.02 * bonus, theirs)
    assert metrics["entropy"] == pytest.approx(b.packed_entropy.mean().item(), rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (0.05, 0.1)])
def test_gspo_is_trls_sequence_level(seed, clip):
    b = Batch(seed)
    trainer = TrlTrainer(b.new, b.entropy, importance_sampling_level="sequence", epsilon_low=clip[0], epsilon_high=clip[1])
    theirs = trainer.loss(b.mask, advantages=b.advantages, old_per_token_logps=b.old)
    b.same(b.policy(gspo_loss, cu_seqlens=b.cu_seqlens, clip_low=clip[0], clip_high=clip[1]), theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_gspo_with_token_advantages_is_verls(seed):
    """A credit method gives each token its own: GSPO-token."""
    b = Batch(seed)
    theirs = peers.verl_gspo(b.old, b.new, b.token_advantages, b.mask, 0.05, 0.1)
    ours = b.policy(gspo_loss, advantages=b.packed_token_advantages, cu_seqlens=b.cu_seqlens, clip_low=0.05, clip_high=0.1)
    b.same(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_cispo_is_trls_and_verls(seed):
    b = Batch(seed)
    trainer = TrlTrainer(b.new, b.entropy, loss_type="cispo", epsilon_high=1.2)  # TRL's is the bound itself
    theirs = trainer.loss(b.mask, advantages=b.advantages, old_per_token_logps=b.old)
    b.same(b.policy(cispo_loss, "token_mean", clip_low=1.0, clip_high=0.2), theirs)
    theirs = peers.verl_cispo(b.old, b.new, b.token_advantages, b.mask, 0.1, 0.3)
    b.same(b.policy(cispo_loss, "token_mean", advantages=b.packed_token_advantages, clip_low=0.1, clip_high=0.3), theirs)


def test_a_token_that_cispo_clips_still_has_a_gradient():
    logprobs = torch.tensor([0.5, -0.5], requires_grad=True)
    loss, metrics = cispo_loss(logprobs, torch.zeros(2), torch.ones(2), torch.ones(2), clip_low=0.1, clip_high=0.2)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.2, -0.9]) and metrics["clip_fraction"] == 1


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_estimators_are_verls(kind):
    b = Batch(0, apart=1.5)  # some k3 beyond its bound of 10
    theirs = (peers.verl_kl(b.new, b.reference, kind) * b.mask).sum() / b.mask.sum()
    b.same(reference_kl_loss(b.packed_new, b.packed_reference, b.weights("token_mean"), estimator=kind)[0], theirs)


@pytest.mark.parametrize("loss", ["gspo", "cispo"])
def test_weightless_tokens_do_nothing_whatever_they_hold(loss):
    """Nor do they count in their sequence's ratio."""
    bad, cu = torch.tensor([math.nan, -math.inf, 3.0]), torch.tensor([0, 2, 5])
    logprobs = torch.cat([torch.tensor([-1.0, -2.0]), bad]).requires_grad_()
    old, weights = torch.cat([torch.tensor([-1.1, -2.3]), bad]), torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    more = {"cu_seqlens": cu} if loss == "gspo" else {}
    more |= {"clip_low": 0.5, "clip_high": 0.5, "importance_weights": torch.cat([torch.ones(2), bad])}
    got, _ = {"gspo": gspo_loss, "cispo": cispo_loss}[loss](logprobs, old, torch.ones(5), weights, **more)
    got.backward()
    ratios = [math.exp(0.2)] * 2 if loss == "gspo" else [math.exp(0.1), math.exp(0.3)]
    assert logprobs.grad.tolist() == pytest.approx([-0.5 * ratios[0], -0.5 * ratios[1], 0, 0, 0], rel=1e-5)


# --- importance weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weights_are_the_peers(seed):
    b = Batch(seed, apart=0.5)
    gap, kept = b.old - b.sampler, b.mask.bool()

    def ours(mode, **bounds):
        return importance_weights(b.packed_old, b.packed_sampler, mode, **bounds, cu_seqlens=b.cu_seqlens)

    for low, high in ((None, 1.5), (0.5, 1.3)):
        wanted = peers.trl_importance(gap, b.mask, "token_truncate", low, high)
        torch.testing.assert_close(ours("truncate", cap=high, floor=low), wanted[kept], rtol=0, atol=0)
        wanted = peers.trl_importance(gap, b.mask, "token_mask", low, high)
        torch.testing.assert_close(ours("mask", cap=high, floor=low), wanted[kept], rtol=0, atol=0)
    assert torch.equal(ours("mask", cap=1.5, floor=0.5), peers.openrlhf_importance(gap, b.mask, "token", 0.5, 1.5)[kept])
    wanted = peers.openrlhf_importance(gap, b.mask, "seq", 0.8, 1.2)
    assert torch.equal(ours("sequence_mask", cap=1.2, floor=0.8), wanted[kept])
    assert 0 < (wanted[kept] == 0).float().mean() < 1, "some sequences stay, some go"


def test_a_ratio_that_is_no_number_is_masked():
    wild = torch.tensor([0.0, math.nan, math.inf, -math.inf, 200.0])
    assert importance_weights(wild, torch.zeros(5), "mask", cap=5.0).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: importance_weights(x, x, "clip"), "mode is 'clip'.*truncate, mask, sequence_mask"),
        (lambda x: importance_weights(x, x, "mask", cap=0.5, floor=0.5), "floor is 0.5 and cap 0.5.*floor < cap"),
        (lambda x: importance_weights(x, x, "sequence_mask"), "cu_seqlens is None"),
        (lambda x: importance_weights(x, x[:1]), "sampler_logprobs has shape"),
        (lambda x: gspo_loss(x, x, x, x, x), "cu_seqlens is torch.float32"),
        (lambda x: gspo_loss(x, x, x, x, torch.tensor([0, 3]), dual_clip=1.0), "dual_clip is 1.0"),
        (lambda x: cispo_loss(x, x, x[:2], x), "token_advantages has shape"),
        (lambda x: entropy_loss(x, x[:2]), "token_weights has shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(GearKernelsError, match=message):
        call(torch.zeros(3))


# --- advantages and what is left out --------------------------------------------------------------------------------------------


def rollout(group, reward, tokens=4, status=Status.DONE):
    r = Rollout(Problem("p", [], [], "1"), group, 0, [1, 2], [3, 4, 5], status=status, reward=reward, success=reward > 0.5)
    r.append(list(range(tokens)), [-0.5] * tokens)
    return r


@pytest.mark.parametrize("how", ["grpo", "dr_grpo", "rloo", "batch"])
def test_advantages_are_trls(alone, how):
    rewards = torch.rand(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = group_advantages([rollout(i // 4, x) for i, x in enumerate(rewards.tolist())], how)
    assert got == pytest.approx(peers.trl_advantages(rewards, 4, how).tolist(), rel=1e-9)


def test_the_batchs_spread_is_of_what_is_known(alone):
    """A group with a failed rollout gives neither advantages nor spread; one whose rewards agree counts in the spread."""
    rollouts = [
        rollout(0, 1.0),
        rollout(0, 0.0),
        rollout(1, 9.0),
        rollout(1, 0.0, status=Status.ERROR),
        rollout(2, 1.0),
        rollout(2, 1.0),
    ]
    got = group_advantages(rollouts, "batch")
    assert got == pytest.approx([1.0, -1.0, 0, 0, 0, 0], rel=1e-5) and got[2:] == [0.0] * 4  # std of 1, 0, 1, 1 is 0.5


def test_the_overlong_penalty_is_trls():
    theirs = peers.trl_overlong(100, 30)([[0] * n for n in range(130)])
    assert [overlong_penalty(n, 100, 30) for n in range(130)] == pytest.approx(theirs, abs=1e-12)


def test_the_penalty_is_in_the_advantages_and_not_in_the_reward(alone):
    short, long = rollout(0, 1.0, tokens=10), rollout(0, 1.0, tokens=38)
    cfg = load_config(DEMO, ["train.overlong_buffer=8", "train.advantages=dr_grpo", "credit=grpo"])  # of 40 tokens
    made = pack(cfg, resolve(cfg), [short, long], torch.device("cpu"))
    assert made.advantages == pytest.approx([3 / 8, -3 / 8]) and made.penalty == [0.0, -0.75] and long.reward == 1.0
    assert pack(load_config(DEMO), resolve(cfg), [short, long], torch.device("cpu")).advantages == [0.0, 0.0]


@pytest.mark.parametrize("mode", ["seq_mean_token_mean", "token_mean"])
@pytest.mark.parametrize("extra", [[], ["train.entropy_bonus=0.1"], ["credit=opsd+grpo"]])
def test_truncated_rollouts_are_masked_as_in_trl(alone, mode, extra):
    """Their reward stays in the baseline, no pass runs over them, and the mean is taken as TRL takes it."""
    shape = ["world_size=1", "rollout.prompts_per_step=2", "rollout.group_size=2", "credit=grpo", "train.mask_truncated=true"]
    cfg = load_config(DEMO, [*shape, f"train.aggregation={mode}", *extra])
    cut = rollout(0, 0.0, 7, Status.LENGTH)
    made = pack(cfg, resolve(cfg), [rollout(0, 1.0, 3), cut, rollout(1, 0.0, 5), rollout(1, 1.0, 2)], torch.device("cpu"))
    plan = schedule(cfg, resolve(cfg), made)
    assert sorted(i for rows in plan.update[0].split for i in rows) == [0, 2, 3] and made.left_out == [False, True, False, False]
    assert made.advantages[1] == 0 and made.advantages[0] == pytest.approx(0.7071, abs=1e-4), "relative to the one that was cut"
    b = Batch(0, rows=4, width=7)
    b.lengths = torch.tensor([3, 7, 5, 2])
    masked = (torch.arange(7) < torch.tensor([3, 0, 5, 2])[:, None]).int()
    trainer = TrlTrainer(b.new, b.entropy, loss_type="grpo" if mode.startswith("seq") else "dapo")
    theirs = trainer.loss(masked, advantages=torch.tensor([1.0, 9.0, -1.0, 2.0], dtype=torch.float64), old_per_token_logps=b.old)
    kept = torch.tensor([True] * 3 + [False] * 7 + [True] * 7)
    new, old = b.new[masked.bool()], b.old[masked.bool()]
    advantages = torch.tensor([1.0] * 3 + [-1.0] * 5 + [2.0] * 2, dtype=torch.float64)
    b.same(policy_gradient_loss(new, old, advantages, made["loss_weights"][kept].double())[0], theirs)


# --- what a configuration means -------------------------------------------------------------------------------------------------


def test_nothing_is_on_by_default():
    recipe = resolve(load_config(DEMO))
    assert recipe.kl is None and not recipe.moves_all and recipe.frozen == () and recipe.at(9) is recipe
    assert recipe.stats_to_update == ("logprobs",) and not recipe.wrong_hint and not recipe.masks_truncated


@pytest.mark.parametrize(
    ("overrides", "models"),
    [
        (["credit=grpo", "kl.coefficient=0.1"], [("reference", "initial", None)]),
        (["credit=grpo", "kl.coefficient=0.1", "kl.reference=ema"], [("reference", "ema", None)]),
        (["kl.coefficient=0.1", "teacher.weights=initial"], [("teacher", "initial", None)]),  # one copy for both
        (["kl.coefficient=0.1", "kl.reference=ema", "teacher.weights=ema"], [("teacher", "ema", None)]),
        (
            ["kl.coefficient=0.1", "kl.reference=ema", "kl.ema_rate=0.5", "teacher.weights=ema"],
            [("teacher", "ema", None), ("reference", "ema", None)],
        ),
        (
            ["kl.coefficient=0.1", "kl.reference=Qwen/Qwen3-0.6B", "teacher.weights=initial"],
            [("teacher", "initial", None), ("reference", "initial", "Qwen/Qwen3-0.6B")],
        ),
        (["credit=grpo", "kl.coefficient=0.1", "teacher.weights=ema"], [("reference", "initial", None)]),  # nobody asks a teacher
    ],
    ids=lambda x: " ".join(x) if isinstance(x[0], str) else "",
)
def test_the_models_beside_the_policy(overrides, models):
    recipe = resolve(load_config(DEMO, overrides))
    assert [(m.name, m.weights, m.path) for m in recipe.frozen] == models and recipe.moves_all
    assert recipe.kl.shared == (len(models) == 1 and models[0][0] == "teacher")


def test_first_distillation_then_the_method():
    recipe = resolve(load_config(DEMO, ["credit=opsd+gear", "distill.until_step=3", "train.steps=9", "teacher.weights=initial"]))
    first, then = recipe.at(3), recipe.at(4)
    assert first.distillation.alone and first.distillation.coefficient == 1.0 and not first.needs_teacher and first.moves_all
    assert then.distillation is None and then.needs_teacher and not then.moves_all and then.method == recipe.method
    assert recipe.jsd_beta == 0.5 and {m.name for m in recipe.frozen} == {"teacher"}, "both parts' needs are met by one engine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.importance_mode=mask", "train.importance_cap=null"], "importance_cap=null switches importance weights off"),
        (["train.importance_floor=2"], "importance_floor=2.0 is not below train.importance_cap=2.0"),
        (["train.policy_loss=cispo", "train.dual_clip=3"], "dual_clip bounds the clipped surrogate"),
        (["train.overlong_length=30"], "overlong_length is read with train.overlong_buffer alone"),
        (["train.overlong_buffer=41"], "overlong_buffer=41 is longer than the 40 tokens"),
        (["train.std_advantages=false"], "train.std_advantages: it is train.advantages .*dr_grpo.* now"),
        (["kl.estimator=k4"], "kl.estimator='k4'"),
        (["credit=gear", "distill.until_step=3"], "credit=gear is not a distillation loss and the method that follows it"),
        (["credit=opsd", "distill.until_step=3"], "give both, as credit=opsd\\+grpo"),
        (["credit=opsd+gear", "distill.until_step=60"], "train.steps=60 ends before the method's turn"),
        (["teacher.wrong_hint=true"], "set teacher.sees=sibling"),
        (["teacher.wrong_hint=true", "credit=sc_grpo"], "reads no signal that could be corrected"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_does_not_go_together_is_one_clear_error(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(DEMO, overrides))


@pytest.mark.parametrize("reference", ["inital", "./nowhere", "builtin:tiny-qwen3"])
def test_a_reference_model_that_is_not_there(reference):
    with pytest.raises(ConfigError, match=f"kl.reference={reference}: no such directory"):
        check_reference(load_config(DEMO), reference)


def test_a_reference_model_of_another_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 96}')
    with pytest.raises(
        ConfigError, match="its vocabulary has 96 tokens, that of model.path=Qwen/Qwen3-8B 151936: give a model of"
    ):
        check_reference(load_config(DEMO, ["model.path=Qwen/Qwen3-8B"]), str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.policy_loss=gspo"], "sequence's ratio stays close to 1"),
        (["kl.coefficient=0.1", "kl.estimator=k1"], "k1 has no gradient on average"),
    ],
)
def test_what_is_likely_not_meant_is_said(overrides, line):
    cfg = load_config(DEMO, overrides)
    assert line in " ".join(warnings(cfg, resolve(cfg))) and not warnings(load_config(DEMO), resolve(load_config(DEMO)))
