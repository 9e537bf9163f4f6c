"""TRL's trainers with this package's head and credit: on the CPU, with a tiny model, beside TRL's own."""

import importlib.util
import json
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import import_utils

    import_utils.is_vllm_available = lambda *_, **__: False  # it would be imported for nothing: 8 s
    from datasets import Dataset
    from trl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        RLOOConfig,
        RLOOTrainer,
        SFTConfig,
        SFTTrainer,
    )
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils as trl_utils

from gear_kernels import Gear, GearKernelsError, credit_weights
from gear_kernels.integrations.trl import GearGRPOTrainer, GearLogProb, use_gear_head
from gear_kernels.methods import METHODS

EXAMPLE = Path(__file__).parents[1] / "examples" / "trl_grpo_gear"


def load(name):
    spec = importlib.util.spec_from_file_location(f"trl_grpo_gear_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = load("tiny")


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def hinted(row):
    return [{"role": "user", "content": tiny.HINT.format(answer=row["answer"]) + row["prompt"][0]["content"]}]


def digits(completions, answer, **_):
    """Graded, so that a model that knows nothing gets different rewards."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) - 0.5 * abs(len(text) - len(a)) for text, a in zip(texts, answer, strict=True)]


COMMON = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True)


def config(tmp_path, **changes):
    args = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=2, logging_steps=1)
    args |= dict(learning_rate=1e-2, temperature=0.9, **COMMON, **changes)
    return GRPOConfig(str(tmp_path), **args)


def grpo(tmp_path, tok, cls=GRPOTrainer, config_changes=None, **own):
    model = own.pop("model", None) or tiny.model(tok)
    args = config(tmp_path, **(config_changes or {}))
    return cls(model, digits, args=args, train_dataset=tiny.rows(16, 0), processing_class=tok, **own)


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# --- the head ------------------------------------------------------------------------------------------------------------------

SHAPES = {"plain": (None, None, 1.0), "bias, softcap, scale": (True, 5.0, 0.5)}


def head_call(kind, dtype=torch.float32, n=33, v=300, d=16, requires=True):
    draw = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(n, d, generator=draw).to(dtype), torch.randn(v, d, generator=draw).to(dtype)
    bias, softcap, scale = SHAPES[kind]
    bias = torch.randn(v, generator=draw).to(dtype) if bias else None
    logits = hidden.float() @ weight.float().t() + (0 if bias is None else bias.float())
    targets = torch.where(torch.arange(n) % 3 == 0, torch.randint(v, (n,), generator=draw), logits.argmax(-1))
    tensors = [None if x is None else x.requires_grad_(requires) for x in (hidden, weight, bias)]
    return (*tensors, targets, 0.7, 64, softcap, scale)


def outputs_and_gradients(function, call, entropy=True):
    out = function.apply(*call)
    loss = (2.0 * out[0]).sum() + (0.5 * out[1].sum() if entropy else 0)
    return [*out, *torch.autograd.grad(loss, [x for x in call[:3] if x is not None and x.requires_grad])]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("entropy", (True, False))
def test_the_head_has_trls_outputs_and_gradients(kind, entropy):
    """All five outputs; is_top1 exactly."""
    call = head_call(kind)
    ours, theirs = (outputs_and_gradients(f, call, entropy) for f in (GearLogProb, ChunkedLogProbFunction))
    assert len(ours) == (8 if kind != "plain" else 7)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.dtype == its.dtype and mine.shape == its.shape
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-5)
    assert torch.equal(ours[4], theirs[4]) and ours[4].any() and not ours[4].all()


def test_of_equal_logits_the_first_is_top1_as_in_argmax():
    hidden, weight, _, _, *rest = head_call("plain", requires=False)
    weight[150:] = weight[:150]
    first = (hidden @ weight.t())[:, :150].argmax(-1)
    targets = torch.where(torch.arange(33) % 2 == 0, first, first + 150)
    top = GearLogProb.apply(hidden, weight, None, targets, *rest)[4]
    assert torch.equal(top, torch.arange(33) % 2 == 0)


def test_outputs_that_are_not_asked_for_are_none():
    out = GearLogProb.apply(*head_call("plain"), ("log_probs",))
    assert out[0].requires_grad and out[1:] == (None,) * 4


@pytest.mark.parametrize("kind", SHAPES)
def test_in_bfloat16_the_head_is_nearer_to_float64_than_trls(kind):
    call = head_call(kind, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() if x is not None else None for x in call[:3]]
    z = (wide[0] @ wide[1].t() + (0 if wide[2] is None else wide[2])) * call[7]
    z = (z if call[6] is None else call[6] * torch.tanh(z / call[6])) / 0.7
    log_p = z.log_softmax(-1)
    logprobs, entropy = log_p.gather(-1, call[3][:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    truth = [logprobs, entropy, *torch.autograd.grad((2 * logprobs + 0.5 * entropy).sum(), [x for x in wide if x is not None])]
    for i, exact in zip((0, 1, 5, 6, 7), truth, strict=False):
        mine, its = (
            (outputs_and_gradients(f, call)[i].double() - exact).abs().mean() for f in (GearLogProb, ChunkedLogProbFunction)
        )
        assert mine < its, i


def test_autocast_casts_the_head_as_in_trl():
    call = head_call("plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = GearLogProb.apply(*call)
    gradients = torch.autograd.grad(out[0].sum(), call[:2])
    half = [call[0].detach().bfloat16().requires_grad_(), call[1]]  # as a layer under autocast leaves hidden states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = GearLogProb.apply(*half, *call[2:])
    assert torch.equal(mixed[0], out[0])
    assert torch.equal(torch.autograd.grad(mixed[0].sum(), half)[1], gradients[1])
    rounded = [x.detach().bfloat16().requires_grad_() for x in call[:2]]
    again = GearLogProb.apply(*rounded, *call[2:])
    assert torch.equal(out[0], again[0])
    for mine, its in zip(gradients, torch.autograd.grad(again[0].sum(), rounded), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, its.float())


def test_a_frozen_head_gets_no_gradient():
    call = head_call("plain")
    call[1].requires_grad_(False)
    out = GearLogProb.apply(*call)
    out[0].sum().backward()
    assert call[0].grad is not None and call[1].grad is None


def test_a_head_that_is_whole_in_forward_and_in_the_gather_of_backward_alone_is_enough(monkeypatch):
    """As ZeRO-3 has it: the parameter's data is gone in between."""
    import gear_kernels.integrations.trl as integration

    call, again = head_call("bias, softcap, scale"), head_call("bias, softcap, scale")
    want = outputs_and_gradients(GearLogProb, again)
    whole = [x.data for x in call[1:3]]

    @contextmanager
    def gather(*parameters):
        for parameter, data in zip(parameters, whole, strict=True):
            parameter.data = data
        yield

    monkeypatch.setattr(integration, "maybe_gather_lm_head_ctx", gather)
    out = GearLogProb.apply(*call)
    for parameter in call[1:3]:
        parameter.data = torch.empty(0)
    got = torch.autograd.grad((2.0 * out[0]).sum() + 0.5 * out[1].sum(), call[:3])
    for mine, its in zip(got, want[5:], strict=True):
        assert torch.equal(mine, its)


def test_the_switch_puts_back_what_was_there():
    own = trl_utils._ChunkedLogProbFunction
    with use_gear_head():
        assert trl_utils._ChunkedLogProbFunction is GearLogProb
    assert trl_utils._ChunkedLogProbFunction is own
    switch = use_gear_head()
    assert trl_utils._ChunkedLogProbFunction is GearLogProb
    switch.restore()
    assert trl_utils._ChunkedLogProbFunction is own


def said(content):
    return [{"role": "assistant", "content": content}]


def paired(trainer, args, tmp_path, tok, rows, **own):
    """A trainer of two steps on rows of answers. own: beside the model and the data."""
    options = dict(per_device_train_batch_size=8, max_steps=2, logging_steps=1, learning_rate=1e-2, **COMMON)
    data = Dataset.from_list(rows)
    return trainer(tiny.model(tok), args=args(str(tmp_path), **options), train_dataset=data, processing_class=tok, **own)


def sft(tmp_path, tok):
    rows = [{"prompt": row["prompt"], "completion": said(row["answer"])} for row in tiny.rows(16, 0)]
    return paired(SFTTrainer, SFTConfig, tmp_path, tok, rows)


def dpo(tmp_path, tok):
    rows = [{"prompt": row["prompt"], "chosen": said(row["answer"]), "rejected": said("?")} for row in tiny.rows(16, 0)]
    return paired(DPOTrainer, DPOConfig, tmp_path, tok, rows, ref_model=tiny.model(tok))


def kto(tmp_path, tok):
    rows = [
        {"prompt": row["prompt"], "completion": said(text), "label": text != "?"}
        for row in tiny.rows(16, 0)
        for text in (row["answer"], "?")
    ]
    return paired(KTOTrainer, KTOConfig, tmp_path, tok, rows, ref_model=tiny.model(tok))


def rloo(tmp_path, tok):
    args = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=2, logging_steps=1)
    args = RLOOConfig(str(tmp_path), learning_rate=1e-2, beta=0.0, **args, **COMMON)
    return RLOOTrainer(tiny.model(tok), digits, args=args, train_dataset=tiny.rows(16, 0), processing_class=tok)


