"""Teachers, distillation losses, a KL term beside them under 2-rank ZeRO-3, against plain models (one start of ranks for all)."""

import json

import pytest
import torch

OPSD = (
    "opsd, own weights",
    "opsd, own weights, persistent",
    "opsd, the policy's",
    "opsd, the policy's, checkpointed",
    "opsd+grpo",
)
SAMPLED = ("opsd+grpo, sampled", "sdar", "sdar, the policy's")
HELD = ("opsd+grpo, kl",)  # to a reference model, which is the teacher's copy
POLICIES = ("initial", "ema", "ema, persistent", "ema, bfloat16", "synced")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(server, tmp_path_factory):
    pytest.importorskip("deepspeed")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("teacher")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = Qwen3Config(vocab_size=160, head_dim=32, tie_word_embeddings=False, initializer_range=0.2, **sizes)
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
    run = server.call(folder / "log", "teacher_ranks:main", folder, CUDA_VISIBLE_DEVICES="")
    assert run.wait(1100) == [0, 0], run.text()[-6000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("case", OPSD + SAMPLED + HELD)
def test_distillation_gradients_equal_one_process(result, case):
    got = result["gradients"][case]
    assert "lm_head.weight" in got["errors"] and len(got["errors"]) > 20, "untied"
    assert max(got["errors"].values()) < 1e-5 and got["divergence error"] < 1e-5 and not got["head stayed whole"]


@pytest.mark.parametrize("case", OPSD)
def test_distillation_lessens_the_divergence(result, case):
    first, second, third = result["gradients"][case]["divergence"]
    assert first > second > third > 0


def test_teacher_rows_keep_no_activations(result):
    """Forwards with gradients of rank 0's three micro-batches: the students' alone, twice where layers are recomputed."""
    forwards = {case: got["forwards"] for case, got in result["gradients"].items()}
    assert forwards["opsd, the policy's"] == forwards["opsd, own weights"]
    assert forwards["opsd, the policy's, checkpointed"] == 2 * forwards["opsd, the policy's"]


@pytest.mark.parametrize("name", POLICIES)
def test_the_teachers_weights_follow_their_rule(result, name):
    got = result["policies"][name]
    assert got["weights"] < 1e-6 and got["kept"] < 1e-7, "each step, against the rule on whole weights"
    assert (got["moved"] > 0) == (name != "initial") and got["behind"] > 0, "a teacher that is neither end of the rule"


@pytest.mark.parametrize("name", POLICIES)
def test_scores_are_those_of_unsharded_models(result, name):
    scores = result["policies"][name]["scores"]
    assert scores.keys() == {"logprobs", "teacher_logprobs", "signal", "teacher_entropy"}
    assert max(scores.values()) < (0.15 if "bfloat16" in name else 2e-5), scores


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_run_repeats_its_teacher_bitwise(result, name):
    got = result["policies"][name]
    assert got["resumed bitwise"] and got["teacher file"] == (0 if name == "initial" else 2)


def test_a_checkpoint_without_the_teacher_is_explained(result):
    assert "teacher_rank0.pt is missing: the run had no teacher.weights=synced" in result["policies"]["synced"]["message"]
