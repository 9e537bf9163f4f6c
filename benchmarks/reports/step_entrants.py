"""A trainer that takes a step when it is told to, as a process: what step_beside_trl.py starts for each of its entrants.

Reads its `Order` as JSON from the command line and takes a step to warm up; then each line of its input asks for a step. A line
of JSON on its output answers with a step's figures. Everything that libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gear_trainer.config import Config, load_config

CONFIG = "gear_trainer/configs/mathapi_cpu.yaml"
TRAINED = ("score", "credit", "update")  # phases of ours that stand beside what TRL does after its generation


@dataclass(frozen=True)
class Order:
    """One process of an entrant: whose trainer, the demo's configuration with its changes, TRL's rows in a backward pass."""

    trainer: str
    overrides: tuple[str, ...]
    steps: int
    micro_batch: int = 64


@dataclass(frozen=True)
class Step:
    """Figures of one step over all ranks. tokens: those that the policy sampled; trajectories: those that the update learnt from.

    seconds, of this rank: generation, with the tools' work and, under several ranks, the wait for the slowest; update, with
    rewards, scoring and credit; push, the new weights' way into the sampler; step, all of it.
    """

    tokens: int
    success: float
    trajectories: int
    seconds: dict[str, float]


def ours(order: Order, line: Line) -> None:
    """Take gear_trainer's steps. Collective."""
    from gear_trainer.build import build, resolve_model_path, set_environment
    from gear_trainer.preflight.checks import check
    from gear_trainer.runs.interrupts import Interrupts

    cfg = load_config(CONFIG, list(order.overrides))
    task, recipe = check(cfg)
    set_environment(cfg)
    trainer, _ = build(cfg, task, recipe, resolve_model_path(cfg, task), None, Interrupts(), False)
    trainer.push()
    sequences = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    for step in range(1, order.steps + 1):
        line.wait()
        values = trainer.step(step)
        s = values["seconds"]
        found = {"generation": s["rollout"] + s["wait"], "update": sum(s[name] for name in TRAINED), "push": s["push"]}
        learnt = round(sequences * (1 - values["zero_advantage"]))
        line.answer(Step(int(values["policy_tokens"]), values["success"], learnt, found | {"step": s["step"]}))


# --- TRL ------------------------------------------------------------------------------------------------------------------------


def theirs(order: Order, line: Line) -> None:
    """Take TRL's steps."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from trl import import_utils

    import_utils.is_vllm_available = lambda *_, **__: False  # its import alone takes 8 s, and TRL 1.16 allows 0.31 at most
    from transformers import TrainerCallback

    cfg = load_config(CONFIG, list(order.overrides))
    trainer, spent = trl_trainer(cfg, order)

    class Asked(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            line.wait()
            spent.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            line.answer(spent.step(time.perf_counter()))

    trainer.add_callback(Asked())
    trainer.train()


class Spent:
    """The figures of TRL's step under way, which its trainer below fills in."""

    def __init__(self) -> None:
        self.start = self.generation = 0.0
        self.tokens, self.success, self.trajectories = 0, 0.0, 0

    def step(self, now: float) -> Step:
        """The whole step, which ends now. Weights stay where they are sampled from: there is no push."""
        whole = now - self.start
        seconds = {"generation": self.generation, "update": whole - self.generation, "push": 0.0, "step": whole}
        return Step(self.tokens, self.success, self.trajectories, seconds)