@pytest.mark.slow
@pytest.mark.parametrize("make", (sft, dpo, kto, rloo, grpo))
def test_trls_trainers_train_the_same_model_with_the_head(make, tmp_path, tok):
    plain = make(tmp_path, tok)
    plain.train()
    calls = []

    class Counted:
        @staticmethod
        def apply(*arguments):
            calls.append(arguments[0].shape)
            return GearLogProb.apply(*arguments)

    with use_gear_head() as switch:
        trl_utils._ChunkedLogProbFunction = Counted
        ours = make(tmp_path, tok)
        ours.train()
    assert switch and len(calls) >= 2
    pairs = list(zip(plain.state.log_history, ours.state.log_history, strict=True))
    assert any("loss" in log for log, _ in pairs)
    for its, mine in pairs:
        for key in its.keys() & mine.keys() - {
            "train_runtime",
            "train_samples_per_second",
            "train_steps_per_second",
            "step_time",
        }:
            assert mine[key] == pytest.approx(its[key], rel=2e-3, abs=1e-5), key
    torch.testing.assert_close(weights_of(ours), weights_of(plain), rtol=1e-3, atol=1e-3)


# --- the trainer ---------------------------------------------------------------------------------------------------------------


def test_grpo_and_gear_without_redistribution_are_trls_own_trainer_bit_by_bit(tmp_path, tok):
    plain = grpo(tmp_path, tok)
    want = losses(plain)
    assert len(set(want)) == 2 and plain.state.log_history[0]["grad_norm"] > 0
    for credit in ("grpo", Gear(alpha=0.0)):
        ours = grpo(tmp_path, tok, GearGRPOTrainer, credit=credit, teacher_prompt=hinted)
        assert losses(ours) == want
        assert torch.equal(weights_of(ours), weights_of(plain))
        for its, mine in zip(plain.state.log_history, ours.state.log_history, strict=True):
            assert all(mine[key] == its[key] for key in its if "time" not in key and "per_second" not in key)


