"""A head whose parameters are DTensors, by FSDP2 or torch's tensor parallelism, on 2 gloo ranks (one start for all cases)."""

import json

import pytest


@pytest.fixture(scope="module")
def result(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    run = server.call(folder / "log", "fsdp_ranks:main", folder / "result.json", CUDA_VISIBLE_DEVICES="")
    assert run.wait(900) == [0, 0], run.text()[-6000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("way", ("FusedHead", "grad_placements"))
def test_R1_what_the_message_advises_gives_the_right_gradient(result, way):
    assert {"lm_head.weight", "lm_head.bias", "body.weight"} < set(result[way])
    assert max(result[way].values()) < 1e-6, result[way]
    assert ("FusedHead.adopt(lm_head)" if way == "FusedHead" else 'grad_placements=[Partial("avg")]') in result["direct"]


@pytest.mark.slow
def test_R1_the_message_does_not_advise_a_bare_full_tensor(result):
    """It is silently wrong by 97 % and more: a rank's slice of its own gradient in place of the ranks' mean."""
    assert result["bare full_tensor"]["lm_head.weight"] > 0.5
    assert result["direct"].startswith("head.weight is a DTensor; expected a plain tensor. To mend: under fully_shard make it a")
    assert "full_tensor()" not in result["direct"] and "\n" not in result["direct"]
    assert result["late"] == "the head is a FSDPLinear; expected a plain nn.Linear. To mend: adopt the head before fully_shard."


@pytest.mark.slow
def test_R5_colwise_parallel_cannot_turn_statistics_into_logits(result):
    """Its hook keeps the first positional argument alone; without targets the layer is the plain one, with them it refuses."""
    found = result["colwise"]
    assert "head.weight is a DTensor" in found["message"] and "Head(tensor.to_local(), group=mesh)" in found["message"]
    assert found["logits"] == [10, 90] and found["shard"] < 2e-6
