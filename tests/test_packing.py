"""Packed sequences: the numbers of padded ones, nothing seen across an end, and who does not get them."""

import random
from types import SimpleNamespace

import pytest
import torch
from fuzzing import rng
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gates import figures as gates
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.policy import packing
from gear_trainer.policy.batching import Ends, even, micro_batch, padding, padding_micro_batch, split_rows
from gear_trainer.policy.forward import Forward
from gear_trainer.policy.hub import meta_model
from gear_trainer.policy.model import Policy, hidden_states
from gear_trainer.policy.packing import pack_attention, packed_flash, settle, why_padded
from gear_trainer.preflight import meter
from gear_trainer.preflight.dry_run import geometry
from gear_trainer.preflight.meter import Meter
from gear_trainer.recipe import resolve
from gear_trainer.rollout import Rollout
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks import make_task
from gear_trainer.tasks.base import Problem
from gear_trainer.train.experience import pack_with
from gear_trainer.train.schedule import schedule
from gear_trainer.train.score import score

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"
BIG = "gear_trainer/configs/qwen3_8b.yaml"
VOCAB = 50
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
KINDS = {  # model type: beside the sizes
    "qwen3": dict(head_dim=8),
    "llama": {},
    "mistral": dict(sliding_window=4),
    "gemma3_text": dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "gpt_neox": dict(num_key_value_heads=4),
    "qwen3_moe": dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, experts_implementation="eager"),
}


def model(kind, **options):
    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **SIZES | ids | KINDS.get(kind, {}) | options)
    return AutoModelForCausalLM.from_config(config).double().eval()


def rollouts(draw, count, longest=14):
    """Ragged rollouts: prompts of student and teacher, observation tokens among the policy's, one without any."""
    out = []
    for k in range(count):
        prompt, teacher, wrong = ([draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))] for _ in range(3))
        r = Rollout(Problem(str(k), [], [], ""), k // 2, k % 2, prompt, teacher)
        r.ids = [draw.randrange(VOCAB) for _ in range(draw.randint(0, longest))]
        r.mask = [draw.random() < 0.7 for _ in r.ids]
        r.sampler_logprobs, r.turn_ids, r.reference = [-1.0] * len(r.ids), [0] * len(r.ids), "shown"
        r.wrong_prompt_ids = wrong if k % 3 else []
        out.append(r)
    return out


def hidden_and_gradients(lm, rows):
    """[n, D] and every parameter's gradient of a fixed sum over them."""
    lm.zero_grad()
    hidden = hidden_states(lm, rows)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}


def away(got, want):
    """The distance of two tensors in parts of the second. The models' norms round to float32, whatever they are given."""
    return ((got - want).norm() / want.norm()).item()


# --- the numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded_in_float64(kind):
    """Hidden states and gradients of ragged rollouts, of 3 layers; windows of 4 tokens are shorter than the sequences."""
    padded, packed = model(kind), model(kind)
    pack_attention(packed)
    for case in range(4):
        drawn = rollouts(rng(f"{kind} {case}"), 6)
        sides = [micro_batch(drawn, list(range(6)), True, packed=flag) for flag in (False, True)]
        assert torch.equal(sides[0].targets, sides[1].targets)
        for side in ("student", "teacher"):
            want, graded = hidden_and_gradients(padded, getattr(sides[0], side))
            got, gradients = hidden_and_gradients(packed, getattr(sides[1], side))
            assert away(got, want) < 1e-6 and gradients.keys() == graded.keys() and len(graded) > 20
            assert max(away(gradient, graded[name]) for name, gradient in gradients.items()) < 1e-6


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_sequence_does_not_see_its_neighbours(kind):
    """Another text between two sequences leaves their bits; so does the row that they stand in."""
    lm, draw = model(kind).float(), random.Random(0)
    pack_attention(lm)
    first, between, last = rollouts(draw, 3, 20)
    other = rollouts(draw, 1, 20)[0]
    for r in (first, between, last, other):
        r.ids, r.mask = r.ids or [3], [True] * max(1, len(r.ids))
    with torch.no_grad():
        found = [
            hidden_states(lm, micro_batch(row, list(range(len(row))), False, packed=True).student).split(
                [len(r.ids) for r in row]
            )
            for row in ([first, between, last], [first, other, last], [last, first])
        ]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    assert torch.equal(found[0][0], found[2][1]) and torch.equal(found[0][2], found[2][0])
    assert found[0][1].shape != found[1][1].shape or not torch.equal(found[0][1], found[1][1])


