"""The signal's floor in the trainer: credit_args reach the method, and bfloat16 without a floor is warned of."""

from pathlib import Path

import pytest

from gear_kernels import Gear
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.preflight.checks import warnings
from gear_trainer.preflight.dry_run import print_plan
from gear_trainer.recipe import resolve
from gear_trainer.tasks import make_task

DEMO = Path(__file__).parents[1] / "gear_trainer" / "configs" / "mathapi_cpu.yaml"


def lines(*overrides):
    cfg = load_config(DEMO, list(overrides))
    return warnings(cfg, resolve(cfg))


def test_D10_credit_args_reach_the_method():
    assert resolve(load_config(DEMO, ["credit_args.signal_floor=0.001"])).method == Gear(signal_floor=1e-3)
    assert resolve(load_config(DEMO, ["credit=fixed", "credit_args.signal_floor=1.0e-3"])).method.signal_floor == 1e-3
    assert resolve(load_config(DEMO, ["signal=reverse_kl", "credit_args.signal_floor=2"])).method.normalizer == "max"
    with pytest.raises(ConfigError, match="credit_args: Gear.signal_floor: given -1; expected a finite number of nats"):
        resolve(load_config(DEMO, ["credit_args.signal_floor=-1"]))


@pytest.mark.parametrize("credit", ["gear", "token", "opsd+gear"])
def test_D10_bfloat16_without_a_floor_is_warned_of(credit):
    (line,) = lines("model.dtype=bfloat16", f"credit={credit}")
    assert "bfloat16" in line and "nats" in line and "credit_args.signal_floor" in line and "\n" not in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=float32"],
        ["model.dtype=bfloat16", "credit_args.signal_floor=0.001"],
        ["model.dtype=bfloat16", "credit_args.normalizer=none"],
        ["model.dtype=bfloat16", "credit=grpo"],
        ["model.dtype=bfloat16", "credit=rlsd"],
    ],
)
def test_D10_no_warning_where_nothing_is_stretched(overrides):
    assert lines(*overrides) == []


def test_D10_the_dry_run_ends_with_the_warning(capsys):
    cfg = load_config(DEMO, ["model.dtype=bfloat16"])
    print_plan(cfg, make_task(cfg.task, cfg.seed, cfg.task_args), resolve(cfg))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"warning: {lines('model.dtype=bfloat16')[0]}"
