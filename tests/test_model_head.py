"""Head.from_model against the logits of real transformers models, with and without peft's adapters on the head."""

import copy

import pytest
import torch
from torch import nn

from gear_kernels import FusedHead, GearKernelsError, Head, linear_token_stats

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
MODELS = {  # what the model does to its logits: (class prefix, configuration)
    "plain": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "tied": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "bias": ("Phi", {}),
    "softcap": ("Gemma2", {"head_dim": 16, "num_key_value_heads": 1, "final_logit_softcapping": 0.4}),
    "soft cap, another name": ("RecurrentGemma", {"logits_soft_cap": 0.4, "block_types": ["recurrent"], "pad_token_id": 0}),
    "factor": ("Cohere", {"logit_scale": 7.0, "num_key_value_heads": 1}),
    "divisor": ("Granite", {"logits_scaling": 0.1, "num_key_value_heads": 1}),
    "logits_scaling as a factor": ("HyperCLOVAX", {"logits_scaling": 7.0, "num_key_value_heads": 1}),
    "lm_head_multiplier": (
        "FalconH1",
        {"lm_head_multiplier": 7.0, "num_key_value_heads": 1, "mamba_d_ssm": 32, "mamba_n_heads": 2},
    ),
}


def model_of(kind="plain"):
    prefix, options = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **options)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.3)  # biases start at 0
    return model


def lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, **options))


def hidden_of(model, n=9):
    """The last hidden states of a short text, the model's logits, and targets: the whole model runs."""
    ids = torch.randint(120, (1, n), generator=torch.Generator().manual_seed(1))
    kept = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    logits = model(input_ids=ids, use_cache=False).logits
    hook.remove()
    return kept[0].detach()[0], logits[0].detach(), ids[0]


def assert_same(model, head, tolerance=5e-6):
    hidden, logits, targets = hidden_of(model)
    got = linear_token_stats(hidden, head, targets, stats=("logprobs", "entropy"))
    log_p = logits.double().log_softmax(-1)
    torch.testing.assert_close(got.logprobs.double(), log_p.gather(-1, targets[:, None])[:, 0], rtol=0, atol=tolerance)
    torch.testing.assert_close(got.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=tolerance)
    return got


@pytest.mark.parametrize("kind", MODELS)
def test_R4_the_head_is_the_models(kind):
    model = model_of(kind)
    if kind in ("plain", "tied", "bias"):
        head = Head.from_model(model)
        assert head.weight is model.get_output_embeddings().weight and (head.bias is not None) == (kind == "bias")
    assert_same(model, Head.from_model(model))


@pytest.mark.parametrize("kind", MODELS)
def test_a_fused_head_takes_softcap_and_scale_from_its_model(kind):
    model = model_of(kind)
    hidden, logits, targets = hidden_of(model)
    head = FusedHead.from_model(model)
    assert head is model.get_output_embeddings()
    log_p = logits.double().log_softmax(-1)
    got = head(hidden, targets, stats=("logprobs", "entropy"))
    torch.testing.assert_close(got.logprobs.double(), log_p.gather(-1, targets[:, None])[:, 0], rtol=0, atol=5e-6)
    torch.testing.assert_close(got.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=5e-6)
    assert torch.equal(hidden_of(model)[1], logits)  # the plain layer is what it was


def test_a_model_without_an_output_layer_has_no_fused_head():
    with pytest.raises(GearKernelsError, match="a Linear without an output layer.*pass the model itself, not what wraps it"):
        FusedHead.from_model(nn.Linear(2, 3))
    with pytest.raises(GearKernelsError, match="the head is a peft lora layer"):
        FusedHead.from_model(lora(model_of()))


