"""What the ranks of teacher_ranks.py and its kin are told to do, for them and for the tests of what they find."""

import re
from pathlib import Path

from gear_trainer.config import load_config

VOCAB, TEMPERATURE = 160, 0.8
DEMO = Path(__file__).parents[1] / "gear_trainer" / "configs" / "mathapi_cpu.yaml"
WHOLE = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 100000}}"
SHARDED = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
PACKED = "train.packing=true"


def config(folder, *overrides):
    run = [f"output_dir={folder}", f"model.path={folder}/a", "rollout.prompts_per_step=4", "rollout.group_size=2"]
    run += ["rollout.max_model_len=60", f"rollout.temperature={TEMPERATURE}", "train.tokens_per_micro_batch=60"]
    run += ["train.gradient_clipping=0", "train.lr=0.01", "train.importance_cap=null"]
    return load_config(DEMO, [*run, *overrides])


# --- against one process in float64: oracle_ranks.py --------------------------------------------------------------------------

# Adam's first step is lr g / (|g| + eps): with its own 1e-8 a g that is 0 but for rounding would be a step of the whole rate, in
# the direction of the rounding. Gradients here are about 1e-2.
EPS = "deepspeed.optimizer.params.eps=1.0e-2"
PADDED = "train.packing=false"
GEAR = ["credit=gear", "credit_args.entropy_ratio=1.2"]  # 1.5 of a random model's entropy is hardly ever reached
TWICE = "train.updates_per_step=2"
ORACLE = {
    "grpo": ["credit=grpo", "train.aggregation=token_mean", "train.weight_decay=0.1", "train.gradient_clipping=2",
             "train.lr=0.02", "train.lr_warmup_steps=2", PADDED, WHOLE],
    "gear, padded": [*GEAR, PADDED, SHARDED],
    "gear, packed": [*GEAR, PACKED, SHARDED],
    "gear, kl": [*GEAR, "kl.coefficient=0.5", "train.entropy_bonus=0.05", PACKED, SHARDED],
    "gspo": ["credit=grpo", "train.policy_loss=gspo", "train.clip_low=0.02", "train.clip_high=0.02", TWICE, PACKED, SHARDED],
    "two updates": [*GEAR, "train.clip_low=0.1", "train.clip_high=0.2", "kl.coefficient=0.1", TWICE, PACKED, WHOLE],
    "lora": [*GEAR, "kl.coefficient=0.5", "lora.rank=4", "lora.alpha=8", TWICE, PACKED, SHARDED],
}  # fmt: skip


def oracle_config(folder, name, *overrides):
    """A case's configuration; overrides go over it."""
    run = re.sub(r"\W+", "-", name)
    common = [f"name={run}", "model.dtype=float32", "rollout.group_size=3", "train.importance_cap=2"]
    return config(folder, *common, *ORACLE[name], EPS, *overrides)


# --- other numbers of ranks: reshard_ranks.py ---------------------------------------------------------------------------------

SEVERAL = "deepspeed={zero_optimization: {sub_group_size: 9000, stage3_param_persistence_threshold: 100}}"  # parts of Adam
LESS = "deepspeed.optimizer.params.eps=1.0e-3"  # its own 1e-8 would make a step of the rate of a gradient's rounding
RESHARDED = {
    "teacher ema": ["credit=opsd+grpo", "teacher.weights=ema", "teacher.ema_rate=0.25", SEVERAL, LESS],
    "lora, teacher ema": ["credit=opsd+grpo", "teacher.weights=ema", "teacher.ema_rate=0.25", SEVERAL, LESS, "lora.rank=4"],
    "bfloat16": ["credit=grpo", "model.dtype=bfloat16", SEVERAL, LESS],
}