def test_checkpointed_layers_are_told_the_ends_again():
    """Layers are run anew in the backward, from the arguments of the first run."""
    from gear_trainer.policy.zero import checkpoint_layers

    plain, checkpointed = model("qwen3"), model("qwen3")
    pack_attention(plain), pack_attention(checkpointed)
    checkpoint_layers(checkpointed)
    batch = micro_batch(rollouts(random.Random(1), 5), list(range(5)), False, packed=True)
    for name, gradient in hidden_and_gradients(checkpointed, batch.student)[1].items():
        assert torch.equal(gradient, hidden_and_gradients(plain, batch.student)[1][name]), name


# --- rows -------------------------------------------------------------------------------------------------------------------


def test_a_packed_row_says_where_its_sequences_are():
    drawn = rollouts(random.Random(2), 4)
    batch = micro_batch(drawn, [2, 0, 3], True, True, packed=True)
    chosen = [drawn[i] for i in (2, 0, 3)]
    prompts = {
        "student": [r.prompt_ids for r in chosen],
        "teacher": [r.teacher_prompt_ids for r in chosen],
        "wrong_hint": [r.wrong_prompt_ids or r.prompt_ids for r in chosen],
    }
    assert batch.rows == [2, 0, 3] and not drawn[0].wrong_prompt_ids
    for side, own in prompts.items():
        rows, streams = getattr(batch, side), [p + r.ids for p, r in zip(own, chosen, strict=True)]
        lengths = list(map(len, streams))
        assert rows.input_ids.tolist() == [sum(streams, [])] and rows.input_ids.shape[0] == 1
        assert rows.ends.position_ids.tolist() == [[i for n in lengths for i in range(n)]]
        assert rows.ends.cu_seqlens.tolist() == [0, *(sum(lengths[: k + 1]) for k in range(3))]
        assert rows.ends.cu_seqlens.dtype == torch.int32 and rows.ends.longest == max(lengths)
        assert rows.input_ids[0, rows.index + 1].tolist() == batch.targets.tolist(), "index predicts"
    filler = padding_micro_batch(True, True, packed=True)
    assert filler.rows == [] and filler.student.ends.cu_seqlens.tolist() == [0, 2] and filler.wrong_hint is filler.teacher


@pytest.mark.parametrize("teacher", [False, True])
def test_packed_micro_batches_keep_the_budget_and_are_even(teacher):
    budget = 100
    for case in range(20):
        drawn = rollouts(rng(case), 40, 60)
        padded, first_fit = (split_rows(drawn, list(range(1, 40)), budget, teacher, flag) for flag in (False, True))
        for count in (len(first_fit), len(first_fit) + 3):
            split = even(drawn, first_fit, count, budget, teacher)
            sizes = [
                max(x.input_ids.numel() for x in (b.student, b.teacher) if x)
                for b in (micro_batch(drawn, rows, teacher, packed=True) for rows in split)
            ]
            assert sorted(i for rows in split for i in rows) == list(range(1, 40)) and max(sizes) <= budget
            assert len(split) in (len(first_fit), count) and len(first_fit) <= len(padded)
        assert len(split) == count and sum(sizes) / len(sizes) > 0.6 * max(sizes), "spare micro-batches: dealt evenly"
    assert sorted(even(drawn, [[1, 2]], 3, budget, teacher)) == [[1], [2]] and even(drawn, [], 0, budget, teacher) == []
    assert split_rows(drawn, [5, 7], 1, teacher, True) in ([[5], [7]], [[7], [5]]), "a single row may pass the budget"


