"""The credit scan on typical and hostile packs: `python -m benchmarks.reports.credit [--device cuda] [--quick]`.

Prints a table and writes credit_report.json and credit_report.md: medians of interleaved calls of `credit_weights`, the reference
back end and Algorithm 1 written as a Python loop on the typical pack, and whether all of them agree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gear_kernels
from gear_kernels import Gear
from gear_kernels.methods import METHODS

from ..harness.credit_inputs import Pack, credit_inputs, credit_packs
from ..harness.environment import RESULTS, environment
from ..harness.measure import OtherLoad, elapsed_ms, interleave
from ..harness.tables import markdown_table

LOOP, REFERENCE = "Python loop", "reference back end"
TYPICAL = "typical, 512 sequences"


def python_loop(p: Pack) -> list[float]:
    """GEAR with its defaults as anyone would first write it: Eq. 2-5 and Algorithm 1, token by token. Returns the weights."""
    gear, weights = Gear(), []
    signal, entropy, bounds = p.signal.tolist(), p.entropy.tolist(), p.cu_seqlens.tolist()
    for b, a in enumerate(p.advantages.tolist()):
        x, h = signal[bounds[b] : bounds[b + 1]], entropy[bounds[b] : bounds[b + 1]]
        top = max(x, default=0.0) if len(set(x)) > 1 else 0.0  # a constant signal tells nothing apart
        g = [max(v, 0.0) / top if top > 0 else 0.0 for v in x]
        credit, t = list(g), 0
        while t < len(g):
            if not g[t] > gear.kl_threshold:
                t += 1
                continue
            end = t + 1
            while end < len(g) and not h[end] > gear.entropy_ratio * h[t]:
                end += 1
            end = min(end, len(g) - 1)
            for u in range(t, end + 1):
                credit[u] = g[t]
            t = end + 1
        sign = (a > 0) - (a < 0)
        for c in credit:
            w = 0.5 + (0.5 - c) * sign
            weights.append(gear.alpha * w + 1 - gear.alpha / 2)
    return weights


def by_reference(p: Pack) -> gear_kernels.Credit:
    """A pack's credit by the reference back end."""
    with gear_kernels.backend("reference"):
        return p.credit()


def measure(device: str, tokens: int, rounds: int, step: Callable) -> list[dict]:
    """A row for each pack and each method; ours with its quartiles, the slow ways on the typical pack alone."""
    rows, found = [], {name: p.to(device) for name, p in credit_packs(tokens).items()}
    typical = next(iter(found.values()))
    calls: dict[str, Callable[[], Any]] = {name: p.credit for name, p in found.items()}
    for name, method in METHODS.items():
        if name not in ("gear", "random", "tilt"):  # the last two cut segments in Python
            calls[f"method {name}"] = lambda m=method: typical.credit(m, **credit_inputs(m, typical))
    slow = {REFERENCE: lambda: by_reference(typical), LOOP: lambda: python_loop(typical)} if device == "cpu" else {}
    first = {name: elapsed_ms(call, device) for name, call in step((calls | slow).items())}
    times = interleave(calls, first, rounds, 60.0, device=device) | interleave(slow, first, 3, 60.0, device=device)
    base = times[TYPICAL].median_ms
    for name, t in times.items():
        shown = t.low_ms, t.high_ms
        rows.append({"what": name, "median_ms": t.median_ms, "quartiles_ms": shown, "to_typical": t.median_ms / base})
    return rows


def agreement(tokens: int) -> dict[str, float]:
    """The largest difference of the weights on small packs of every kind, to the reference and to the loop."""
    worst = {REFERENCE: 0.0, LOOP: 0.0}
    for p in credit_packs(tokens).values():
        got = p.credit().weights
        if got.numel():
            worst[REFERENCE] = max(worst[REFERENCE], (got - by_reference(p).weights).abs().max().item())
            if p.mask is None:
                worst[LOOP] = max(worst[LOOP], (got.double() - torch.tensor(python_loop(p)).double()).abs().max().item())
    return worst


def table(rows: list[dict]) -> list[list[str]]:
    """The report's rows as cells below HEADS."""

    def line(r: dict) -> list[str]:
        low, high = r["quartiles_ms"]
        return [r["what"], f"{r['median_ms']:.3g}", f"{low:.3g}-{high:.3g}", f"{r['to_typical']:.2f}"]

    return [line(r) for r in rows]


HEADS = ["pack, method or way", "median ms", "quartiles", "time / typical"]


def markdown(head: dict, rows: list[dict]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items() if version != "not installed")
    lines = ["# Credit report", "", f"{head['date']}, commit {head['commit']}. {head['where']}, {versions}.", ""]
    lines += [f"- {head['tokens']} tokens a pack, but where one sequence or 4096 are named; a long sequence has at most 131072."]
    lines += [f"- Other load during the timing: {head['other_load']:.0%}."]
    differences = ", ".join(f"{v:.2g} to the {k}" for k, v in head["agreement"].items())
    lines += [f"- Largest difference of the weights, small packs of every kind, float32: {differences}.", ""]
    return "\n".join([*lines, *markdown_table(HEADS, table(rows))]) + "\n"


def run(device: str, quick: bool, output: Path, console: Console | None = None) -> dict:
    """Measure, print the table, write credit_report.json and credit_report.md to `output`; what the JSON holds."""
    console = console or Console()
    tokens = 1 << 14 if quick else 1 << 20
    same = agreement(1 << 12)
    load = OtherLoad()
    rows = measure(device, tokens, 3 if quick else 15, lambda items: track(list(items), "first calls", console=console))
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    head = {**environment(), "where": where, "tokens": tokens, "other_load": load.share(), "agreement": same}
    shown = Table(*HEADS, title="credit_weights")
    for cells in table(rows):
        shown.add_row(*cells)
    console.print(shown)
    output.mkdir(parents=True, exist_ok=True)
    found = {**head, "rows": rows}
    (output / "credit_report.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / "credit_report.md").write_text(markdown(head, rows))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.credit", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small packs: a self-test of a few seconds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the two files go")
    options = parser.parse_args(arguments)
    run(options.device, options.quick, options.output)


if __name__ == "__main__":
    main()
