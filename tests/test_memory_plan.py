"""The memory plan against arithmetic by hand, against what real tensors take, and what it refuses."""

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gear_trainer.config import load_config
from gear_trainer.demo.warm_start import WarmStartSpec
from gear_trainer.errors import ConfigError
from gear_trainer.policy.hub import model_sizes
from gear_trainer.preflight import memory
from gear_trainer.preflight.checks import lengths
from gear_trainer.preflight.memory import GIB, MIB, Card, card, check_plan, meta_model, notes, sizes_of, table
from gear_trainer.preflight.meter import Meter, passes
from gear_trainer.recipe import resolve
from gear_trainer.tasks import task_class

CONFIGS = Path(__file__).parents[1] / "gear_trainer" / "configs"
QWEN3 = {"8B": 8_190_735_360, "4B": 4_022_468_096, "1.7B": 1_720_574_976, "0.6B": 596_049_920}
OFFLOADED = "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"
SHARE = "rollout.vllm.gpu_memory_utilization"


def planned(name, sold_as, *overrides, prompts=(256, 512)):
    cfg = load_config(CONFIGS / f"{name}.yaml", list(overrides))
    planner = memory.Planner(cfg, resolve(cfg), model_sizes(cfg.model.path), *lengths(cfg, task_class(cfg.task), prompts))
    return cfg, planner, planner.plan(cfg, card(cfg, sold_as))


# --- sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN3)
def test_shipped_qwen3_sizes_make_the_published_models(name):
    lm = meta_model(f"Qwen/Qwen3-{name}", "bfloat16", "sdpa")
    sizes = sizes_of(lm, 100_000)
    assert sizes.total == QWEN3[name] and sizes.tied == (name != "8B")
    assert sizes.head == 151936 * sizes.hidden and sizes.total == sizes.layers + sizes.head * (2 - sizes.tied)
    assert all(p.device.type == "meta" for p in lm.parameters())


def test_shipped_demo_sizes_are_those_of_its_warm_start():
    spec, file = WarmStartSpec(), memory.known_config("builtin:tiny-qwen3")
    made = (file.hidden_size, file.intermediate_size, file.num_hidden_layers, file.num_attention_heads, file.head_dim)
    assert made == (spec.hidden, spec.intermediate, spec.layers, spec.heads, spec.head_dim)
    assert (file.num_key_value_heads, file.max_position_embeddings) == (spec.kv_heads, spec.max_length)


