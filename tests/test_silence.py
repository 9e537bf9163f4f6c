"""The signal's floor in the trainer: credit_args reach the method, and bfloat16 without a floor is warned of."""

from pathlib import Path

import pytest

from gear_kernels import Gear
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.preflight.checks import make_method, print_plan, warnings
from gear_trainer.tasks import make_task

DEMO = Path(__file__).parents[1] / "gear_trainer" / "configs" / "mathapi_cpu.yaml"


def lines(*overrides):
    cfg = load_config(DEMO, list(overrides))
    return warnings(cfg, make_method(cfg))


def test_D10_credit_args_reach_the_method():
    assert make_method(load_config(DEMO, ["credit_args.signal_floor=0.001"])) == Gear(signal_floor=1e-3)
    assert make_method(load_config(DEMO, ["credit=fixed", "credit_args.signal_floor=1.0e-3"])).signal_floor == 1e-3
    assert make_method(load_config(DEMO, ["signal=reverse_kl", "credit_args.signal_floor=2"])).normalizer == "max"
    with pytest.raises(ConfigError, match="credit_args: Gear.signal_floor: given -1; expected a finite number of nats"):
        make_method(load_config(DEMO, ["credit_args.signal_floor=-1"]))


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
    print_plan(cfg, make_task(cfg.task, cfg.seed, cfg.task_args), make_method(cfg))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"warning: {lines('model.dtype=bfloat16')[0]}"
