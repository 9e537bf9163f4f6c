"""GEAR's published figures (arXiv 2605.11853, single runs), to stand beside an evaluation's, with what differs in the set-up."""

from __future__ import annotations

from typing import Any

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError

# by benchmark and model: the figure of each method. The paper's mean@16; fractions
FIGURES: dict[str, dict[str, dict[str, float]]] = {
    "toolsandbox": {"Qwen3-4B": {"grpo": 0.346, "gear": 0.423}, "Qwen3-8B": {"grpo": 0.383, "gear": 0.537}},
    "bfcl": {"Qwen3-4B": {"grpo": 0.919, "gear": 0.941}},
    "acebench": {"Qwen3-4B": {"grpo": 0.312, "gear": 0.363}},
    "aime24": {"Qwen3-4B": {"grpo": 0.431, "gear": 0.503}, "Qwen3-8B": {"grpo": 0.465, "gear": 0.514}},
    "aime25": {"Qwen3-4B": {"grpo": 0.474, "gear": 0.534}},
    "gsm8k": {"Qwen3-4B": {"grpo": 0.924, "gear": 0.958}},
    "math": {
        "Qwen3-4B": {
            "grpo": 0.836, "gear": 0.879, "token": 0.844, "kl_only": 0.845, "entropy_only": 0.856, "tool_call": 0.840,
            "entropy_window": 0.848,
        },
        "Qwen3-8B": {"grpo": 0.812, "gear": 0.842},
    },
    "math500": {"Qwen3-4B": {"grpo": 0.754, "gear": 0.802}},
}  # fmt: skip
SAMPLING = {"samples": 16, "temperature": 0.6, "top_p": 0.95}
TRAINING = {"train.lr": 1e-6, "rollout.prompts_per_step": 128, "rollout.group_size": 8}
SIZES = {"gsm8k": 1319, "math": 5000, "math500": 500, "aime24": 30, "aime25": 30, "acebench": 50}  # problems of the whole set
UNSTATED = "the paper states neither context nor length of an answer, nor whether the model thinks"
NOTES = {
    "toolsandbox": "the paper does not say whether its multiple-tool-call subset is all 656 variants or the 82 base scenarios",
    "bfcl": "the paper does not say which BFCL version and categories it means",
    "acebench": "the figure is the agent sets' end-to-end accuracy; language, user model and prompt are unstated, and one item "
    "of the English 50 is 2 points",
    "aime25": "published copies of AIME25 carry five problems with broken LaTeX; a repaired copy is another set",
    "math": "the paper's training set holds 52 of MATH's 5,000 test problems",
}


def benchmark_of(settings: dict[str, Any], name: str = "") -> str | None:
    """The benchmark that a result is set beside: the one that is named, else that of its set's or its task's name, if any."""
    return next((n.lower() for n in (name, settings["set"], settings["task"]) if n.lower() in FIGURES), None)


def check(name: str, cfg: Config) -> None:
    """Refuse a benchmark that the paper has no figure of. Raises ConfigError."""
    names = [name] if name else [cfg.task, *cfg.eval.sets]
    if not any(n.lower() in FIGURES for n in names):
        raise ConfigError(f"--paper: the paper has no figure of {', '.join(names)}; name one of {', '.join(FIGURES)}")


def beside(result: dict[str, Any], name: str = "", trained: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The published figures of a result's benchmark, and a line for each thing that differs in the set-up; None for other sets.

    trained: of a run of this trainer, `trained_with`.
    """
    settings = result["settings"]
    benchmark = benchmark_of(settings, name)
    if benchmark is None:
        return None
    return {"benchmark": benchmark, "figures": FIGURES[benchmark], "differs": _differs(benchmark, settings, trained)}


def _differs(benchmark: str, settings: dict[str, Any], trained: dict[str, Any] | None) -> list[str]:
    model = trained["model"] if trained else settings["model"]
    lines = []
    if not any(known.lower() in model.lower() for known in FIGURES[benchmark]):
        lines.append(f"model: {model}, the paper's {' and '.join(FIGURES[benchmark])}")
    lines += [f"{k}: {settings[k]}, the paper's {v}" for k, v in SAMPLING.items() if settings[k] != v]
    if (size := SIZES.get(benchmark)) and settings["problems"] != size:
        lines.append(f"problems: {settings['problems']} of {size}")
    if trained is None:
        lines.append("training: none that is known here; the paper's figures are of trained models")
    else:
        lines += [f"{key}: {trained[key]}, the paper's {value}" for key, value in TRAINING.items() if trained[key] != value]
        lines.append(f"training: {trained['train.steps']} steps on {trained['task']}, the paper's 2 epochs of its own sets")
    lines.append(f"lengths: {settings['max_new_tokens']} tokens a turn, context {settings['max_model_len']}; {UNSTATED}")
    lines.append(f"thinking: {settings['thinking']}; tools: {settings['tools']}")
    return lines + ([NOTES[benchmark]] if benchmark in NOTES else [])
