"""LoRA: adapters on a model in place, their files, what is refused; two ranks against one process; a run with vLLM."""

import json
from pathlib import Path

import pytest
import torch

from gear_trainer.build import resolve_model_path
from gear_trainer.config import LoraConfig, load_config
from gear_trainer.errors import ConfigError
from gear_trainer.policy import lora
from gear_trainer.policy.checkpoint import export_step
from gear_trainer.policy.gather import adapter_state_dict, gathered_weights, whole_state_dict
from gear_trainer.preflight import memory
from gear_trainer.preflight.checks import check_lora, lengths, warnings
from gear_trainer.recipe import resolve
from gear_trainer.rollout.engine import engine_class
from gear_trainer.rollout.vllm_colocated import engine_kwargs
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.metrics import MEASURED
from gear_trainer.tasks import make_task, task_class

peft = pytest.importorskip("peft")
CONFIGS = Path(__file__).parents[1] / "gear_trainer" / "configs"
DEMO = CONFIGS / "mathapi_cpu.yaml"
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.arange(2, 22)[None]


def tiny(tied=False, dtype=torch.float32):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=160, head_dim=32, tie_word_embeddings=tied, initializer_range=0.2, **sizes)
    return Qwen3ForCausalLM(config).to(dtype).eval()


def adapted(lm, drawn=True, others=(), **section):
    """The model with adapters that say something."""
    lora.attach(lm, LoraConfig(**{"rank": 4, **section}), others=others)
    if drawn:
        torch.manual_seed(1)
        for p in lora.parameters(lm, lora.POLICY):
            torch.nn.init.normal_(p, std=0.1)
    return lm


@torch.no_grad()
def logits(lm):
    return lm(IDS).logits


# --- on a model ---------------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained_on_every_linear_layer_but_the_head():
    lm = adapted(tiny(), drawn=False)
    trained = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in lm.named_parameters() if ".lora_" in n} and len(trained) == 2 * 2 * 7
    assert {n.split(".")[-1] for n in lora.layers(lm)} == ALL
    assert torch.equal(logits(lm), logits(tiny())), "their product begins at 0"
    again = adapted(tiny(), drawn=False)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters(), strict=True)), "one seed, one start"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapters_the_policy_is_the_starting_model_bitwise(dtype):
    lm, start = adapted(tiny(dtype=dtype), others=("teacher",)), logits(tiny(dtype=dtype))
    assert {p.dtype for p in lm.parameters()} == {dtype}
    grads, own = [p.requires_grad for p in lm.parameters()], logits(lm)
    with lora.under(lm, None):
        assert torch.equal(logits(lm), start)
    with lora.under(lm, "teacher"):
        assert torch.equal(logits(lm), start), "as the policy's began"
        for e, w in zip(lora.parameters(lm, "teacher"), lora.parameters(lm, lora.POLICY), strict=True):
            e.data.copy_(w)
        assert torch.equal(logits(lm), own)
    assert torch.equal(logits(lm), own) and not torch.equal(own, start)
    assert grads == [p.requires_grad for p in lm.parameters()] and not any(
        p.requires_grad for p in lora.parameters(lm, "teacher")
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("section", [{}, {"rslora": True, "target_modules": ["q_proj", "down_proj"]}])
def test_merged_weights_are_the_policy_under_the_plain_models_names(tied, section):
    lm, plain = adapted(tiny(tied), others=("teacher",), **section).double(), tiny(tied).double()
    weights = whole_state_dict(lm)
    assert weights.keys() == plain.state_dict().keys() == dict(gathered_weights(plain)).keys()
    untouched = {n for n, t in plain.state_dict().items() if torch.equal(t, weights[n])}
    assert {n.split(".")[-2] for n in weights.keys() - untouched} == set(section.get("target_modules", ALL))
    plain.load_state_dict(weights)
    assert torch.allclose(logits(plain), logits(lm), atol=1e-9)


def test_peft_loads_the_adapter(tmp_path):
    from peft import PeftModel

    lm = adapted(tiny(), others=("teacher",), alpha=7, rslora=True)
    lora.write(tmp_path, lm, adapter_state_dict(lm))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()), logits(lm))


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, message",
    [
        ("q_prj", "lora.target_modules: q_prj is no linear layer of this model: did you mean 'q_proj'?"),
        ("input_layernorm", "input_layernorm is no linear layer"),
        ("lm_head", "lm_head is the embedding or the head, which stay as they are"),
        ("embed_tokens", "embed_tokens is the embedding or the head"),
    ],
)
def test_layers_that_take_no_adapters_are_named_before_a_start(target, message):
    cfg = load_config(DEMO, ["lora.rank=4", f"lora.target_modules=[o_proj, {target}]"])
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        check_lora(cfg)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        lora.attach(tiny(), cfg.lora)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.vllm.sleep_level=2"], "sleep_level=2 drops the weights .*lora.push=merged"),
        (["rollout.vllm.engine_args.max_lora_rank=8"], "lora.rank=16 in vLLM: leave enable_lora and max_lora_rank out"),
        (["rollout.engine=scripted_engine:Scripted"], "has no push_adapter: set lora.push=merged"),
    ],
)
def test_an_engine_that_cannot_serve_adapters_is_refused(overrides, message):
    def check(*more):
        cfg = load_config(DEMO, ["lora.rank=16", *overrides, *more])
        engine_class(cfg).check(cfg, None)

    with pytest.raises(ConfigError, match=message):
        check()
    check("lora.push=merged")


