"""The demo's step beside TRL's runs, its engine samples as engines must, its figures are counted by hand. Never a time."""

import importlib.util
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.page.performance_page import beside_trl
from benchmarks.reports import step_beside_trl as report
from benchmarks.reports.step_entrants import outcome, tool
from benchmarks.reports.transformers_engine import TransformersEngine
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.rollout import Request, engine_class
from gear_trainer.tasks import make_task

ROOT = Path(__file__).parents[1]
PAIR = (report.OURS_SLOWLY, report.THEIRS)


# --- the engine -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """On a two-layer Qwen3 of 45 characters, with weights large enough to have likes and dislikes."""
    spec = importlib.util.spec_from_file_location("beside_trl_tiny", ROOT / "examples" / "trl_grpo_gear" / "tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder, tok = tmp_path_factory.mktemp("tiny"), tiny.tokenizer()
    model = tiny.model(tok)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return TransformersEngine(config(), str(folder))


def config(*more):
    return load_config(ROOT / report.CONFIG, [report.ENGINE, "eval.every=0", *more])


def requests(temperature=1.0):
    prompts = ([5, 6, 7], [9], [30, 4, 22, 11, 8], [9])
    return [Request(prompt, 6 + i, seed=i, temperature=temperature) for i, prompt in enumerate(prompts)]


def test_a_seed_gives_the_same_tokens_in_any_company(engine):
    together = engine.generate(requests())
    for request, completion in zip(requests(), together, strict=True):
        (alone,) = engine.generate([request])
        assert alone.ids == completion.ids and alone.logprobs == pytest.approx(completion.logprobs, abs=1e-5)
    assert together[1].ids != together[3].ids[: len(together[1].ids)], "the same prompt under two seeds"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_logprobs_are_the_tempered_models_own(engine, temperature):
    for request, completion in zip(requests(temperature), engine.generate(requests(temperature)), strict=True):
        logits = engine.lm(torch.tensor([request.prompt_ids + completion.ids])).logits[0, len(request.prompt_ids) - 1 : -1]
        own = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None]).squeeze(-1)
        assert completion.logprobs == pytest.approx(own.tolist(), abs=1e-4)
        assert completion.ended == (completion.ids[-1] == engine.eos) and len(completion.ids) <= request.max_tokens
        assert completion.ended or len(completion.ids) == request.max_tokens


