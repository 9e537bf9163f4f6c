"""A model with the fused head under DDP, FSDP2, DeepSpeed ZeRO, torch.compile, autocast, checkpointing and peft, on 2 gloo ranks.

docs/where_models_live.md has the table of what is tested here. One start of ranks for all cases.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gear_kernels import FusedHead, TokenStats

CASES = {  # way: models, by the names of where_models_live_ranks.py
    "DDP": ("untied", "tied", "checkpointed", "LoRA", "saved head", "LoRA head"),
    "DDP, unused parameters looked for": ("untied",),
    "DDP, compiled": ("one layer",),
    "FSDP2": ("untied", "tied", "checkpointed", "LoRA", "saved head", "tied, saved head"),
    "FSDP2, outermost": ("tied", "LoRA head"),
    "FSDP2, compiled": ("one layer",),
    "ZeRO-1": ("untied", "tied"),
    "ZeRO-2": ("untied", "tied", "checkpointed", "LoRA", "saved head", "LoRA head"),
    "ZeRO-3": ("untied", "tied", "checkpointed", "LoRA", "saved head", "tied, saved head", "LoRA head"),
}
ADAPTED = ("LoRA", "saved head", "tied, saved head", "LoRA head")
ROUNDED = ("DDP, autocast", "FSDP2, bfloat16", "ZeRO-2, bfloat16", "ZeRO-3, bfloat16")


@pytest.fixture(scope="module")
def result(server, tmp_path_factory):
    pytest.importorskip("deepspeed")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("live")
    path, log = folder / "result.json", folder / "ranks.log"
    ranks = server.call(log, "where_models_live_ranks:main", path, json.dumps(CASES), TORCHDYNAMO_DISABLE="0")
    assert ranks.wait(1500) == [0, 0], log.read_text()[-6000:]
    return json.loads(path.read_text())


def cases(*ways, models=None):
    return [(way, name) for way in ways for name in CASES[way] if models is None or name in models]


def assert_as_one_process(result, way, name):
    errors, moved = result["errors"][way][name], result["moved"][name]
    assert any("lm_head" in parameter for parameter in errors) == (name != "tied")
    frozen = set(errors) - set(moved)
    assert bool(frozen) == (name in ADAPTED) and not any(errors[parameter] for parameter in frozen)
    assert min(moved.values()) > 1e-3 and max(errors.values()) < 1e-5, errors


PLAIN = ("untied", "tied")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "name"), cases("DDP", "FSDP2", "FSDP2, outermost", "ZeRO-1", "ZeRO-2", "ZeRO-3", models=PLAIN))
def test_three_steps_equal_one_process(result, way, name):
    """Parameters after three AdamW steps on two ranks are those of one process with whole logits, within 1e-5."""
    assert_as_one_process(result, way, name)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "name"), cases("DDP", "FSDP2", "FSDP2, outermost", "ZeRO-2", "ZeRO-3", models=ADAPTED))
def test_peft_on_and_around_the_head(result, way, name):
    """LoRA in the body under a frozen head, the head trained whole by modules_to_save, and LoRA on the head itself."""
    assert_as_one_process(result, way, name)
    trained = [parameter for parameter in result["moved"][name] if "lm_head" in parameter]
    wanted = {"LoRA": [], "LoRA head": ["lora_A", "lora_B"]}.get(name, ["modules_to_save"])
    assert [parameter.split(".")[2] for parameter in trained] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("way", ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"))
def test_checkpointed_layers_and_head(result, way):
    assert_as_one_process(result, way, "checkpointed")


@pytest.mark.slow
@pytest.mark.parametrize("way", ("DDP, compiled", "FSDP2, compiled"))
def test_compiled_without_a_graph_break(result, way):
    """DDP around the whole compiled model; FSDP2 around compiled layers and a compiled head."""
    assert_as_one_process(result, way, "one layer")


@pytest.mark.slow
def test_ddp_finds_the_statistics_in_what_forward_returns(result):
    assert_as_one_process(result, "DDP, unused parameters looked for", "untied")


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUNDED)
def test_bfloat16_costs_no_more_than_twice_what_plain_logits_cost(result, case):
    """Both in the same system, against one float32 process; the statistics are float32."""
    ours, plain = result["rounding"][case]["ours"], result["rounding"][case]["plain"]
    assert ours.pop("dtype") == "torch.float32" and plain.pop("dtype") == "torch.float64"
    assert all(0 < error <= 2 * plain[quantity] for quantity, error in ours.items()), (ours, plain)


@pytest.mark.slow
def test_fsdp2_gathers_the_head_around_itself_alone(result):
    assert result["gathered"]["whole"] == {"before": False, "within": True, "after": False}


@pytest.mark.slow
def test_fsdp2_has_no_warning_for_the_statistics(result):
    """They are no views: written in place (as all cases under FSDP2 do) they keep the hook that gathers the weight again."""
    assert result["gathered"]["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "says"),
    {
        "output_dtype": "fully_shard's mp_policy rounds the statistics to output_dtype=torch.bfloat16; expected float32",
        "temperatures": "temperature has dtype torch.bfloat16, rounded; expected float32 or float64",
        "LoRA head": "the weight under the head's LoRA adapter is sharded; .* give the head no fully_shard of its own",
        "tied head alone": r"is shared with a parameter .* fully_shard\(\[module_a, module_b\]\)",  # torch's own
    }.items(),
)
def test_what_fsdp2_cannot_do_is_refused_in_one_line(result, case, says):
    message = result["refused"][case]
    assert re.search(says, message) and "\n" not in message
    assert message.startswith("ValueError: " if case == "tied head alone" else "GearKernelsError: ")


# --- one process ----------------------------------------------------------------------------------------------------------------


def test_results_of_the_head_are_tensors_of_their_own():
    head = FusedHead(8, 30)
    hidden, targets = torch.randn(5, 8), torch.randint(30, (5,))
    out = head(hidden, targets, stats=("logprobs", "entropy"))
    assert not any(field._is_view() for field in (out.logprobs, out.entropy))
    (want,) = torch.autograd.grad((0.5 * out.logprobs).sum(), head.weight)
    again = head(hidden, targets, stats=("logprobs", "entropy"))
    again.logprobs.mul_(0.5).sum().backward()
    assert torch.equal(head.weight.grad, want)


def test_accelerate_keeps_the_type_and_the_numbers():
    """What accelerator.prepare puts around a model's forward: autocast, and outputs cast to float32."""
    operations = pytest.importorskip("accelerate.utils.operations")
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    head = FusedHead(8, 30)
    x, targets = torch.randn(5, 6), torch.randint(30, (5,))

    def forward(x):
        return head(model(x), targets)

    prepared = operations.convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(forward))
    out = prepared(x)
    assert type(out) is TokenStats and out.reverse_kl is None and out.logprobs.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(x)
    assert torch.equal(out.logprobs, head(hidden, targets).logprobs)  # autocast does not reach into the head


def test_every_test_that_the_page_names_is_there():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"\btest_\w+", (root / "docs" / "where_models_live.md").read_text()))
    tests = "\n".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    files = {path.stem for path in (root / "tests").glob("test_*.py")}
    assert len(named) > 10 and not [name for name in named - files if f"def {name}(" not in tests]