def test_the_share_of_padding_is_counted_by_hand():
    drawn = rollouts(random.Random(3), 4)
    split, padded, whole = [[0, 2], [3]], 0, 0
    for rows in split:
        for prompts in ("prompt_ids", "teacher_prompt_ids"):
            lengths = [len(getattr(drawn[i], prompts)) + len(drawn[i].ids) for i in rows]
            whole += len(rows) * max(lengths)
            padded += len(rows) * max(lengths) - sum(lengths)
    assert padding(drawn, split, True, False, packed=False) == (padded, whole) and padded > 0
    assert padding(drawn, split, True, False, packed=True) == (0, whole - padded)
    batches = [micro_batch(drawn, rows, True) for rows in split]
    assert whole == sum(x.input_ids.numel() for b in batches for x in (b.student, b.teacher))


def test_a_scoring_pass_of_packed_rows_gives_the_padded_ones_numbers(alone):
    """What reaches the model is one row a forward, and every column is that of padded rows."""
    found, shapes = [], []
    for flag in (False, True):
        cfg = load_config(DEMO, ["rollout.max_model_len=60", "train.tokens_per_micro_batch=64", f"train.packing={flag}"])
        recipe, policy, shapes = resolve(cfg), Policy(model("qwen3").float()), []
        if flag:
            pack_attention(policy.lm)
        policy.lm.base_model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=shapes: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        experience = pack_with(recipe, rollouts(random.Random(4), 8), [1.0, -1.0] * 4, torch.device("cpu"))
        passes = schedule(cfg, recipe, experience)
        score(recipe, experience, passes.score, Forward(policy, None, 1.0))
        found.append(experience.rows(("logprobs", "teacher_logprobs", "entropy", "signal"), 8))
        sums = Sums()
        sums.mean("padding_share", *passes.padding)
        assert (sums.read(torch.device("cpu"))["padding_share"] == 0) == flag
    assert {rows for rows, _ in shapes} == {1}, "of the packed run"
    for name, columns in found[0].items():
        for want, got in zip(columns, found[1][name], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


# --- who gets them ----------------------------------------------------------------------------------------------------------


def saved(tmp_path, kind, **options):
    model(kind, **options).config.save_pretrained(tmp_path / kind)
    return tmp_path / kind


def reason(*overrides, gpu=False, config=DEMO):
    cfg = load_config(config, list(overrides))
    return why_padded(cfg, resolve(cfg), gpu)


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_plain_attention_are_packed(tmp_path, kind):
    assert reason(f"model.path={saved(tmp_path, kind)}") is None


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("qwen3_next", dict(head_dim=8), "it has layers of linear_attention"),
        ("llama4_text", dict(head_dim=8), "it has layers of chunked_attention"),
        ("lfm2", dict(layer_types=["conv", "full_attention", "conv"]), "it has layers of conv"),
        ("jetmoe", {}, "a trial on meta tensors failed"),
        ("phimoe", dict(num_local_experts=2, sliding_window=4), "PhimoeForCausalLM does not hand its sliding window"),
        ("bloom", dict(n_head=4), "BloomForCausalLM has an attention of its own"),
    ],
)
def test_other_models_are_padded_and_the_reason_is_said(tmp_path, kind, options, why):
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **SIZES | options)
    config.save_pretrained(tmp_path / kind)
    path = f"model.path={tmp_path / kind}"
    assert why in reason(path)
    with pytest.raises(ConfigError, match=f"train.packing=true: .*{why}.*; leave it out, and sequences are padded"):
        reason(path, "train.packing=true")
    assert reason(path, "train.packing=false") == "train.packing=false"


def test_a_reference_model_that_takes_no_packed_rows_pads_the_policys(tmp_path):
    config = AutoConfig.for_model("bloom", vocab_size=VOCAB, n_head=4, **SIZES)
    config.save_pretrained(tmp_path / "bloom")
    beside = [f"model.path={saved(tmp_path, 'qwen3')}", "kl.coefficient=0.1", f"kl.reference={tmp_path / 'bloom'}"]
    assert reason(*beside[:2]) is None and "bloom: BloomForCausalLM" in reason(*beside)


