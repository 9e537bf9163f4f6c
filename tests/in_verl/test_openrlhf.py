"""OpenRLHF 0.11.2's experience maker with the teacher in it: its own file and data class, between stand-ins of what they import.

Its packages' own imports need GPUs and flash-attn, so the packages are bare shells that hold the files that are read. A group of
Ray's actors is one object here that runs the method on a tiny model, as `execute_batch` does on each item of the lists.
"""

import importlib.machinery
import importlib.util
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import ray
import torch

from gear_kernels import Gear, GearKernelsError, credit_weights


def _shells():
    """OpenRLHF's packages without what their __init__ imports, and stand-ins of what the files read here import besides."""
    home = Path(importlib.util.find_spec("openrlhf").origin).parent
    for name in ("utils", "models", "trainer", "trainer.ray", "trainer.ppo_utils"):
        shell = types.ModuleType(f"openrlhf.{name}")
        shell.__path__ = [str(home.joinpath(*name.split(".")))]
        sys.modules[shell.__name__] = shell
    sys.modules["openrlhf.trainer.ray.launcher"] = types.SimpleNamespace(RayActorGroup=object)
    deepspeed = types.ModuleType("deepspeed")
    deepspeed.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)  # transformers asks whether there is one
    sys.modules.setdefault("deepspeed", deepspeed)


_shells()
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

from gear_kernels.integrations import openrlhf as gear_openrlhf  # noqa: E402

WORDS = {"w": 3, "Hint": 4, "<user>": 5, "<end>": 6}
PROMPTS = ["<user> w <end>", "<user> w w w <end>"]
RESPONSES = [[11, 12, 13, 14], [15, 16], [17, 18, 19], [20, 21, 22, 23, 24]]  # two prompts, two rollouts each
REWARDS = [1.0, 0.0, 0.0, 1.0]


class Words:
    """A tokenizer of words; L7 is token 37."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [WORDS.get(word) or 30 + int(word[1:]) for word in text.split()]}


def told(prompt, label):
    return prompt.replace("<end>", f"Hint {label} <end>")


class Model(torch.nn.Module):
    """OpenRLHF's Actor in what its forward returns, over a recurrent toy that reads all tokens before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.net, self.out = (
            torch.nn.Embedding(50, 16),
            torch.nn.GRU(16, 16, batch_first=True),
            torch.nn.Linear(16, 50),
        )

    def forward(self, sequences, action_mask, attention_mask, ring_attn_group=None, return_output=False, return_entropy=False):
        logprobs = self.out(self.net(self.embed(sequences))[0]).mul(4).log_softmax(-1)
        chosen = logprobs.gather(-1, sequences.roll(-1, 1)[..., None]).squeeze(-1)[:, :-1]
        output = types.SimpleNamespace(entropy=-(logprobs.exp() * logprobs).sum(-1)[:, :-1])
        chosen = chosen[:, -action_mask.shape[1] :] * action_mask.float()
        return (chosen, output) if return_output else chosen


class PolicyModelActor:
    def __init__(self, model, strategy):
        self.actor, self.strategy = model, strategy

    @torch.no_grad()
    def forward(self, sequences, action_mask=None, attention_mask=None, packed_seq_lens=None, mm_train_inputs_list=None):
        return self.actor(sequences, action_mask, attention_mask, ring_attn_group=self.strategy.ring_attn_group)


class GearActor(gear_openrlhf.EntropyForward, PolicyModelActor):
    pass


class Group:
    """RayActorGroup with one actor in this process."""

    def __init__(self, actor):
        self.actor, self.calls = actor, []

    def async_run_method_batch(self, method_name, **kwargs):
        self.calls.append(method_name)
        items = (dict(zip(kwargs, values, strict=True)) for values in zip(*kwargs.values(), strict=True))
        return [[getattr(self.actor, method_name)(**item) for item in items]]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(ray, "put", lambda x: x)
    monkeypatch.setattr(ray, "get", lambda x: x)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def arguments(estimator="group_norm", use_loss=False):
    return Namespace(
        algo=Namespace(
            advantage=Namespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False),
            kl=Namespace(use_loss=use_loss, estimator="k1"),
        ),
        train=Namespace(dynamic_batch_enable=False, colocate_all=False, colocate_actor_ref=False, colocate_critic_reward=False),
        rollout=Namespace(n_samples_per_prompt=2, micro_batch_size=2),
        reward=Namespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
        ds=Namespace(ring_attn_size=1, tensor_parallel_size=1),
    )


def maker(kind=gear_openrlhf.GearExperienceMaker, actor=GearActor, reference=None, args=None, **kwargs):
    strategy = Namespace(args=args or arguments(), ring_attn_group=None)
    group = Group(actor(Model(), strategy))
    return kind(group, None, None, reference, Namespace(value=0.0), strategy, Words(), **kwargs)


