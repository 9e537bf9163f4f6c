"""The sparse backward on real hidden states: `python -m benchmarks.reports.sparse_backward GSM8K.jsonl [--errors-only]`.

Two parts, written to sparse_backward.json. Errors: the backward of log-probs at many tolerances and three temperatures, against
float64, beside the bound that each call proved, what rounding dz to bfloat16 alone does, and what leaving small columns out does.
Times: one call forward and backward beside the exact one and the peers, each with its error; measure these on a quiet machine.
--errors-only keeps the times that are in the file.

Hidden states: of SmolLM2-135M-Instruct on GSM8K's questions and answers, targets sampled from the model itself; and, for times,
of a head of Qwen3's vocabulary on made-up hidden states whose entropies are an RL policy's. Row gradients are normal numbers, as
advantages of both signs are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gear_kernels import linear_token_stats, sparse

from ..harness.cases import QWEN3_VOCABULARY
from ..harness.environment import RESULTS, environment
from ..harness.measure import OtherLoad, Timing, elapsed_ms, interleave
from ..harness.tables import keep_for_page

FILE = "sparse_backward.json"
EXACT, SPARSE = "gear_kernels, exact", "gear_kernels, sparse"
COARSE, COARSER = "gear_kernels, sparse, tolerance 2^-7", 2.0**-7  # whose errors, a tenth of its bound, are below bfloat16's too


@dataclass(frozen=True)
class Effort:
    """Sizes. rows: of hidden states in the errors' part, in the times' and of made-up ones.  vocabulary, width: of these."""

    error_rows: int = 384
    time_rows: int = 4096
    made_up_rows: int = 2048
    temperatures: tuple[float, ...] = (1.0, 0.6, 0.4)
    tolerances: tuple[float, ...] = tuple(2.0**-k for k in range(3, 13, 2))
    vocabulary: int = QWEN3_VOCABULARY
    width: int = 1024
    rounds: int = 5
    seconds: float = 60.0


QUICK = Effort(96, 96, 96, (1.0,), (0.1, 0.01), 1200, 64, 2, 1.0)


@dataclass(frozen=True)
class Rows:
    """A call's inputs: hidden states [N, D] under `weight` [V, D], targets sampled at this temperature, row gradients [N]."""

    name: str
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    row_grads: torch.Tensor
    temperature: float
    entropy: float  # nats, their mean


# --- inputs -------------------------------------------------------------------------------------------------------------------