def test_vllm_makes_room_in_its_own_steps_of_ranks():
    rooms = {
        rank: engine_kwargs(load_config(DEMO, [f"lora.rank={rank}"]), "x").get("max_lora_rank") for rank in (0, 1, 4, 24, 512)
    }
    assert rooms == {0: None, 1: 1, 4: 8, 24: 32, 512: 512}
    assert "enable_lora" not in engine_kwargs(load_config(DEMO, ["lora.rank=4", "lora.push=merged"]), "x")
    with pytest.raises(ConfigError, match="lora.rank"):
        load_config(DEMO, ["lora.rank=513"])
    with pytest.raises(ConfigError, match="names no layer"):
        load_config(DEMO, ["lora.rank=4", "lora.target_modules=[]"])


def test_a_rate_for_all_weights_is_warned_of():
    found = [warnings(cfg, resolve(cfg)) for cfg in (load_config(DEMO, ["lora.rank=4", f"train.lr={lr}"]) for lr in (1e-6, 1e-4))]
    assert "adapters" in found[0][0] and not found[1]


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    lm = adapted(tiny(), target_modules=["q_proj", "o_proj"])
    lora.write_config(tmp_path, lm)
    section = {"rank": 4, "target_modules": ["o_proj", "q_proj"]}
    lora.check_resumed(tmp_path, LoraConfig(**section))
    for change, message in [
        ({"rank": 8}, "written with lora.rank=4, resumed with 8"),
        ({"rank": 0}, "written with lora.rank=4, resumed with 0"),
        ({"alpha": 1}, "written with lora.alpha=32, resumed with 1"),
        ({"target_modules": ["q_proj"]}, "written with adapters on o_proj, q_proj, resumed with lora.target_modules=q_proj"),
    ]:
        with pytest.raises(ConfigError, match=message):
            lora.check_resumed(tmp_path, LoraConfig(**(section | change)))
    with pytest.raises(ConfigError, match="written with lora.rank=0, resumed with 4"):
        lora.check_resumed(tmp_path / "none", LoraConfig(**section))


# --- the memory plan ------------------------------------------------------------------------------------------------------


def planned(*overrides):
    cfg = load_config(CONFIGS / "qwen3_8b.yaml", ["rollout.vllm.sleep_level=1", *overrides])
    longest = lengths(cfg, task_class(cfg.task), (256, 512))
    return memory.planned(cfg, resolve(cfg), longest, memory.card(cfg, 80))[1]


def test_the_plan_has_gradients_and_moments_for_adapters_alone():
    """Qwen3-8B: of a layer's matrices, inputs and outputs together 47,104 + 3 x 16,384 wide, times rank, times 36 layers."""
    wide = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 12288)
    full, alone, shared = (planned(*o) for o in ([], ["lora.rank=16"], ["lora.rank=16", "teacher.weights=initial"]))
    assert alone.sizes.trained == 36 * 16 * wide and alone.sizes.total == full.sizes.total + alone.sizes.trained
    rows = alone.phases["step"]
    assert rows["float32 masters and moments"] == 12 * alone.sizes.trained / 8
    assert rows["gradients"] <= 4 * alone.sizes.trained / 8 and rows["weights (ZeRO-3 share)"] == 2 * alone.sizes.total / 8
    assert all(alone.total(phase) < full.total(phase) for phase in ("score", "update", "step", "push"))
    assert "head's gradient" not in alone.phases["update"]
    assert shared.phases == alone.phases, "a starting model beside it costs nothing"
    ema = planned("lora.rank=16", "teacher.weights=ema").phases["step"]
    assert ema["teacher's weights"] == 6 * alone.sizes.trained / 8
    served = [
        planned(*o).phases["rollout"]["vLLM: weights"] for o in ([], ["lora.rank=24"], ["lora.rank=24", "lora.push=merged"])
    ]
    assert served[1] - served[0] == 2 * 36 * 32 * wide and served[2] == served[0], "vLLM has room for rank 32"