class Fixed:
    """A rollout function whose completions are given, with a tool's tokens in the third and nothing in the last."""

    completions = ([4, 5, 6, 1], [7, 8, 1], [9, 3, 3, 4, 5, 1], [2])
    env_mask = ([1, 1, 1, 1], [1, 1, 1], [1, 0, 0, 1, 1, 1], [1])

    def __call__(self, prompts, trainer):
        ids = trainer._tokenize_prompts(prompts)[0]
        zeros = [[0.0] * len(c) for c in self.completions]
        made = {"prompt_ids": ids, "completion_ids": list(self.completions), "logprobs": zeros}
        return {**made, "env_mask": list(self.env_mask)}


@pytest.fixture(scope="module")
def tools(tmp_path_factory, tok):
    """A trainer on the fixed completions, with its batch by method, and the full log-probs of student and teacher."""
    made = {}

    def batch(credit, signal=None, dropout=0.0, **changes):
        model = tiny.model(tok)
        model.config.attention_dropout = dropout
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        own = dict(credit=credit, signal=signal, teacher_prompt=hinted, rollout_func=Fixed(), model=model)
        reward = lambda completions, **_: [2.0, -1.0, 0.5, 1.0]  # noqa: E731
        folder = tmp_path_factory.mktemp("trl")
        args = config(folder, **changes)
        trainer = GearGRPOTrainer(
            own.pop("model"), reward, args=args, train_dataset=tiny.rows(16, 0), processing_class=tok, **own
        )
        trainer.model.train()
        rows = [trainer.train_dataset[0]] * 4
        made[credit] = trainer
        return trainer, rows, trainer._generate_and_score_completions(rows)

    return batch