def trl_trainer(cfg: Config, order: Order) -> tuple[Any, Spent]:
    """TRL's GRPOTrainer on the demo's model, prompts and tools, with the demo's sizes; and where its figures are put."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer
    from trl.chat_template_utils import qwen3_template

    from gear_trainer.build import resolve_model_path
    from gear_trainer.rollout.chat import Chat
    from gear_trainer.tasks import make_task

    task, spent = make_task(cfg.task, cfg.seed, cfg.task_args), Spent()
    path = resolve_model_path(cfg, task)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    chat = Chat(AutoTokenizer.from_pretrained(path), task.tools)
    tokenizer.response_template = qwen3_template  # TRL knows a Qwen3 by its full template alone; the demo's is shorter

    class Timed(GRPOTrainer):
        def _generate(self, prompts: list) -> Any:
            start = time.perf_counter()
            found = super()._generate(prompts)
            spent.generation = time.perf_counter() - start
            if self.state.global_step == 0 and found[0] != [chat.prompt_ids(prompt) for prompt in prompts]:
                raise RuntimeError("TRL renders the prompts otherwise than gear_trainer: their steps cannot be compared")
            return found

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            mask = found["completion_mask"] * found.get("tool_mask", 1)
            sums = self.accelerator.gather((mask.sum(), found["advantages"].ne(0).sum()))
            spent.tokens, spent.trajectories = (int(x.sum()) for x in sums)
            spent.success = self._metrics["train"]["reward"][-1]
            return found

    model = AutoModelForCausalLM.from_pretrained(path, dtype=cfg.model.dtype)
    args, data = trl_arguments(cfg, order), trl_rows(cfg, task, order.steps)
    tools = [tool(task, schema["function"]["name"]) for schema in task.tools or []]
    return Timed(model, outcome, args, data, processing_class=tokenizer, tools=tools), spent


def trl_arguments(cfg: Config, order: Order) -> Any:
    """The configuration's numbers under TRL's names."""
    from trl import GRPOConfig

    r, t = cfg.rollout, cfg.train
    rows = r.prompts_per_step * r.group_size // cfg.world_size
    micro_batch = min(order.micro_batch, rows)
    return GRPOConfig(
        str(cfg.run_dir),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=r.group_size,
        temperature=r.temperature,
        max_completion_length=r.max_model_len,  # of all turns together
        generation_kwargs={"max_new_tokens": r.max_new_tokens},  # of each
        max_tool_calling_iterations=1,  # the demo's two turns
        shuffle_dataset=False,
        max_steps=order.steps,
        learning_rate=t.lr,
        lr_scheduler_type="constant",
        max_grad_norm=t.gradient_clipping,
        loss_type="grpo",  # aggregation: seq_mean_token_mean
        beta=cfg.kl.coefficient,
        gradient_checkpointing=cfg.model.gradient_checkpointing,
        seed=cfg.seed,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def trl_rows(cfg: Config, task: Any, steps: int) -> Any:
    """The problems of all steps, in the order in which gear_trainer asks for them."""
    from datasets import Dataset

    problems = [task.train_problem(i) for i in range(cfg.rollout.prompts_per_step * steps)]
    return Dataset.from_list([{"prompt": p.messages, "answer": p.answer} for p in problems])


def tool(task: Any, name: str) -> Callable[..., str]:
    """A function that TRL calls as the tool `name`, answered by an episode of the task."""
    from gear_trainer.tasks.tool_calls import call_turn

    problem = task.train_problem(0)  # the answer of a call is the same in any episode

    def call(a: float, b: float) -> str:
        reply = task.episode(problem).step(call_turn(name, {"a": a, "b": b}))
        return reply.messages[0].content

    call.__name__ = name
    call.__doc__ = f"{name} two numbers\n\nArgs:\n    a: the first\n    b: the second\n\nReturns:\n    the result"
    return call


def outcome(completions: list, answer: list[str], **_: Any) -> list[float | None]:
    """The demo's reward: 1 where the last turn is an answer, and its last number the truth."""
    from gear_trainer.tasks.common import last_number, same_number

    last = [completion[-1] for completion in completions]
    said = ["" if m["role"] != "assistant" or m.get("tool_calls") else m["content"] for m in last]
    return [float(same_number(last_number(text), truth)) for text, truth in zip(said, answer, strict=True)]


# --- the process ----------------------------------------------------------------------------------------------------------------


class Line:
    """The coordinator's line to this process."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.warm, self.cpu = False, 0.0

    def wait(self) -> None:
        """Return when a step is asked for; the first is not, it warms up."""
        if self.warm and not sys.stdin.readline():
            os._exit(0)  # nothing is left to be written, and the engines' own ends take seconds
        self.warm, self.cpu = True, time.process_time()

    def answer(self, step: Step) -> None:
        """Tell a step's figures, and the processor's seconds that this process took since it was asked for it."""
        found = asdict(step) | {"cpu_seconds": time.process_time() - self.cpu}
        print(json.dumps(found), file=self.answers, flush=True)


def main() -> None:
    """Take the warm-up step, then one a line of the input."""
    line, order = Line(), Order(**json.loads(sys.argv[1]))
    (ours if order.trainer == "gear_trainer" else theirs)(order, line)
    line.wait()  # until the others are done too


if __name__ == "__main__":
    main()