def test_attentions_and_devices(tmp_path, monkeypatch):
    path = f"model.path={saved(tmp_path, 'qwen3')}"

    def why(*overrides, gpu=True):
        return reason(path, *overrides, gpu=gpu, config=BIG)

    assert why() is why(gpu=False) is None
    assert why("model.attn_implementation=eager").startswith("model.attn_implementation=eager has no packed form")
    assert "flex_attention" in why("model.attn_implementation=flex_attention")
    assert "float32: a GPU's kernel" in why("model.dtype=float32") and why("model.dtype=float32", gpu=False) is None
    monkeypatch.setattr(packing, "WIDEST_HEAD", 4)
    assert "a multiple of 8 up to 4" in why() and why("model.attn_implementation=flash_attention_2") is why(gpu=False) is None
    monkeypatch.setattr(packing, "_varlen_arguments", tuple)
    assert "no varlen_attn" in why() and why("model.attn_implementation=flash_attention_2") is None


def test_a_model_that_does_not_pass_the_ends_on_is_found_out(tmp_path):
    """By the trial; a run that was told otherwise stops at its first forward."""
    lm = meta_model(str(saved(tmp_path, "llama")), "float32", "sdpa")
    layer = lm.base_model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **{k: v for k, v in kwargs.items() if "seq" not in k})
    assert packing._of_model(lm, False) == "LlamaForCausalLM does not hand the ends of sequences to its attention"
    layer.forward = lambda hidden_states, **_: (hidden_states, None)
    assert packing._of_model(lm, False) == "2 of its 3 layers are attention"
    assert lm.config._attn_implementation == "sdpa"
    plain = model("llama")
    pack_attention(plain)
    assert "packed" not in plain.config.to_json_string(), "an exported model has nothing of it"
    with pytest.raises(RunError, match="was not told where sequences end; set train.packing=false"):
        plain.base_model(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_a_run_settles_it_once_and_says_so(tmp_path):
    path = str(saved(tmp_path, "qwen3"))
    cfg = load_config(DEMO, [f"model.path={path}"])
    settled, why = settle(cfg, resolve(cfg), path)
    assert settled.train.packing is True and why is None and cfg.train.packing is None
    cfg = load_config(DEMO, [f"model.path={path}", "model.attn_implementation=eager"])
    settled, why = settle(cfg, resolve(cfg), path)
    assert settled.train.packing is False and "eager" in why
    task = make_task(cfg.task, cfg.seed, cfg.task_args)
    assert dict(geometry(cfg, resolve(cfg), task, None))["sequences"] == f"padded: {why}"
    away = load_config(DEMO, ["model.path=nobody/has-this"])
    assert "is not at hand" in dict(geometry(away, resolve(away), task, None))["sequences"]


# --- a GPU's kernels, in stand-ins that read what they are given ------------------------------------------------------------


def by_ends(q, k, v, ends, window):
    """Plain attention of [T, H, D], sequence by sequence."""
    groups, out = q.shape[1] // k.shape[1], []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        n = end - start
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end].repeat_interleave(groups, 1)) * q.shape[-1] ** -0.5
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if window >= 0:
            seen &= torch.ones(n, n, dtype=torch.bool).triu(-window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[start:end].repeat_interleave(groups, 1)))
    return torch.cat(out)


def as_on_a_gpu(module, query, key, value, mask=None, *, cu_seq_lens_q, max_length_q, scaling, sliding_window=None, **_):
    """What `packed_sdpa` calls for tensors of a GPU."""
    assert mask is None
    return packing._varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