@pytest.mark.parametrize("adapters", (1, 2))
def test_R4_a_lora_head_is_merged_with_its_gradients(adapters):
    model = lora(model_of())
    if adapters == 2:
        options = {"r": 2, "target_modules": ["lm_head"], "init_lora_weights": False, "lora_alpha": 5}
        model.add_adapter("second", peft.LoraConfig(**options))
        model.base_model.set_adapter(["default", "second"])
    layer = model.get_output_embeddings()
    layer.base_layer.weight.requires_grad_()
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert len(names) == 1 + 2 * adapters
    got = assert_same(model, Head.from_model(model))
    hidden, _, targets = hidden_of(model)
    bare = linear_token_stats(hidden, layer.weight, targets, stats=("logprobs",))
    assert (bare.logprobs - got.logprobs).abs().max() > 0.5, "the weight alone leaves the adapter out"
    leaves = [hidden.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    g = torch.randn(9, generator=torch.Generator().manual_seed(2))
    ours = linear_token_stats(leaves[0], Head.from_model(model), stats=("entropy",)).entropy
    log_p = layer(leaves[0]).log_softmax(-1)
    plain = -(log_p.exp() * log_p).sum(-1)
    pair = (torch.autograd.grad((g * out).sum(), leaves) for out in (ours, plain))
    for name, a, b in zip(["hidden", *names], *pair, strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm(), name


def test_R4_a_bfloat16_lora_head_keeps_its_adapter():
    """Merged in float32: rounded to bfloat16 the sum would lose what is below 1/256 of the weight. Hidden states go with it."""
    model = lora(model_of())
    layer = model.get_output_embeddings()
    layer.base_layer.to(torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).to(torch.bfloat16)
    hidden = hidden_of(lora(model_of()))[0].bfloat16()
    head = Head.from_model(model)
    merged = layer.base_layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    log_p = (hidden.double() @ merged.T).log_softmax(-1)
    got = linear_token_stats(hidden, head, stats=("entropy",)).entropy
    torch.testing.assert_close(got.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=5e-6)


def test_R4_merged_and_disabled_adapters_and_saved_modules():
    model = lora(model_of())
    with model.disable_adapter():
        assert Head.from_model(model).weight is model.get_output_embeddings().base_layer.weight
    assert_same(model, Head.from_model(model))
    model.merge_adapter()
    assert Head.from_model(model).weight is model.get_output_embeddings().base_layer.weight
    assert_same(model, Head.from_model(model))
    saved = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert Head.from_model(saved).weight is saved.get_output_embeddings().modules_to_save["default"].weight


REFUSED = {
    "has the variant DoraLinearVariant": lambda: lora(model_of(), use_dora=True),
    "has a bias of its own": lambda: lora(model_of("bias"), lora_bias=True),
    "has dropout 0.1 while training.*or model.eval()": lambda: lora(model_of(), lora_dropout=0.1).train(),
    "the head is a peft ia3 layer .*adapters: 'default'": lambda: peft.get_peft_model(
        model_of(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    ),
    "a Linear without an output layer": lambda: nn.Linear(2, 3),
    "an encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("match", REFUSED)
def test_R4_what_cannot_be_read_is_refused_by_name(match):
    with pytest.raises(GearKernelsError, match=match):
        Head.from_model(REFUSED[match]())


def test_R4_adopt_names_the_adapter():
    with pytest.raises(GearKernelsError, match=r"the head is a peft lora layer .*adapters: 'default'.*Head.from_model") as caught:
        FusedHead.adopt(lora(model_of()).get_output_embeddings())
    assert "\n" not in str(caught.value)
    saved = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(GearKernelsError, match="modules_to_save copy.*adopt the head before get_peft_model"):
        FusedHead.adopt(saved.get_output_embeddings())


def test_R4_adopt_then_peft_is_explained():
    """A LoRA layer adds to what FusedHead returns: with targets it says so; as a plain layer, merged and saved whole it works."""
    model = model_of()
    FusedHead.adopt(model.lm_head)
    saved = copy.deepcopy(model)
    hidden, _, targets = hidden_of(model)
    model = lora(model)
    with pytest.raises(GearKernelsError, match="a layer around FusedHead, such as peft's LoRA.*Head.from_model"):
        model.get_output_embeddings()(hidden, targets)
    got = assert_same(model, Head.from_model(model)).logprobs
    model.merge_adapter()
    torch.testing.assert_close(model.get_output_embeddings()(hidden, targets).logprobs, got, rtol=0, atol=5e-6)
    saved = peft.get_peft_model(saved, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert saved.get_output_embeddings()(hidden, targets).logprobs.requires_grad
    assert not hasattr(got, "logprobs") and not hasattr(
        linear_token_stats(hidden, model.lm_head.weight, targets, hidden), "dtype"
    )
