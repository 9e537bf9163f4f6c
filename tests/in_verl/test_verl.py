"""verl 0.9.1 with the operators in it: the fused head, the trainer mode gear_sync, and how verl finds them.

Run by `make test-verl` in an environment of its own: verl's pins clash with the other tests'. Its configuration, its jagged rows
and its trainer's own code are the real ones; TransferQueue is a dictionary behind its four calls, once TransferQueue itself; the
worker group scores with a tiny model, for verl's engines need a GPU.
"""

import copy
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transfer_queue as tq
import verl
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from tensordict import TensorDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transfer_queue import KVBatchMeta
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.experimental import torch_functional
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from gear_kernels import Gear, GearKernelsError, credit_weights

THEIRS = torch_functional.FusedLinearForPPO  # before the import below puts ours in its place

from gear_kernels.integrations import verl as gear_verl  # noqa: E402
from gear_kernels.integrations import verl_head  # noqa: E402

torch_functional.FusedLinearForPPO = THEIRS
ROOT = Path(__file__).parents[2]
TEMPERATURE = 0.7


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype)


# --- 1: the fused head ---------------------------------------------------------------------------------------------------------


def through_the_fused_head(monkeypatch, head, dtype):
    """Log-probs, entropy, and gradients by name, of verl's patched forward with this class as its head."""
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)  # put back after the test
    model = tiny(dtype)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", head)
    ids = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, temperature=TEMPERATURE, return_dict=True)
    draw = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 19, generator=draw), torch.randn(2, 19, generator=draw)
    (a * out.log_probs).sum().add((b * out.entropy.float()).sum()).backward()
    return out.log_probs, out.entropy, {name: p.grad for name, p in model.named_parameters()}


def test_verls_forward_gives_the_same_with_our_head(monkeypatch):
    theirs = through_the_fused_head(monkeypatch, THEIRS, torch.float32)
    ours = through_the_fused_head(monkeypatch, verl_head.GearLinearForPPO, torch.float32)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=1e-5)
    assert len(ours[2]) > 20
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_in_bfloat16_our_entropy_is_float32_and_nearer_to_the_truth():
    """verl's is rounded to the weights' dtype, its logits too."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=draw).bfloat16()
    weight, ids = torch.randn(97, 32, generator=draw).bfloat16(), torch.randint(0, 97, (64,), generator=draw)
    logprobs = (hidden.double() @ weight.double().T / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1)
    ours, theirs = (head().forward(hidden, weight, ids, TEMPERATURE) for head in (verl_head.GearLinearForPPO, THEIRS))
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for mine, other, true in zip(ours, theirs, (chosen, entropy), strict=True):
        assert (mine - true).abs().max() < 1e-4
        assert (mine - true).abs().max() < 0.1 * (other - true).abs().max()


def test_patching_takes_the_place_that_verl_looks_at(monkeypatch):
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", THEIRS)
    verl_head.patch_fused_head()
    assert torch_functional.FusedLinearForPPO is verl_head.GearLinearForPPO


# --- 2: gear_sync --------------------------------------------------------------------------------------------------------------


class Dictionary:
    """TransferQueue's four calls over a dictionary: rows by partition and key; tensors come back jagged, as they do there."""

    def __init__(self):
        self.rows, self.tags = {}, {}

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        held = self.rows.setdefault(partition_id, {})
        for i, key in enumerate(keys):
            row = held.setdefault(key, {})
            if fields is not None:
                for name in fields.keys():  # noqa: SIM118 - a TensorDict
                    row[name] = gear_verl._listed(fields.get(name))[i]
            if tags is not None:
                self.tags.setdefault(partition_id, {})[key] = tags[i]
        names = list(dict.fromkeys(name for key in keys for name in held[key]))
        return KVBatchMeta(
            keys=list(keys), tags=[self.tags[partition_id][key] for key in keys], partition_id=partition_id, fields=names
        )

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        rows = [self.rows[partition_id][key] for key in keys]
        names = rows[0] if select_fields is None else [name for name in select_fields if name in rows[0]]
        data = list_of_dict_to_tensordict([{name: row[name] for name in names} for row in rows])
        for name in names:
            if isinstance(rows[0][name], torch.Tensor) and rows[0][name].dim():
                data[name] = torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
        return data

    def kv_list(self, partition_id=None):
        return {name: held for name, held in self.tags.items() if partition_id in (None, name)}

    def kv_clear(self, keys, partition_id):
        for key in keys:
            self.rows[partition_id].pop(key)
            self.tags.get(partition_id, {}).pop(key, None)