def by_hand(trainer, rows, batch):
    """Each completion alone, without padding: log-softmax of the model's own logits behind either prompt."""
    found = []
    for row, ids in zip(rows, Fixed.completions, strict=True):
        both = []
        for prompt in (row["prompt"], hinted(row)):
            before = trainer._tokenize_prompts([prompt])[0][0]
            logits = trainer.model(input_ids=torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1] / 0.9
            both.append(logits.double().log_softmax(-1).detach())
        s, t = both
        at = torch.tensor(ids)[:, None]
        sampled = (s.gather(1, at) - t.gather(1, at)).squeeze(1)
        found.append(
            {
                "k1": sampled,
                "entropy": -(s.exp() * s).sum(-1),
                "teacher_entropy": -(t.exp() * t).sum(-1),
                "reverse_kl": (s.exp() * (s - t)).sum(-1),
                "forward_kl": (t.exp() * (t - s)).sum(-1),
            }
        )
    return {name: torch.cat([row[name] for row in found]).float() for name in found[0]}


SERVED = [name for name in METHODS if name not in ("turn", "gigpo")]


@pytest.mark.parametrize("credit", SERVED)
def test_token_advantages_are_those_of_hand_packed_rows(credit, tools):
    trainer, rows, batch = tools(credit)
    trainer.model.eval()
    stats = by_hand(trainer, rows, batch)
    method, signal = trainer._credit
    bounds = torch.tensor([0, *(len(c) for c in Fixed.completions)]).cumsum(0).int()
    mask = torch.tensor([on for row in Fixed.env_mask for on in row]).bool()
    turns = torch.tensor([0] * 4 + [0] * 3 + [0, 0, 0, 1, 1, 1] + [0])
    group = torch.tensor([2.0, -1.0, 0.5, 1.0])
    advantages = (group - group.mean()) / (group.std() + 1e-4)
    want = credit_weights(
        stats[signal] if signal else None,
        stats["entropy"],
        advantages,
        bounds,
        mask=mask,
        method=method.at(1) if hasattr(method, "at") else method,
        turn_ids=turns,
        teacher_entropy=stats["teacher_entropy"],
        forward_kl=stats["forward_kl"],
    )
    got = batch["advantages"]
    lengths = batch["completion_mask"].sum(1).tolist()
    packed = torch.cat([row[:n] for row, n in zip(got, lengths, strict=True)])
    assert got.shape == batch["completion_ids"].shape
    torch.testing.assert_close(packed, want.token_advantages, rtol=2e-4, atol=2e-4)
    assert not got[2, 1:3].any() and not got[batch["completion_mask"] == 0].any()
    policy = batch["completion_mask"] * batch["tool_mask"] == 1
    signs = got.sign() == advantages.sign()[:, None]
    assert signs[policy].all() or credit == "high_entropy"
    assert torch.equal(got[policy], advantages[:, None].expand_as(got)[policy]) == (credit == "grpo"), "it changed nothing"
    logged = trainer._metrics["train"]
    assert logged["gear/mean_signal"] and ("gear/teacher_prompts_changed" in logged) == (credit not in ("grpo", "high_entropy"))


def test_the_teacher_scores_the_students_completions(tools, tok):
    trainer, rows, batch = tools("gear")
    passes = []
    inner = GRPOTrainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda model, ids, mask, keep, **kw: (
        passes.append((ids, mask, keep)) or inner(trainer, model, ids, mask, keep, **kw)
    )
    batch = trainer._generate_and_score_completions(rows)
    (student, _, keep), (teacher, mask, same) = passes[-2:]
    assert keep == same == batch["completion_ids"].shape[1]
    assert torch.equal(student[:, -keep:], teacher[:, -keep:]) and torch.equal(student[:, -keep:], batch["completion_ids"])
    read = tok.batch_decode([row[on.bool()] for row, on in zip(teacher[:, :-keep], mask[:, :-keep], strict=True)])
    assert read == [hinted(row)[0]["content"] for row in rows]