def smollm2(file: Path, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states [rows, D] of SmolLM2 on GSM8K's problems and answers, float32, and its head [V, D]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gear_trainer.demo.smollm2 import ensure_smollm2

    folder = ensure_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found, count = [], 0
    with torch.no_grad():
        for line in file.read_text().splitlines():
            row = json.loads(line)
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt")["input_ids"]
            found.append(lm.model(input_ids=ids).last_hidden_state[0, :-1])
            count += len(found[-1])
            if count >= rows:
                break
    return torch.cat(found)[:rows], lm.lm_head.weight.detach().clone()


def made_up(effort: Effort) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that point at three tokens each, under a random head whose first column gives every token its frequency,
    rank^-1.5: a language model's unlikely tokens are not all alike, and without it they are a plain of noise.
    """
    draw = torch.Generator().manual_seed(0)
    rows, weight = effort.made_up_rows, torch.randn(effort.vocabulary, effort.width, generator=draw) / effort.width**0.5
    frequency = torch.arange(1, effort.vocabulary + 1) ** -1.5
    tokens = torch.multinomial(frequency, 3 * rows, replacement=True, generator=draw).view(-1, 3)
    shares = torch.rand(rows, 3, generator=draw)
    hidden = (weight[tokens] * shares[..., None]).sum(1) + 0.1 * torch.randn(rows, effort.width, generator=draw) / 32
    hidden *= 12
    hidden[:, 0], weight[:, 0] = 8, frequency.log() / 8
    return hidden, weight


def with_targets(name: str, hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> Rows:
    """Rows with targets out of their own distributions at this temperature."""
    draw, targets = torch.Generator().manual_seed(1), []
    for part in hidden.split(64):
        targets.append(torch.multinomial(torch.softmax(part @ weight.T / temperature, -1), 1, generator=draw)[:, 0])
    entropy = linear_token_stats(hidden, weight, stats=("entropy",), temperature=temperature).entropy
    assert entropy is not None
    grads = torch.randn(len(hidden), generator=draw)
    return Rows(name, hidden, weight, torch.cat(targets), grads, temperature, entropy.mean().item())


# --- what is run --------------------------------------------------------------------------------------------------------------

Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]  # the gradients of hidden states and weight


def differentiated(rows: Rows, logprobs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype=torch.float32) -> Call:
    """A call of log-probs (of hidden states and weight) forward and backward."""

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (rows.hidden, rows.weight))
        (logprobs(hidden, weight) * rows.row_grads).sum().backward()
        assert hidden.grad is not None and weight.grad is not None
        return hidden.grad, weight.grad

    return call


def ours(rows: Rows, backward: str = "exact", tolerance: float = sparse.TOLERANCE, dtype=torch.float32) -> Call:
    """A call of this package's operator."""
    options = {"backward": backward, "backward_tolerance": tolerance, "temperature": rows.temperature}

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = linear_token_stats(hidden, weight, rows.targets, stats=("logprobs",), **options).logprobs
        assert found is not None
        return found

    return differentiated(rows, logprobs, dtype)


def entrants(rows: Rows, compiled: bool) -> dict[str, Call]:
    """Ours, exact and sparse, and the peers that give log-probs alone."""

    def eager(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(hidden @ weight.T / rows.temperature, -1).gather(-1, rows.targets[:, None])[:, 0]

    calls = {EXACT: ours(rows), SPARSE: ours(rows, "sparse"), COARSE: ours(rows, "sparse", COARSER)}
    calls["eager torch"] = differentiated(rows, eager)
    if not compiled:
        return calls
    calls["torch.compile"] = differentiated(rows, torch.compile(eager, dynamic=False))
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return calls

    def cut(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scaled = hidden / rows.temperature
        return -linear_cross_entropy(scaled, weight, rows.targets, reduction="none", impl="torch_compile")

    return calls | {"cut-cross-entropy 25.1": differentiated(rows, cut)}


# --- errors -------------------------------------------------------------------------------------------------------------------


def distance(found: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> list[float]:
    """Relative errors of the gradients in the Frobenius norm."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


def altered(rows: Rows, truth: tuple[torch.Tensor, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    """Errors of gradients whose d loss / d logits [128, V] are changed block by block; all else is in float64."""
    weight, d_hidden, d_weight = rows.weight.double(), [], torch.zeros_like(truth[1])
    for start in range(0, len(rows.hidden), 128):
        part = slice(start, start + 128)
        hidden = rows.hidden[part].double()
        dz = -torch.softmax(hidden @ weight.T / rows.temperature, -1)
        dz[torch.arange(len(dz)), rows.targets[part]] += 1
        dz = change(dz) * rows.row_grads[part, None] / rows.temperature
        d_hidden.append(dz @ weight)
        d_weight += dz.T @ hidden
    return distance((torch.cat(d_hidden), d_weight), truth)


def rounded(dz: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16: every bfloat16 backward has these errors at least."""
    return dz.bfloat16().double()


def filtered(dz: torch.Tensor) -> torch.Tensor:
    """Columns that are below 2^-12 throughout the block left out, with nothing in their place: cut-cross-entropy's rule on a GPU,
    where it asks it of tiles of a vocabulary that it has sorted. On a CPU it leaves nothing out.
    """
    return dz * (dz.abs().amax(0) >= 2.0**-12)


def curve(rows: Rows, effort: Effort) -> dict:
    """Bound, share of columns and errors at each tolerance; errors of the exact backward, of rounded and of filtered dz."""
    truth = ours(rows, dtype=torch.float64)()
    points = []
    for tolerance in effort.tolerances:
        with sparse.reports() as reports:
            errors = distance(ours(rows, "sparse", tolerance)(), truth)
        points.append({"tolerance": tolerance, "errors": errors, **reports[0]._asdict()})
    changed = {name: altered(rows, truth, change) for name, change in (("rounded", rounded), ("filtered", filtered))}
    exact = distance(ours(rows)(), truth)
    return {"temperature": rows.temperature, "entropy": rows.entropy, "points": points, "exact": exact, **changed}


# --- times --------------------------------------------------------------------------------------------------------------------


def race(rows: Rows, effort: Effort, compiled: bool) -> dict:
    """Times of all entrants in turn, and their errors against our exact float32 backward."""
    torch.compiler.reset()
    calls = entrants(rows, compiled)
    truth = tuple(x.double() for x in calls[EXACT]())
    first = {name: elapsed_ms(call) for name, call in calls.items()}
    errors = {name: distance(call(), truth) for name, call in calls.items()}
    with sparse.reports() as reports:
        calls[SPARSE]()
    timings: dict[str, Timing] = interleave(calls, first, effort.rounds, effort.seconds)
    found = [{"name": name, "timing": asdict(timings[name]), "errors": errors[name]} for name in calls]
    shape = [*rows.hidden.shape[:1], *rows.weight.shape]
    return {"name": rows.name, "entropy": rows.entropy, "shape": shape, **reports[0]._asdict(), "rows": found}


# --- entry point --------------------------------------------------------------------------------------------------------------


def show(console: Console, found: dict) -> None:
    """Print both parts."""
    for one in found["curves"]:
        table = Table("tolerance", "bound", "columns kept", "dH error", "dW error", title=f"{one['entropy']:.2f} nats")
        for p in one["points"]:
            table.add_row(f"{p['tolerance']:.1e}", f"{p['bound']:.1e}", f"{p['kept']:.1%}", *(f"{e:.1e}" for e in p["errors"]))
        for name in ("rounded", "filtered"):
            table.add_row(f"dz {name}", "", "", *(f"{e:.1e}" for e in one[name]))
        console.print(table)
    for race_ in found.get("times", {}).get("races", []):
        title = f"{race_['name']}, {race_['entropy']:.2f} nats, kept {race_['kept']:.1%}"
        table = Table("", "ms", "dH error", "dW error", title=title)
        for row in race_["rows"]:
            table.add_row(row["name"], f"{row['timing']['median_ms']:.0f}", *(f"{e:.1e}" for e in row["errors"]))
        console.print(table)


def inputs(file: Path, effort: Effort, errors_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """SmolLM2's hidden states and head; made-up ones for a quick run."""
    rows = effort.error_rows if errors_only else max(effort.error_rows, effort.time_rows)
    return made_up(effort) if effort is QUICK else smollm2(file, rows)


def run(file: Path, effort: Effort, output: Path, errors_only: bool, compiled: bool) -> dict:
    """Measure, print and write; what the file holds."""
    hidden, weight = inputs(file, effort, errors_only)
    part = hidden[: effort.error_rows]
    parts = [with_targets("SmolLM2 on GSM8K", part, weight, t) for t in effort.temperatures]
    curves = [curve(one, effort) for one in track(parts, "errors")]
    found = {**environment(), "rows": len(part), "shape": list(weight.shape), "curves": curves}
    kept = json.loads((output / FILE).read_text()) if (output / FILE).is_file() else {}
    if errors_only:
        found |= {name: kept[name] for name in ("times",) if name in kept}
    else:
        load, states = OtherLoad(), hidden[: effort.time_rows]
        cases = [("SmolLM2 on GSM8K", states, weight, t) for t in effort.temperatures]
        cases += [("made-up states under Qwen3's vocabulary", *made_up(effort), t) for t in (1.0,)]
        races = [race(with_targets(*case), effort, compiled) for case in track(cases, "times")]
        found["times"] = {**environment(), "other_load": load.share(), "races": races}
    show(Console(), found)
    keep_for_page(found, output / FILE, Console())
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.sparse_backward", description=__doc__)
    parser.add_argument("file", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--errors-only", action="store_true", help="leave the times as they are in the file")
    parser.add_argument("--no-compile", action="store_true", help="leave out the peers that compile")
    parser.add_argument("--quick", action="store_true", help="tiny made-up shapes: a self-test of a few seconds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    run(asked.file, QUICK if asked.quick else Effort(), asked.output, asked.errors_only, not asked.no_compile)


if __name__ == "__main__":
    main()