def test_its_draws_have_the_models_frequencies(engine):
    found = engine.generate([Request([5, 6, 7], 1, seed=i) for i in range(4000)])
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=engine.lm.config.vocab_size)
    p = engine.lm(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    spread = (p * (1 - p) / 4000).sqrt()
    assert ((counts / 4000 - p).abs() < 5 * spread + 1e-3).all() and p.max() > 0.1


def test_a_push_is_what_is_sampled_from(engine):
    before, version = engine.generate(requests()), engine.version
    weights = {name: p.clone() for name, p in engine.lm.named_parameters()}
    engine.push((name, torch.zeros_like(p)) for name, p in weights.items())
    flat = engine.generate(requests())
    size = engine.lm.config.vocab_size
    assert all(lp == pytest.approx(-math.log(size)) for c in flat for lp in c.logprobs) and flat[0].version == version + 1
    engine.push(iter(weights.items()))
    assert [c.ids for c in engine.generate(requests())] == [c.ids for c in before]


def test_it_draws_from_whole_distributions_alone():
    assert engine_class(config()) is TransformersEngine
    TransformersEngine.check(config(), None)
    with pytest.raises(ConfigError, match="eval.top_p=0.9"):
        TransformersEngine.check(config("eval.every=1", "eval.top_p=0.9"), None)


# --- TRL's side -----------------------------------------------------------------------------------------------------------------


def test_a_tool_of_trls_answers_as_the_tasks_own():
    task = make_task("mathapi", 0, {})
    add = tool(task, "add")
    assert add.__name__ == "add" and json.loads(add(a=19, b=4)) == {"result": 23} and "error" in json.loads(add(a="x", b=4))


def test_the_reward_is_the_tasks():
    said = lambda **message: [{"role": "assistant", "content": "", **message}]  # noqa: E731
    called = [*said(tool_calls=[{}]), {"role": "tool", "content": '{"result": 23}'}]
    rows = [said(content="23"), said(content="it is 32"), said(content=""), said(content="23", tool_calls=[{}]), called]
    assert outcome(rows, ["23"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


# --- the report -----------------------------------------------------------------------------------------------------------------


def test_rates_and_ratios_are_counted_by_hand():
    def step(tokens, generation, whole, cpu):
        seconds = {"generation": generation, "update": whole - generation, "push": 0.0, "step": whole}
        return {"tokens": tokens, "success": 0.5, "trajectories": 8, "seconds": seconds, "cpu_seconds": cpu}

    warm = step(1, 100.0, 200.0, 9.0)  # in no figure
    ours, theirs = (
        [warm, step(60, 1.0, 3.0, 2.0), step(90, 1.0, 2.0, 2.0)],
        [warm, step(60, 2.0, 6.0, 6.0), step(60, 3.0, 4.0, 3.0)],
    )
    found = [{"name": name, "steps": steps} | report.summary(steps[1:]) for name, steps in zip(PAIR, (ours, theirs), strict=True)]
    assert found[0]["tokens_per_second"] == {"generation": 75.0, "update": 60.0, "step": 32.5, "cpu": 37.5}
    assert found[1]["seconds"]["step"] == 5.0 and found[1]["least_step"] == 4.0 and found[0]["tokens"] == 75
    (ratio,) = report.ratios(found)
    assert (ratio["of"], ratio["to"], ratio["generation"], ratio["step"]) == (*PAIR, (2.0 + 4.5) / 2, (2.0 + 3.0) / 2)
    assert ratio["cpu"] == (3.0 + 2.25) / 2


@pytest.mark.slow
def test_both_trainers_take_steps_in_turn_on_the_same_prompts(tmp_path):
    """A step each behind the warm-up; that both read the same prompts is checked by the process of TRL's."""
    entrants = tuple(one for one in report.ENTRANTS if one.name in PAIR)
    found = report.run(entrants, 1, tmp_path, ROOT / ".cache", True, Console(file=io.StringIO()))
    assert json.loads((tmp_path / report.FILE).read_text()) == found and found["quick"] and found["sequences"] == 4
    assert [one["name"] for one in found["entrants"]] == list(PAIR) and {"trl", "deepspeed"} <= found["versions"].keys()
    for one in found["entrants"]:
        assert len(one["steps"]) == 2
        for step in one["steps"]:
            s = step["seconds"]
            assert 4 <= step["tokens"] <= 4 * 2 * 8 and 0 < s["generation"] < s["step"] and 0 < s["update"] < s["step"]
            assert s["generation"] + s["update"] + s["push"] <= s["step"] + 0.01 and step["cpu_seconds"] > 0
    (ratio,) = found["ratios"]
    ours, theirs = (report.rate(one["steps"][1], "step") for one in found["entrants"])
    assert ratio["step"] == pytest.approx(ours / theirs)


def test_an_entrant_that_ends_is_told_with_its_words(tmp_path):
    broken = report.Entrant("broken", overrides=("credit=nonsense",))
    with pytest.raises(RuntimeError, match="broken ended with 1:(.|\n)*nonsense"):
        report.run((broken,), 1, tmp_path, ROOT / ".cache", True, Console(file=io.StringIO()))
    assert not (tmp_path / report.FILE).exists()


def test_the_page_has_every_entrant_and_ratio():
    found = json.loads((ROOT / "benchmarks" / "results" / report.FILE).read_text())
    text = "\n".join(beside_trl(found))
    assert not found["quick"] and [one["name"] for one in found["entrants"]] == [one.name for one in report.ENTRANTS]
    assert [(one["of"], one["to"]) for one in found["ratios"]] == list(report.RATIOS)
    assert all(f"| {one['of']} **/** {one['to']} |" in text for one in found["ratios"])