def test_a_row_that_is_masked_as_a_whole_passes(tools):
    """TRL masks completions that were cut: here all but the two that end."""
    _, _, batch = tools("gear", mask_truncated_completions=True)
    assert batch["completion_mask"][3].sum() == 0 and not batch["advantages"][3].any()
    assert batch["advantages"].isfinite().all() and batch["advantages"][0].any()


def on_two_ranks(folder, deepspeed):
    """A trainer for two ranks, on given completions: what is sampled does not depend on the last bits of the weights."""
    args = config(folder, deepspeed=deepspeed, optim="sgd", max_grad_norm=1.0)
    args.learning_rate = 0.5
    own = dict(credit=Gear(alpha=0.4, kl_threshold=1e-4), teacher_prompt=hinted, rollout_func=Fixed())
    return GearGRPOTrainer(
        tiny.model(tokenizer := tiny.tokenizer()),
        digits,
        args=args,
        train_dataset=tiny.rows(16, 0),
        processing_class=tokenizer,
        **own,
    )


def test_both_signals_come_from_one_forward_of_each_prompt(tools):
    """rlsd reads k1: by log-probs of two passes, and with the full statistics of gear's reverse_kl beside."""
    trainer, rows, batch = tools("gear", signal="reverse_kl")
    student = (batch["prompt_ids"], batch["prompt_mask"])
    teacher, changed = trainer._teacher(rows, batch)
    names = ("logprobs", "teacher_logprobs", "entropy", "teacher_entropy", "reverse_kl", "forward_kl")
    trainer.model.eval()
    with torch.no_grad():
        both = trainer._both(batch, student, teacher, names)
        own, other = trainer._pass(batch, student), trainer._pass(batch, teacher)
    assert changed == 1
    pairs = zip(("logprobs", "entropy", "teacher_logprobs", "teacher_entropy"), (*own, *other), strict=True)
    for name, want in pairs:
        torch.testing.assert_close(both[name], want, rtol=1e-5, atol=1e-5)
    assert (both["reverse_kl"] > 0).sum() == (both["forward_kl"] > 0).sum() == batch["completion_mask"].sum()


@pytest.mark.slow
def test_zero_3_on_two_ranks_takes_the_steps_that_ddp_takes(server, tmp_path):
    ranks = server.call(log := tmp_path / "ranks.log", "trl_ranks:main", tmp_path)
    assert ranks.wait() == [0, 0], log.read_text()[-6000:]
    found = torch.load(tmp_path / "found.pt")
    assert found["ZeRO-3, sharded"] and not found["DDP, sharded"]
    start = weights_of(SimpleNamespace(model=tiny.model(tiny.tokenizer())))
    assert (found["DDP"] - start).abs().max() > 1e-2
    torch.testing.assert_close(found["ZeRO-3"], found["DDP"], rtol=1e-5, atol=1e-6)
    for its, mine in zip(found["DDP, log"], found["ZeRO-3, log"], strict=True):
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-6)
    assert found["ZeRO-3, log"][0]["gear/share_in_segments"] > 0


