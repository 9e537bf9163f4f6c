"""Engines behind `rollout.engine`: found by name, checked before a start, and small enough to write in an afternoon."""

import pytest

from gear_trainer.config import ConfigError, load_config
from gear_trainer.preflight.checks import check
from gear_trainer.rollout import Engine, engine_class, make_engine

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"


class Echo(Engine):
    def __init__(self, cfg, model_path, *, text="7"):
        self.model_path, self.text = model_path, text

    def generate(self, requests):
        return []

    def push(self, weights):
        list(weights)


class Half(Engine):
    def generate(self, requests):
        return []


class Stranger:
    pass


def own(name, *more):
    return load_config(DEMO, [f"rollout.engine={__name__}:{name}", *more])


def test_the_demos_engine_is_vllm_in_the_process_of_its_rank():
    assert engine_class(load_config(DEMO)).__name__ == "ColocatedVllm"
    assert "kv_cache_memory_bytes: 67108864" in engine_class(load_config(DEMO)).describe(load_config(DEMO))


def test_an_engine_of_ones_own_is_made_with_its_options():
    engine = make_engine(own("Echo", "rollout.engine_options.text=x"), "folder")
    assert (engine.model_path, engine.text) == ("folder", "x") and engine.version == 0
    assert "Echo" in type(engine).describe(own("Echo"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.engine=vlm"], "rollout.engine=vlm: unknown; use vllm_colocated, vllm_server, or module:Class"),
        (["rollout.engine=no_such:Thing"], r"rollout.engine=no_such:Thing: cannot be loaded \(ModuleNotFound.*check the module"),
        ([f"rollout.engine={__name__}:Stranger"], "Stranger is no gear_trainer.rollout.Engine: derive it"),
        ([f"rollout.engine={__name__}:Half"], "Half has no push: write them"),
        ([f"rollout.engine={__name__}:Echo", "rollout.engine_options.txt=1"], "engine_options.txt: unknown; Echo takes text"),
        (["rollout.engine_options.text=1"], "rollout.engine_options.text: unknown; ColocatedVllm takes none"),
    ],
)
def test_what_cannot_be_an_engine_is_one_line_before_anything_starts(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(load_config(DEMO, overrides))
    assert "\n" not in str(caught.value)