# --- two ranks ------------------------------------------------------------------------------------------------------------

CASES = ("rslora, some layers, recomputed", "teacher and reference initial", "teacher ema", "teacher synced")


@pytest.fixture(scope="module")
def ranks(server, tmp_path_factory):
    """What lora_ranks.py found, and its folder."""
    folder = tmp_path_factory.mktemp("lora")
    tiny().save_pretrained(folder / "a")
    run = server.call(folder / "log", "lora_ranks:main", folder, OMP_NUM_THREADS="1")
    assert run.wait(1000) == [0, 0], run.text()[-6000:]
    return json.loads((folder / "result.json").read_text()), folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_one_process(ranks, case):
    got = ranks[0][case]
    assert got["adapters"] < 1e-5 and got["teacher"] < 1e-5
    assert got["moved"] == sorted(ALL if case == CASES[1] else ["q_proj", "down_proj"])
    assert got["shared"], "no second copy of the weights"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_repeats_bitwise_from_adapters_alone(ranks, case):
    got = ranks[0][case]
    assert got["resumed bitwise"]
    sets = 1 + 0.25 * ("ema" in case or "synced" in case)  # weights and moments, and a teacher's weights
    assert got["bytes"] < 100_000 + 16 * sets * got["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:2])
def test_the_exports_are_the_policy(ranks, case, tmp_path):
    """The merged model by plain transformers, the adapter by peft, and the checkpoint's own export, on rank 0's rollouts."""
    import teacher_ranks as plain
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, folder = ranks
    run = folder / f"l{CASES.index(case)}"
    load = AutoModelForCausalLM.from_pretrained
    merged = load(run / "model", dtype=torch.float32)
    beside = PeftModel.from_pretrained(load(folder / "a", dtype=torch.float32), str(run / "adapter")).eval()
    for r, want in zip(plain.make_rollouts(), found[case]["scores"], strict=False):
        tokens = torch.tensor([[r.ids[i]] for i in r.policy_positions])
        for lm in (merged, beside):
            with torch.no_grad():
                got = plain.log_probs(lm, r.prompt_ids, r).gather(1, tokens)[:, 0]
            assert got.tolist() == pytest.approx(want, abs=2e-5)


# --- a run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_pushes_adapters_alone_and_resumes_exactly(server, tmp_path):
    """Three steps at a rate that moves the policy; the third again from the second's checkpoint, and so with merged pushes."""
    more = ["lora.rank=8", "train.lr=3e-3", "eval.every=0", "rollout.prompts_per_step=4", "rollout.records=0", "train.steps=3"]
    more += ["teacher.weights=initial", "kl.coefficient=0.05", "checkpoint.every=2"]

    def run(name, *args):
        ranks = server.start(tmp_path / f"{name}.log", f"name={name}", f"output_dir={tmp_path}", *more, *args)
        assert ranks.wait(900) == [0, 0], ranks.text()[-6000:]
        return read_metrics(tmp_path / name / "metrics.jsonl")

    whole = run("alone")
    assert max(m["logprob_gap_max"] for m in whole) < 1e-4
    assert whole[0]["reference_kl"] == 0 and whole[2]["reference_kl"] > 1e-4, "to the starting model, which it left"
    (tmp_path / "alone" / "checkpoints" / "latest").write_text("step-2")
    model = (tmp_path / "alone" / "model" / "model.safetensors").read_bytes()
    again = run("alone", "--resume")
    for key in again[2].keys() - set(MEASURED):
        assert again[2][key] == whole[2][key], key
    assert (tmp_path / "alone" / "model" / "model.safetensors").read_bytes() == model
    base = resolve_model_path(load_config(DEMO), make_task("mathapi", 0))
    exported = export_step(tmp_path / "alone", 3, base, "float32")
    assert (exported / "model.safetensors").read_bytes() == model, "of the checkpoint's adapters, on the model that it began as"
    (tmp_path / "alone" / "checkpoints" / "latest").write_text("step-2")
    merged = run("alone", "lora.push=merged", "checkpoint.export=false", "--resume")[2]
    assert merged["logprob_gap_max"] < 1e-4 and merged["reward_mean"] == whole[2]["reward_mean"]