def test_dropout_is_no_signal(tools):
    """The teacher's prompt says nothing new to a model that is deaf to it; with dropout on, two passes would differ."""
    dry, wet = (tools("gear", dropout=p)[2]["advantages"] for p in (0.0, 0.5))
    torch.testing.assert_close(wet, dry, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("loss", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"))
def test_every_loss_of_trl_takes_advantages_by_token(loss, level, tools):
    trainer, _, batch = tools("grpo", loss_type=loss, importance_sampling_level=level)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        each = trainer._compute_loss(trainer.model, batch)
        plain = trainer._compute_loss(trainer.model, {**batch, "advantages": batch["advantages"][:, 0]})
    assert torch.equal(each, plain) and each != 0


def test_a_run_with_lora_a_reference_and_two_iterations_logs_and_evaluates_as_trl_does(tmp_path, tok):
    """The reference's pass runs through the policy too, its adapter off; the student's is TRL's own for the old log-probs."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    changes = dict(beta=0.1, num_iterations=2)
    trainer = grpo(tmp_path, tok, GearGRPOTrainer, changes, credit="gear", teacher_prompt=hinted, peft_config=lora)
    scored = []
    inner = trainer._pass
    trainer._pass = lambda batch, prompt: scored.append(prompt) or inner(batch, prompt)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {"gear/share_in_segments", "gear/mean_signal", "gear/mean_weight_positive", "kl"} <= logs[0].keys()
    assert logs[0]["gear/teacher_prompts_changed"] == 1 and logs[0]["gear/mean_signal"] != 0
    assert len(scored) == 1, "one pass beside TRL's: behind the teacher's prompt, once for both iterations"
    trainer.model.eval()
    batch = trainer._generate_and_score_completions([tiny.rows(4, 9)[0]] * 8)
    assert batch["advantages"].dim() == 1


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path, tok):
    for own, words in (
        (dict(credit="gear"), "credit 'gear' reads a teacher, and teacher_prompt is None"),
        (
            dict(credit="gigpo", teacher_prompt=hinted),
            "credit 'gigpo' reads anchors, groups, turn_rewards, which TRL does not have",
        ),
        (dict(credit="rlsd", signal="reverse_kl", teacher_prompt=hinted), "credit 'rlsd' with signal reverse_kl in TRL"),
        (dict(credit="geer", teacher_prompt=hinted), "method: given 'geer'"),
    ):
        with pytest.raises(GearKernelsError, match=words) as told:
            GearGRPOTrainer("no/such-model", digits, **own)
        assert "\n" not in str(told.value)
    trainer = grpo(tmp_path, tok, GearGRPOTrainer, credit="gear", teacher_prompt=lambda row: row["prompt"])
    with pytest.raises(GearKernelsError, match="teacher_prompt left every prompt of the first batch as the student's"):
        trainer.train()
    trainer._teacher_prompt, trainer._prompts = (lambda row: "?"), [[{"role": "user", "content": "3+4="}]]
    with pytest.raises(GearKernelsError, match="teacher_prompt gave a str; expected a list as the row's prompt"):
        trainer._teacher([tiny.rows(1, 0)[0]], {})


# --- the page and the example --------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_trains(tmp_path, tok):
    page = (Path(__file__).parents[1] / "docs" / "trl.md").read_text()
    names = dict(model=tiny.model(tok), reward=digits, dataset=tiny.rows(16, 0), tokenizer=tok)
    names["config"] = dict(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1, **COMMON)
    names["config"]["max_completion_length"] = 6
    own = trl_utils._ChunkedLogProbFunction
    try:
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(block, names)
        assert trl_utils._ChunkedLogProbFunction is GearLogProb
    finally:
        trl_utils._ChunkedLogProbFunction = own
    logged = names["trainer"].state.log_history[0]
    assert logged["gear/teacher_prompts_changed"] == 1 and logged["gear/share_above_threshold"] > 0


def test_the_example_reads_gsm8ks_form_and_judges_its_answers(tmp_path):
    train = load("train")
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "6 * 7?", "answer": "6 * 7 = 42\n#### 42"}) + "\n")
    row = train.gsm8k(str(tmp_path / "gsm8k.jsonl"))[0]
    assert row == {"prompt": [{"role": "user", "content": "6 * 7?"}], "answer": "42"}
    assert "The answer is 42." in train.teacher_prompt(row)[0]["content"] and train.teacher_prompt(row)[0]["role"] == "user"
    texts = [said(text) for text in ("so 41, no: 42", "1,042", "none")]
    assert train.correct(texts, ["42", "1042", "42"]) == [1.0, 1.0, 0.0]


def test_the_benchmark_of_a_step_runs_both_heads(tmp_path):
    from benchmarks.reports import trl as report

    found = report.measure(report.QUICK, torch.float32, rounds=1)
    theirs, ours = (found["steps"][name] for name in ("TRL", "gear_kernels"))
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4) and found["trl_over_ours"]["time"] > 0
