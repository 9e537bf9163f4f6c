"""The trainer's scoring pass beside the same pass with a peer's head: `python -m pytest benchmarks [--full]`.

Student and teacher rows of a batch of rollouts go through a small Qwen3 with an untied head, then through the head. Ours is the
trainer's own forward; a peer gets the same hidden states of the policy tokens.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gear_trainer.policy.batching import MicroBatch, micro_batch
from gear_trainer.policy.model import Policy, hidden_states
from gear_trainer.rollout import Rollout

from .bench_stats import everyone, note
from .harness.cases import OUTPUTS, Case, Truth, definition
from .harness.measure import extra_memory, keep_freed_blocks
from .harness.peers import OURS, Peer
from .harness.tables import first_call

ROLLOUTS, PROMPT, HINT, TURN, REPLY = 8, 48, 16, 24, 12  # tokens: two turns with a tool's reply between them
VOCABULARY, WIDTH, LAYERS = 32003, 128, 2


@functools.cache
def policy() -> Policy:
    """A small Qwen3 with random weights and a head of its own, as the trainer wraps it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(**sizes, **heads, tie_word_embeddings=False, initializer_range=0.1, dtype="float32")
    return Policy(Qwen3ForCausalLM(config).eval())


@functools.cache
def batch() -> MicroBatch:
    """Every rollout scored under its own prompt and under the teacher's, which has a hint more."""
    random = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=random).tolist()

    rollouts = []
    for i in range(ROLLOUTS):
        prompt = tokens(PROMPT)
        rollout = Rollout(None, 0, i, prompt, prompt[:-4] + tokens(HINT) + prompt[-4:])
        for count, policy_turn in ((TURN, True), (REPLY, False), (TURN, True)):
            rollout.append(tokens(count), [0.0] * count if policy_turn else None)
        rollouts.append(rollout)
    return micro_batch(rollouts, list(range(ROLLOUTS)), teacher=True)


def case_of(lm: torch.nn.Module) -> Case:
    """Hidden states of the batch's policy tokens under both prompts, and the head."""
    b, weight = batch(), lm.get_output_embeddings().weight
    with torch.no_grad():
        taught, student = hidden_states(lm, b.teacher), hidden_states(lm, b.student)
    return Case(student, taught, b.targets, torch.zeros(2, len(b.targets)), weight)


@functools.cache
def truth() -> Truth:
    """The whole pass in float64."""
    exact = case_of(copy.deepcopy(policy().lm).double())
    with torch.no_grad():
        logits = (hidden @ exact.weight.T for hidden in (exact.student, exact.teacher))
        return Truth(definition(*logits, exact.targets), {}, {}, None)


def trainers(_: Case) -> dict[str, torch.Tensor]:
    """The two head modules as the trainer calls them."""
    found = policy()(batch(), 1.0, OUTPUTS)
    return {name: getattr(found, name) for name in OUTPUTS}


def with_head(function: Callable) -> Callable:
    """The backbone as the trainer runs it, then a peer's head."""
    return lambda _: function(case_of(policy().lm))


def _entrants() -> list:
    return [pytest.param(p, id=p.name, marks=[pytest.mark.full] if p.compiles else []) for p in everyone("hidden")]


@pytest.mark.parametrize("peer", _entrants())
@pytest.mark.benchmark(min_rounds=5, max_time=0.3)
def bench_scoring(benchmark, peer: Peer):
    """The pass with one peer's head; ours must be right."""
    torch.compiler.reset()
    keep_freed_blocks()
    whole = replace(peer, load=lambda: trainers if peer.name == OURS else with_head(peer.load()))
    case = case_of(policy().lm)
    row, call, _ = first_call(whole, case, truth(), "forward")
    if call is None:
        pytest.skip(row.failure)
    assert not (row.wrong and peer.name == OURS), row.errors
    benchmark.group = f"scoring pass, {ROLLOUTS} rollouts, Qwen3 of {LAYERS} layers [{len(case.targets)}, {VOCABULARY}, {WIDTH}]"
    benchmark(call)
    figures = {"bytes": sum(x.nbytes for x in policy().parameters()), "flops": _flops(case), "extra_mib": extra_memory(call)}
    note(benchmark, peer.name, figures, row.errors)


def _flops(case: Case) -> int:
    """Of the products with weights: two a parameter and row, attention's own left out."""
    layers = sum(x.numel() for x in policy().lm.base_model.layers.parameters())
    tokens = sum(rows.input_ids.numel() for rows in (batch().student, batch().teacher))
    return 2 * layers * tokens + 2 * case.weight.numel() * 2 * len(case.targets)
