"""A checkpoint goes on with another number of ranks than wrote it: two ranks, then one, then two again, beside two throughout."""

import json

import pytest
import torch
from scripted_runs import RESHARDED

from gear_trainer.errors import RunError
from gear_trainer.policy import reshard


@pytest.fixture(scope="module")
def result(server, tmp_path_factory):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("reshard")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=160, head_dim=32, tie_word_embeddings=False, initializer_range=0.2, **sizes))
    model.save_pretrained(folder / "a")
    found = {}
    for what, ranks in (("whole", 2), ("one", 1), ("back", 2)):
        run = server.call(folder / f"{what}.log", "reshard_ranks:main", folder, what, ranks=ranks)
        assert run.wait(900) == [0] * ranks, run.text()[-3000:]
        found[what] = json.loads((folder / f"{what}.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", RESHARDED)
@pytest.mark.parametrize("what, step", [("one", 2), ("back", 3)])
def test_the_next_step_is_that_of_the_ranks_that_were_there(result, case, what, step):
    got = result[what][case]
    assert got["anew"] and got["own is as it was"]
    assert got["loaded"] == 0 if what == "one" else got["loaded"] < tolerance(case), "one rank's own step lies between"
    assert got["gap"] < tolerance(case) < result["whole"][case]["moved"] / 10
    counts, tensors = got["steps"]
    assert set(counts) == {step} and tensors == len(counts), "each part of the parameters counts for itself"
    assert len(counts) > 1 or "lora" in case, "several parts"


def tolerance(case):
    return 2e-3 if "bfloat16" in case else 1e-5  # rounding of the weights, where a sum in another order falls on the other side


@pytest.mark.slow
@pytest.mark.parametrize("case", RESHARDED)
def test_nothing_is_left_of_what_was_written_anew(result, case):
    scripts = ["zero_to_fp32.py", "zero_to_torch.py"]  # DeepSpeed's, which it leaves beside every checkpoint
    assert result["back"][case]["left"] == ["latest", "step-2", "step-3", "step-4", *scripts]


def test_what_cannot_be_written_anew_is_one_line(alone, tmp_path, monkeypatch):
    (tmp_path / "step-2").mkdir()
    monkeypatch.setattr(reshard.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"step-2: written by 2 ranks, and cannot be made into shards for 1 \(exit code 1\): make"):
        reshard.make_universal(tmp_path / "step-2", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]