def test_a_card_is_sold_in_gb_that_are_gib():
    cfg = load_config(CONFIGS / "qwen3_8b.yaml")
    assert card(cfg, 80).total / GIB == pytest.approx(78.8) and card(cfg, 141).total / GIB == pytest.approx(138.9, abs=0.1)
    assert card(cfg, 80).gpu and "sold as 80 GB (78.8 GiB" in card(cfg, 80).name and not card(cfg, 80).assumed


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """As DeepSpeed leaves its variables in a process that it was initialised in, another file's tests may have."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_machine_or_an_assumed_card():
    demo, large = (load_config(CONFIGS / f"{name}.yaml") for name in ("mathapi_cpu", "qwen3_8b"))
    assert card(large).gpu and card(large).assumed and "name yours by --card" in card(large).name
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert card(demo) == Card(f"this machine's {here / GIB:.1f} GiB over 2 rank(s)", here / 2, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_other_machines_have_memory_of_their_own(monkeypatch, name):
    """Four ranks on two machines: half of a machine for each, and half of the server that stands on rank 0's."""
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    apart = ["world_size=4", "rollout.engine=vllm_server"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    one = planned("mathapi_cpu", None, *apart, prompts=(120, 150))[2]
    monkeypatch.setenv(name, "2")
    two = planned("mathapi_cpu", None, *apart, prompts=(120, 150))[2]
    assert (one.card.total, two.card.total) == (here / 4, here / 2) and "over 2 rank(s)" in two.card.name
    rows = one.phases["rollout"], two.phases["rollout"]
    for row in ("vLLM: weights", "vLLM: KV cache", "vLLM: prefill, graphs"):
        assert rows[1][row] == 2 * rows[0][row] > 0, row
    assert rows[0]["float32 masters and moments"] == rows[1]["float32 masters and moments"], "ZeRO-3 shares among all"


# --- arithmetic ---------------------------------------------------------------------------------------------------------


SUMS = "deepspeed.data_types.grad_accum_dtype"


@pytest.mark.parametrize(
    "world, overrides, weights, gradients, rest",
    [
        (8, [f"{SUMS}=bf16"], 2, 2, 12),
        (8, [f"{SUMS}=fp32"], 2, 4, 12),
        (16, ["model.path=Qwen/Qwen3-4B", f"{SUMS}=fp32"], 2, 4, 12),
        (1, [OFFLOADED], 2, 0, 0),
        (4, ["model.path=Qwen/Qwen3-0.6B", "model.dtype=float32"], 4, 4, 12),  # the masters are a copy all the same
    ],
)
def test_zero3_states_are_bytes_a_parameter_over_the_ranks(world, overrides, weights, gradients, rest):
    _, planner, plan = planned("qwen3_8b", 80, f"world_size={world}", *overrides)
    share = sum(p.numel() for p in planner.lm.parameters()) / world
    rows = plan.phases["step"]
    found = [rows.get(name, 0) for name in ("weights (ZeRO-3 share)", "gradients", "float32 masters and moments")]
    assert found == [share * weights, share * gradients, share * rest]
    if OFFLOADED in overrides:  # float32 gradients, masters, moments, and the sums of micro-batches
        assert plan.host >= share * (16 + 2) and "optimizer's temporaries" not in rows
    else:
        assert plan.host == 0


def test_the_8b_plan_meets_the_arithmetic_of_its_configuration():
    """16384 tokens, 36 layers of 4096: checkpoints 36 x 134 MB, a head of 1.24 GB, 147,456 bytes of cache a token."""
    cfg, planner, plan = planned("qwen3_8b", 80, "rollout.vllm.gpu_memory_utilization=0.5", "rollout.max_new_tokens=2048")
    update = plan.phases["update"]
    assert plan.moments["update"] == "layers"
    # the rest is the last norm's, in float32
    assert 36 * 16384 * 4096 * 2 <= update["activations kept"] <= 41 * 16384 * 4096 * 2
    assert 3 * GIB < update["a layer's work"] < 4.5 * GIB
    assert update["head's gradient"] == 151936 * 4096 * 2
    assert update["gradient buckets"] >= 2 * 5e8 * 2  # the bucket, and its copy by ranks
    assert 30 * GIB < plan.total("update") < 36 * GIB and "vLLM: weights" not in update
    cache = plan.cache
    assert cache.size == plan.phases["rollout"]["vLLM: KV cache"] and cache.tokens == cache.size / 147456
    assert 60 < cache.own < 72 and cache.wanted == 128
    share = 0.5 * plan.card.total
    assert sum(v for k, v in plan.phases["rollout"].items() if k.startswith("vLLM")) == pytest.approx(share)
    assert "more for rollout.vllm.gpu_memory_utilization" in " ".join(notes(plan, cfg))


def test_a_rollout_server_takes_nothing_of_a_ranks_gpu():
    """Its own GPUs hold the weights once, and the KV cache of all ranks' rollouts."""
    apart = ["rollout.engine=vllm_server", "rollout.server.devices=[8,9]", "rollout.server.tensor_parallel_size=2"]
    beside, plan = (planned("qwen3_8b", 80, *overrides, f"{SHARE}=null")[2] for overrides in ([], apart))
    assert not [row for rows in plan.phases.values() for row in rows if row.startswith("vLLM")]
    held = 2 * 0.9 * plan.card.total - QWEN3["8B"] * 2
    assert held - 20 * GIB < plan.cache.size < held and plan.cache.size > 4 * beside.cache.size
    assert plan.phases["update"] == beside.phases["update"] and plan.cache.wanted >= beside.cache.wanted
    whole = plan.phases["push"]["whole weights"]
    assert whole >= 512 * MIB, "a chunk is copied while it is on its way"


def test_more_ranks_more_tokens_and_a_second_model_change_their_rows_alone():
    base = planned("qwen3_8b", 80)[2].phases
    wide = planned("qwen3_8b", 80, "train.tokens_per_micro_batch=32768")[2].phases
    assert wide["update"]["activations kept"] == pytest.approx(2 * base["update"]["activations kept"], rel=0.01)
    assert wide["update"]["gradients"] == base["update"]["gradients"]
    sparse = planned("qwen3_8b", 80, "train.head_backward=sparse")[2].phases
    assert {name: rows for name, rows in sparse.items() if rows != base[name]}.keys() <= {"update"}
    ema = planned("qwen3_8b", 80, "teacher.weights=ema")[2].phases
    assert ema["step"]["teacher's weights"] == QWEN3["8B"] * 6 / 8 and "teacher's weights" not in base["step"]
    scored = planned("qwen3_8b", 80, "teacher.weights=ema", "deepspeed.zero_optimization={stage3_prefetch_bucket_size: 0}")[2]
    assert scored.phases["score"]["whole weights"] >= 2 * 151936 * 4096 * 2  # both heads, around the student's own
    kl, row = "kl.coefficient=0.01", "reference model's weights"
    held = planned("qwen3_8b", 80, kl)[2].phases
    assert held["step"][row] == QWEN3["8B"] * 2 / 8 and row not in base["step"]
    assert planned("qwen3_8b", 80, kl, "kl.reference=ema")[2].phases["step"][row] == QWEN3["8B"] * 6 / 8
    assert planned("qwen3_8b", 80, kl, "kl.reference=Qwen/Qwen3-4B")[2].phases["step"][row] == QWEN3["4B"] * 2 / 8
    assert row not in planned("qwen3_8b", 80, kl, "teacher.weights=initial")[2].phases["step"], "the teacher's copy serves both"
    alone = planned("qwen3_8b", 80, "world_size=1")[2].phases
    assert "whole weights" not in alone["update"], "one rank's weights are whole already"


def test_deepspeeds_own_settings_count():
    small = "deepspeed={zero_optimization: {reduce_bucket_size: 1000000, stage3_prefetch_bucket_size: 1000000}}"
    base, found = (planned("qwen3_8b", 80, *o)[2].phases["update"] for o in ([], [small]))
    assert found["gradient buckets"] < 10 * MIB < base["gradient buckets"] and found["whole weights"] < base["whole weights"]


# --- activations, counted -----------------------------------------------------------------------------------------------


def _tiny(layers, device):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=416, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    with torch.device(device):
        return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_without_memory_are_those_of_real_tensors(checkpointing, one_thread):
    """Five layers run for real, with the CPU's kernels, against two and three on the meta device."""
    from gear_trainer.policy.zero import checkpoint_layers

    lm, rows, width = _tiny(5, "cpu"), 2, 96
    if checkpointing:
        checkpoint_layers(lm)
    for p in lm.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    given = [*lm.parameters(), *lm.buffers()]

    def hidden():
        embeddings = torch.randn(rows, width, 128, requires_grad=True)
        return lm.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    with Meter(given) as score, torch.no_grad():
        hidden()
    with Meter(given) as meter:
        out = hidden()
        kept = meter.live
        out.backward(torch.ones_like(out))
    found = passes(_tiny(5, "meta"), rows, width, checkpointing)
    assert found.score == pytest.approx(score.peak, rel=0.05)
    assert found.kept == pytest.approx(kept, rel=0.05)
    assert found.backward == pytest.approx(meter.peak, rel=0.05)
    if checkpointing:
        assert kept < 10 * rows * width * 128 * 4


def test_the_meter_counts_what_is_made_and_let_go():
    given = torch.ones(1000)
    with Meter([given]) as meter:
        view, a = given[:10], given * 2
        assert meter.live == 4000 and view.shape == (10,)
        b = a + 1
        assert meter.live == 8000
        del a, b
    assert meter.live == 0 and meter.peak == 8000


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, phase, mend",
    [
        (["world_size=1"], "", r"set deepspeed.zero_optimization.offload_optimizer={device: cpu} or world_size=\d+$"),
        (["world_size=1", OFFLOADED, f"{SHARE}=0.85"], "rollout", rf"set {SHARE}=0\.\d"),
        (["model.gradient_checkpointing=false"], "update", "set model.gradient_checkpointing=true"),
        (["train.tokens_per_micro_batch=262144"], "update", r"set train.tokens_per_micro_batch=\d+"),
        (["rollout.vllm.sleep_level=0", f"{SHARE}=0.7"], "", "set rollout.vllm.sleep_level=2"),
        ([f"{SHARE}=0.2"], "KV cache", rf"less than one sequence .*set {SHARE}=0\.\d"),
        (["model.gradient_checkpointing=false", "rollout.vllm.sleep_level=0", f"{SHARE}=0.8"], "", "set .+=.+ and .+=.+"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_key_that_mends_it(overrides, phase, mend):
    cfg, planner, plan = planned("qwen3_8b", 80, *overrides)
    with pytest.raises(ConfigError, match=mend) as caught:
        check_plan(planner, plan, cfg)
    assert phase in str(caught.value) and "\n" not in str(caught.value)


def test_the_mend_of_8b_on_one_card_fits():
    cfg, planner, plan = planned("qwen3_8b", 80, "world_size=1", OFFLOADED)
    check_plan(planner, plan, cfg)
    assert plan.host > 100 * GIB, "masters, moments and gradients are in the machine's memory"


def test_nothing_mends_a_model_that_no_card_holds():
    cfg, planner, plan = planned("qwen3_8b", 80)
    tiny = replace(plan, card=Card("a small one", 2 * GIB, True))
    with pytest.raises(ConfigError, match="set more or larger cards, or a smaller model"):
        check_plan(planner, tiny, cfg)


def test_a_cpu_is_refused_by_its_memory(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2 * GIB // 4096}.get)
    cfg, planner, plan = planned("mathapi_cpu", None, "rollout.vllm.kv_cache_mib=512", prompts=(120, 150))
    with pytest.raises(ConfigError, match=r"this machine's 2.0 GiB over 2 rank.*set rollout.vllm.kv_cache_mib=\d+"):
        check_plan(planner, plan, cfg)


# --- what is printed ----------------------------------------------------------------------------------------------------


def test_the_table_fits_a_terminal():
    cfg, _, plan = planned("qwen3_8b", 80)
    text = io.StringIO()
    Console(file=text, width=100).print(table(plan))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 100 and lines[0].startswith("memory, GiB a rank, of a card sold as 80 GB")
    assert lines[1].split()[-6:] == ["start", "rollout", "score", "update", "step", "push"]
    (together,) = [line.split()[1:] for line in lines if line.startswith("together")]
    assert [float(x) for x in together] == [round(plan.total(p) / GIB, 2) for p in memory.PHASES]
    rows = {line.split("  ")[0] for line in lines}
    assert {"weights (ZeRO-3 share)", "gradients", "vLLM: KV cache", "activations kept", "left", "which is"} <= rows