def samples():
    """Rollouts as OpenRLHF's generator makes them, one a time; the last one's third token is the environment's."""
    out = []
    for i, response in enumerate(RESPONSES):
        prompt = PROMPTS[i // 2]
        own = Words()(prompt, False)["input_ids"]
        ids = torch.tensor([*own, *response])
        mask = torch.tensor([*[0] * len(own), *[1] * len(response)])
        if i == 3:
            mask[len(own) + 2] = 0
        out.append(
            Experience(
                sequences=ids[None], attention_mask=torch.ones_like(ids)[None], action_mask=mask[None, 1:], prompts=[prompt],
                labels=[f"L{i // 2}"], images=[None], mm_train_inputs=[None], rewards=torch.tensor([REWARDS[i]]),
                scores=torch.tensor([REWARDS[i]]), response_length=torch.tensor([len(response)]), truncated=torch.tensor([False]),
                total_length=torch.tensor([len(ids)]), info={"reward": torch.tensor([REWARDS[i]])},
            )
        )  # fmt: skip
    return out


def by_hand(model, method):
    """Each response's advantages, packed: from the model itself, one row at a time, and the group's normalised rewards."""
    signal, entropy, masks = [], [], []
    for i, response in enumerate(RESPONSES):
        rows = []
        for prompt in (PROMPTS[i // 2], told(PROMPTS[i // 2], f"L{i // 2}")):
            ids = torch.tensor([[*Words()(prompt, False)["input_ids"], *response]])
            with torch.no_grad():
                rows.append(model(ids, torch.ones_like(ids[:, 1:]), None, return_output=True))
        n = len(response)
        signal.append(rows[0][0][0, -n:] - rows[1][0][0, -n:])
        entropy.append(rows[0][1].entropy[0, -n:])
        masks.append(torch.tensor([not (i == 3 and t == 2) for t in range(n)]))
    groups = torch.tensor(REWARDS).view(2, 2)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-9)).flatten()
    bounds = torch.tensor([0, *map(len, RESPONSES)]).cumsum(0).int()
    return credit_weights(torch.cat(signal), torch.cat(entropy), advantages, bounds, mask=torch.cat(masks), method=method)


def responses(experiences):
    rows = [(e.advantages[b], e.attention_mask[b]) for e in experiences for b in range(len(e.sequences))]
    return torch.cat([row[: int(mask.sum()) - 1][-len(r) :] for (row, mask), r in zip(rows, RESPONSES, strict=True)])


def test_advantages_are_those_computed_by_hand():
    made = maker(teacher_prompt=told, credit=Gear(alpha=0.6))
    experiences = made.make_experience_batch(samples())
    want = by_hand(made.actor_model_group.actor.actor, Gear(alpha=0.6))
    assert want.weights.std() > 0.05
    torch.testing.assert_close(responses(experiences), want.token_advantages, rtol=1e-4, atol=1e-5)
    for experience in experiences:
        assert experience.advantages.shape == experience.action_mask.shape
        assert not experience.advantages[experience.action_mask == 0].any()
        for name, value in want.diagnostics.items():
            assert experience.info[f"gear/{name}"].shape == (2,)
            torch.testing.assert_close(experience.info[f"gear/{name}"], value.expand(2), rtol=1e-4, atol=1e-5)
    assert made.actor_model_group.calls == ["forward_with_entropy", "forward"]  # one forward more than OpenRLHF's own


def test_a_method_without_entropy_runs_on_openrlhfs_own_actor():
    made = maker(actor=PolicyModelActor, teacher_prompt=told, credit="rlsd")
    experiences = made.make_experience_batch(samples())
    want = by_hand(made.actor_model_group.actor.actor, "rlsd")
    torch.testing.assert_close(responses(experiences), want.token_advantages, rtol=1e-4, atol=1e-5)
    assert made.actor_model_group.calls == ["forward", "forward"]


def test_grpo_gives_openrlhfs_own_advantages():
    ours = maker(actor=PolicyModelActor, credit="grpo")
    mine = ours.make_experience_batch(samples())
    theirs = maker(RemoteExperienceMaker, PolicyModelActor).make_experience_batch(samples())
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.advantages, b.advantages * b.action_mask) and torch.equal(a.returns, b.returns)
    assert ours.actor_model_group.calls == ["forward"]


def test_the_experience_still_splits_into_samples():
    """What OpenRLHF does with it next."""
    from openrlhf.trainer.ppo_utils.experience import split_experience_batch

    items = [x for e in maker(teacher_prompt=told).make_experience_batch(samples()) for x in split_experience_batch(e)]
    assert len(items) == len(RESPONSES) and items[0].info["gear/mean_signal"].dim() == 0


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "teacher_prompt"),
        ({"teacher_prompt": told, "credit": "sgcd"}, "sgcd.*OpenRLHF"),
        ({"teacher_prompt": told, "args": arguments("gae")}, "estimator=gae"),
        ({"teacher_prompt": told, "reference": object()}, "KL penalty in the reward"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_work_starts(given, message):
    with pytest.raises(GearKernelsError, match=message):
        maker(**given)


def test_prompts_that_tell_nothing_or_were_changed_are_refused():
    with pytest.raises(GearKernelsError, match="signal would be 0"):
        maker(teacher_prompt=lambda prompt, label: prompt).make_experience_batch(samples())
    changed = samples()
    changed[0].prompts = ["w w <end>"]
    with pytest.raises(GearKernelsError, match="does not begin with its prompt"):
        maker(teacher_prompt=told).make_experience_batch(changed)