@pytest.mark.parametrize("kernel", ["torch", "flash_attention_2"])
@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_flash_kernel_is_given_the_ends_as_they_are(monkeypatch, kind, kernel):
    """The arguments that torch's varlen_attn and transformers' flash kernels take, in stand-ins held to padded numbers."""
    drawn = rollouts(random.Random(5), 5)
    rows, seen = micro_batch(drawn, list(range(5)), False, packed=True).student, []
    ends = rows.ends.cu_seqlens

    def varlen(q, k, v, cu_q, cu_k, most_q, most_k, *, scale, window_size, **grouped):
        assert window_size[1] == 0 and scale == pytest.approx(q.shape[-1] ** -0.5) and grouped == {"enable_gqa": True}
        seen.append((cu_q is ends is cu_k, most_q, most_k))
        return by_ends(q, k, v, ends.tolist(), window_size[0])

    def flash(q, k, v, mask, *, query_length, is_causal, softmax_scale, sliding_window, attn_implementation, **options):
        assert mask is None and is_causal and q.shape[:2] == (1, query_length) and attn_implementation == kernel
        seen.append(
            (options["cu_seq_lens_q"] is ends is options["cu_seq_lens_k"], options["max_length_q"], options["max_length_k"])
        )
        return by_ends(q[0], k[0], v[0], ends.tolist(), -1 if sliding_window is None else sliding_window - 1)[None]

    lm = model(kind)
    if kernel == "torch":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
        monkeypatch.setattr(packing, "_varlen_arguments", lambda: ("window_size", "enable_gqa"))
        packing._use(lm, "packed_as_on_a_gpu", as_on_a_gpu)
    else:
        monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", flash)
        lm.config._attn_implementation = kernel
        pack_attention(lm)
    want = hidden_states(model(kind), micro_batch(drawn, list(range(5)), False).student)
    torch.testing.assert_close(hidden_states(lm, rows), want, rtol=1e-10, atol=1e-10)
    assert seen == [(True, rows.ends.longest, rows.ends.longest)] * 3 and type(rows.ends.longest) is int


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_packed_forward_and_its_backward_wait_for_no_value(kind):
    """On meta tensors, through torch's own varlen_attn. transformers' packed path looks for the ends, once a mask."""
    looks = []
    rows = micro_batch(rollouts(random.Random(6), 5), list(range(5)), False, packed=True).student.to(torch.device("meta"))
    for packed in (True, False):
        with torch.device("meta"):
            lm = model(kind).to(torch.bfloat16)
        if packed:
            packing._use(lm, "packed_as_on_a_gpu", as_on_a_gpu)
        with gates.Counter() as counter:
            hidden_states(lm, rows).sum().backward()
        looks.append(counter.synchronisations)
    assert looks == [0, 1]


def test_packed_rows_hold_the_memory_that_the_plan_counts_for_padded_ones():
    """Kept for the backward, and held at most in it, of as many tokens: through the kernels of a GPU, on meta tensors."""
    with torch.device("meta"):
        lm = model("qwen3", hidden_size=256, head_dim=64, intermediate_size=512).to(torch.bfloat16)
    found = []
    for rows, ends in ((4, {}), (1, given_ends([256] * 4))):
        embeddings = torch.empty(rows, 1024 // rows, 256, dtype=torch.bfloat16, device="meta", requires_grad=True)
        if ends:
            packing._use(lm, "packed_as_on_a_gpu", as_on_a_gpu)
        tensors = [x for x in ends.values() if isinstance(x, torch.Tensor)]
        with meter._flash(), meter._no_gradients_kept(lm), Meter([*lm.parameters(), *lm.buffers(), embeddings, *tensors]) as held:
            hidden = lm.base_model(inputs_embeds=embeddings, use_cache=False, **ends).last_hidden_state
            kept = held.live
            hidden.backward(torch.empty_like(hidden))
        found.append((kept, held.peak))
    assert found[1] == pytest.approx(found[0], rel=0.02)


def given_ends(lengths):
    return Ends.of(lengths).to(torch.device("meta")).arguments()


def test_flash_is_refused_without_the_ends():
    with pytest.raises(RunError, match="was not told where sequences end"):
        packed_flash("flash_attention_2", SimpleNamespace(), *(torch.zeros(1, 2, 3, 4),) * 3)