@pytest.fixture(scope="module")
def real_queue():
    """TransferQueue as verl starts it, over a Ray of its own. Its controller and storage units ask for a core each, and wait for
    ever for one that Ray does not count: eight are counted, however many there are."""
    import ray

    ray.init(num_cpus=8, include_dashboard=False, logging_level="ERROR")
    tq.init()
    yield
    tq.close()
    ray.shutdown()


@pytest.fixture(params=["dictionary", "TransferQueue"])
def queue(request, monkeypatch):
    if request.param == "TransferQueue":
        request.getfixturevalue("real_queue")
        return tq
    made = Dictionary()
    for name in ("kv_batch_put", "kv_batch_get", "kv_list", "kv_clear"):
        monkeypatch.setattr(tq, name, getattr(made, name))
    return made


class Workers:
    """A worker group that scores as verl's does: log-probs and entropy of every position's next token, jagged, into the queue."""

    def __init__(self, model):
        self.model, self.calls = model, []

    @torch.no_grad()
    def compute_log_prob(self, batch):
        self.calls.append((batch.partition_id, dict(batch.extra_info)))
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["input_ids", "position_ids"])
        ids, positions = data["input_ids"], data["position_ids"]
        assert torch.equal(ids.offsets(), positions.offsets())
        scored = [scores(self.model, x, p) for x, p in zip(ids.unbind(), positions.unbind(), strict=True)]
        names = ["log_probs", *(["entropy"] if batch.extra_info["calculate_entropy"] else [])]
        columns = {
            name: torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
            for name, rows in zip(names, zip(*scored, strict=True), strict=False)
        }
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(columns, batch_size=len(batch)))
        return batch


