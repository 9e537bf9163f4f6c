"""The example's curve: runs train.py with each method and seed, and draws curve.png beside this file."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHODS = ("gear", "grpo")


def rewards(method: str, seed: int, folder: Path, steps: int) -> list[float]:
    """The mean reward of every step of a run."""
    out = folder / f"{method}-{seed}"
    command = [sys.executable, str(HERE / "train.py"), "--credit", method, "--seed", str(seed), "--steps", str(steps)]
    subprocess.run([*command, "--output", str(out)], check=True)
    return [log["reward"] for log in json.loads((out / "log.json").read_text()) if "reward" in log]


def draw(axes: Any, found: list[float], colour: str, label: str | None) -> None:
    """The reward of every step as a dot, and means of five steps as a line."""
    axes.plot(range(1, len(found) + 1), found, ".", color=colour, alpha=0.4)
    means = [sum(found[i : i + 5]) / len(found[i : i + 5]) for i in range(0, len(found), 5)]
    axes.plot([i * 5 + 3 for i in range(len(means))], means, color=colour, label=label)


def main() -> None:
    """Run and draw."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        for colour, method in enumerate(METHODS):
            for seed in range(asked.seeds):
                found = rewards(method, seed, Path(folder), asked.steps)
                print(method, seed, [round(x, 3) for x in found], flush=True)
                draw(axes, found, f"C{colour}", method if seed == 0 else None)
    axes.set(xlabel="step", ylabel="mean reward (share of right sums)", ylim=(0, 1))
    axes.legend(title="credit")
    figure.savefig(HERE / "curve.png", dpi=120)


if __name__ == "__main__":
    main()
