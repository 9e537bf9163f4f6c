"""FusedHead: a drop-in nn.Linear, and exact gradients under 2-rank DeepSpeed ZeRO-3 (one start of ranks for all cases)."""

import json

import pytest
import torch
from torch import nn

from gear_kernels import FusedHead, GearKernelsError, Head, linear_token_stats

NAMES = [f"{tie}, {name}" for tie in ("untied", "tied") for name in ("one", "checkpointed", "head checkpointed", "uneven")]
NAMES += [f"{tie}, uneven checkpointed" for tie in ("untied", "tied")]


@pytest.fixture(scope="module")
def zero3(server, tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero3")
    run = server.call(folder / "log", "zero3_head_ranks:main", folder / "result.json", CUDA_VISIBLE_DEVICES="")
    assert run.wait(900) == [0, 0], run.text()[-6000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_every_case_ran(zero3):
    assert sorted(zero3) == sorted(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
def test_gradients_equal_one_process(zero3, case):
    errors = zero3[case]["errors"]
    assert ("lm_head.weight" in errors) == case.startswith("untied") and len(errors) > 20
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_weight_read_outside_its_module_is_explained(zero3):
    assert "ZeRO-3 holds it partitioned" in zero3["untied, one"]["message"]
    assert "FusedHead.adopt" in zero3["untied, one"]["message"]


def test_adopt_changes_nothing_but_the_class():
    model = nn.ModuleDict({"embed": nn.Embedding(11, 4), "lm_head": nn.Linear(4, 11, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    before, layer = list(model.state_dict()), model["lm_head"]
    head = FusedHead.adopt(layer, softcap=3.0)
    assert head is layer and head.weight is model["embed"].weight and list(model.state_dict()) == before
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(head(hidden), nn.functional.linear(hidden, head.weight))
    assert "softcap=3.0" in repr(head) and FusedHead.adopt(head).softcap is None


def test_forward_is_the_operator():
    head = FusedHead(4, 11, softcap=3.0, scale=0.5)
    hidden, teacher, targets = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randint(11, (2, 3))
    got = head(hidden, targets, teacher, temperature=0.7, ignore_index=3)
    operator = Head(head.weight, head.bias, 3.0, 0.5)
    want = linear_token_stats(hidden, operator, targets, teacher, temperature=0.7, ignore_index=3)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True)) and got.entropy.shape == (2, 3)
    assert [n for n, v in head(hidden, targets)._asdict().items() if v is not None] == ["logprobs", "entropy"]
    assert [n for n, v in head(hidden, stats=("entropy",))._asdict().items() if v is not None] == ["entropy"]


def test_adopt_refuses_other_layers():
    class Quantised(nn.Linear):
        pass

    with pytest.raises(GearKernelsError, match="the head is a Quantised; expected a plain nn.Linear"):
        FusedHead.adopt(Quantised(2, 3))