def scores(model, ids, positions=None):
    """Log-probs and entropy [t], nats: at place i, of the token that follows (behind the last: of any, as verl has it)."""
    given = None if positions is None else positions[None]
    logprobs = (model(input_ids=ids[None], position_ids=given).logits[0].float() / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(1, ids.roll(-1)[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<end>", "tools", "A", "known", "good", "solution:", "Hint:"]
    words += [f"w{i}" for i in range(97 - len(words))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


@functools.cache
def composed():
    """verl's own configuration."""
    with initialize_config_dir(config_dir=str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer")


def configured(*overrides):
    """The same with the keys of a gear_sync run, and these."""
    made = copy.deepcopy(composed())
    with open_dict(made):
        made.merge_with_dotlist(
            [
                "trainer.v1.trainer_mode=gear_sync",
                "algorithm.adv_estimator=grpo",
                "actor_rollout_ref.rollout.n=2",
                f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
                *(override.removeprefix("+") for override in overrides),
            ]
        )
    return made


def trainer(tokenizer, *overrides):
    made = get_trainer_cls("gear_sync")(configured(*overrides))
    made.tokenizer, made.timing_raw, made.global_steps = tokenizer, {}, 1
    made.actor_rollout_wg = Workers(tiny())
    return made


LENGTHS = (5, 9, 4, 7)  # of the responses: two prompts, two rollouts each
REWARDS = (1.0, 0.0, 0.0, 1.0)


@pytest.fixture
def batch(queue, tokenizer):
    """Two groups of two rollouts as verl's agent loop writes them, prompts with tools in front; the last response has a tool's
    tokens in it; and a row that verl added to fill the batch up.
    """
    draw = torch.Generator().manual_seed(3)
    keys, rows, tags = [], [], []
    for i, length in enumerate(LENGTHS):
        messages = [{"role": "user", "content": f"w{i // 2} w7 w8"}]
        prompt = torch.tensor(
            [1, 5, 5, 4, *tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)]
        )
        response, mask = torch.randint(11, 97, (length,), generator=draw), torch.ones(length, dtype=torch.int64)
        if i == 3:
            mask[2:4] = 0
        rows.append(row(f"u{i // 2}", prompt, response, mask, REWARDS[i], messages))
        keys.append(f"u{i // 2}_{i % 2}_0")
        tags.append({"seq_len": len(prompt) + length})
    rows.append(row("pad", torch.full((6,), 4), torch.tensor([4]), torch.zeros(1, dtype=torch.int64), 0.0, messages))
    keys.append("pad_0_0")
    tags.append({"is_padding": True, "seq_len": 7})
    made = tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows), tags=tags)
    yield made
    tq.kv_clear(keys=keys, partition_id="train")


def row(uid, prompt, response, mask, reward, messages):
    ids, scored = torch.cat([prompt, response]), torch.zeros(len(response))
    scored[-1] = reward
    return {
        "uid": uid, "prompts": prompt, "responses": response, "response_mask": mask, "loss_mask": mask, "input_ids": ids,
        "position_ids": torch.arange(len(ids)), "rm_scores": scored, "rollout_log_probs": torch.full((len(response),), -3.0),
        "raw_prompt": messages, "multi_modal_inputs": {},
        "reward_model": {"ground_truth": f"w{20 + int(uid[1:])}" if uid[0] == "u" else ""}, "num_turns": 2,
    }  # fmt: skip


def by_hand(model, batch, method, hint="A known good solution: w{}"):
    """Signal, entropies and token advantages, packed, from plain forwards and the GRPO formula."""
    data = tq.kv_batch_get(keys=batch.keys[:4], partition_id="train", select_fields=["prompts", "responses", "response_mask"])
    words = {"A": 6, "known": 7, "good": 8, "solution:": 9, "Hint:": 10}
    signal, entropy, unsure = [], [], []
    for i, (prompt, response) in enumerate(zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True)):
        told = [words.get(word, 11 + int(word[1:]) if word[0] == "w" else -1) for word in hint.format(20 + i // 2).split()]
        taught = torch.cat([prompt[:-2], torch.tensor(told), prompt[-2:]])  # before the turn's end and the assistant's header
        n = len(response)
        with torch.no_grad():
            own, teacher = (scores(model, torch.cat([p, response])) for p in (prompt, taught))
        signal.append(own[0][-n - 1 : -1] - teacher[0][-n - 1 : -1])
        entropy.append(own[1][-n - 1 : -1])
        unsure.append(teacher[1][-n - 1 : -1])
    groups = torch.tensor(REWARDS).view(2, 2)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return credit_weights(
        torch.cat(signal),
        torch.cat(entropy),
        advantages,
        bounds,
        mask=data["response_mask"].values().bool(),
        method=method,
        teacher_entropy=torch.cat(unsure),
    )


def stepped(made, batch):
    metrics = {}
    batch = made._compute_old_log_prob(batch, metrics)
    batch = made._compute_advantage(batch, metrics)
    return tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages", "response_mask"]), metrics


def test_advantages_are_those_computed_by_hand(tokenizer, batch):
    made = trainer(tokenizer, "+gear.method=gear", "+gear.args.alpha=0.6")
    data, metrics = stepped(made, batch)
    want = by_hand(made.actor_rollout_wg.model, batch, Gear(alpha=0.6))
    assert want.weights.std() > 0.05 and (want.signal > 0).any()  # there is something to compare
    torch.testing.assert_close(data["advantages"].values()[:-1], want.token_advantages, rtol=1e-4, atol=1e-5)
    assert data["advantages"].values()[-1] == 0  # the row that fills the batch up
    assert torch.equal(data["advantages"].offsets(), data["response_mask"].offsets())
    assert not data["advantages"].values()[data["response_mask"].values() == 0].any()  # a tool's tokens
    for name, value in want.diagnostics.items():
        assert metrics[f"gear/{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    partitions = [partition for partition, _ in made.actor_rollout_wg.calls]
    assert partitions == ["train", gear_verl.TEACHER]  # one forward more than verl's own
    assert not tq.kv_list(gear_verl.TEACHER).get(gear_verl.TEACHER)
    assert "teacher_log_prob" in made.timing_raw


def test_a_method_that_reads_the_teachers_entropy_gets_it(tokenizer, batch):
    made = trainer(tokenizer, "+gear.method=egrsd")
    data, _ = stepped(made, batch)
    want = by_hand(made.actor_rollout_wg.model, batch, "egrsd")
    torch.testing.assert_close(data["advantages"].values()[:-1], want.token_advantages, rtol=1e-4, atol=1e-5)


def test_grpo_is_verls_own_and_asks_for_no_teacher(tokenizer, batch):
    made = trainer(tokenizer, "+gear.method=grpo")
    data, _ = stepped(made, batch)
    assert [partition for partition, _ in made.actor_rollout_wg.calls] == ["train"]
    plain = configured("trainer.v1.trainer_mode=sync")
    theirs = get_trainer_cls("sync")(plain)
    theirs.actor_rollout_wg, theirs.tokenizer = made.actor_rollout_wg, tokenizer
    other, _ = stepped(theirs, batch)
    assert torch.equal(data["advantages"].values(), other["advantages"].values()) and other["advantages"].values().any()


def hinted(row):
    """A user's teacher prompt, found by its name in the configuration."""
    return [{**row["raw_prompt"][-1], "content": f"{row['raw_prompt'][-1]['content']} Hint: w{20 + int(row['uid'][1:])}"}]


def as_ids(row):
    return torch.cat([row["prompts"][:-2], torch.tensor([10, 31 + int(row["uid"][1:])]), row["prompts"][-2:]])


def unchanged(row):
    return row["raw_prompt"]


@pytest.mark.parametrize("function", ("hinted", "as_ids"))
def test_a_users_teacher_prompt_is_messages_or_token_ids(tokenizer, batch, function):
    made = trainer(tokenizer, f"+gear.teacher_prompt={__name__}.{function}")
    data, _ = stepped(made, batch)
    want = by_hand(made.actor_rollout_wg.model, batch, "gear", hint="Hint: w{}")
    torch.testing.assert_close(data["advantages"].values()[:-1], want.token_advantages, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_tells_nothing_is_refused(tokenizer, batch):
    made = trainer(tokenizer, f"+gear.teacher_prompt={__name__}.unchanged")
    with pytest.raises(GearKernelsError, match="signal would be 0"):
        made._compute_old_log_prob(batch, {})


def test_a_prompt_of_another_shape_is_refused():
    assert gear_verl.spliced([9, 1, 2, 3], [1, 2, 3], [1, 7, 3]) == [9, 1, 7, 3]
    assert gear_verl.spliced([9, 1, 2], [1, 2], [1, 2, 5]) == [9, 1, 2, 5]
    with pytest.raises(GearKernelsError, match="does not end as the chat template"):
        gear_verl.spliced([9, 1, 2, 3, 4], [1, 2, 3], [1, 7, 3])


@pytest.mark.parametrize(
    "override, message",
    [
        ("+gear.method=sc_grpo", "sc_grpo.* reads forward_kl, which verl's gear_sync does not have"),
        ("+gear.metod=gear", "given metod; expected keys out of method"),
        ("+gear.args.alpah=1", "alpah"),
        ("algorithm.adv_estimator=gae", "adv_estimator=gae"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_work_starts(override, message):
    with pytest.raises(GearKernelsError, match=message):
        get_trainer_cls("gear_sync")(configured(override))


def test_it_is_verls_synchronous_trainer_in_all_but_credit(tokenizer):
    """verl asks for the mode's name where it chooses the buffer and what a checkpoint holds."""
    ours, theirs = trainer(tokenizer), get_trainer_cls("sync")(configured("trainer.v1.trainer_mode=sync"))
    assert type(ours.replay_buffer) is type(theirs.replay_buffer)
    assert ours.trainer_mode == theirs.trainer_mode == "sync"


def test_the_command_on_the_page_is_one_that_verls_configuration_takes():
    page = (ROOT / "docs" / "verl.md").read_text()
    command = re.search(r"verl\.trainer\.main_ppo \\\n(.*?)```", page, re.S)[1]
    overrides = shlex.split(command.replace("\\\n", " "))
    with initialize_config_dir(config_dir=str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert gear_verl.settings(config)[0].method == Gear() and config.actor_rollout_ref.model.use_fused_kernels
    modules = re.search(r"export VERL_USE_EXTERNAL_MODULES=(\S+)", page)[1]
    assert modules == config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES


# --- 3: how verl finds them ----------------------------------------------------------------------------------------------------


def test_the_environment_variable_registers_the_mode_and_the_head():
    """In a fresh process, as each of Ray's workers is one."""
    code = (
        "import verl\n"
        "from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls\n"
        "from verl.utils.experimental.torch_functional import FusedLinearForPPO\n"
        "trainer = get_trainer_cls('gear_sync')\n"
        "assert issubclass(trainer, PPOTrainerSync)\n"
        "print(trainer.__module__, trainer.__name__, FusedLinearForPPO.__name__)\n"
    )
    modules = "gear_kernels.integrations.verl,gear_kernels.integrations.verl_head"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": modules, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["gear_kernels.integrations.verl", "GearSync", "GearLinearForPPO"]
