"""TRL: this package's head behind TRL's fused one, and a GRPOTrainer whose advantages are token by token.

`use_gear_head()` serves every trainer that scores through TRL's fused head: GRPO, RLOO, DPO, KTO, SFT. `GearGRPOTrainer` adds a
teacher's prompt and a credit method to GRPOTrainer; data, rewards, generation, loss and logging stay TRL's own.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from packaging.version import Version  # comes with transformers, as TRL needs it
from torch import Tensor

from ..errors import bad_input, require
from ..ops import LinearCall, linear_token_stats, linear_token_stats_backward
from ..reference.stats import STAT_NAMES, STATE_NAMES
from ..stats import Head, linear_call
from .common import choose, token_advantages

SUPPORTED = ("1.15", "2")  # from, and below: in 1.15 every score of GRPO began to go through the fused head


def _check_version() -> None:
    """Raise ImportError unless a TRL is installed whose seams are those that stand here."""
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or not Version(SUPPORTED[0]) <= Version(found) < Version(SUPPORTED[1]):
        wanted = f"trl>={SUPPORTED[0]},<{SUPPORTED[1]}"
        raise ImportError(f"TRL: found {found}; expected {wanted}. To mend: pip install '{wanted}'.")


_check_version()

from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import maybe_gather_lm_head_ctx, pad  # noqa: E402

# --- the head --------------------------------------------------------------------------------------------------------------

_SEAM = "_ChunkedLogProbFunction"  # what TRL's patched forward looks up in trl.trainer.utils at each call


class HeadSwitch:
    """The state of TRL's fused head, as `use_gear_head` changed it: `restore()`, or the end of a `with`, puts back what was."""

    def __init__(self, replacement: object):
        self._before = getattr(trl_utils, _SEAM)
        setattr(trl_utils, _SEAM, replacement)

    def restore(self) -> None:
        """Put back the head that was there before."""
        setattr(trl_utils, _SEAM, self._before)

    def __enter__(self) -> HeadSwitch:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def use_gear_head() -> HeadSwitch:
    """Put `linear_token_stats` behind TRL's fused LM head, for all trainers of this process: GRPO, RLOO, DPO, KTO, SFT.

    From the call on, or within `with use_gear_head():`. Log-probs and entropies are then taken from float32 logits, never rounded
    to bfloat16 on the way, and carry gradients; so do losses made of them. Of the other outputs, which carry none in TRL either,
    log_sum_sq_probs takes a second sweep, mean_logits one product with the mean of the head's rows, and is_top1 a look of TRL's
    own function at the rows that could be ties; with a softcap mean_logits is left to that function too.
    """
    return HeadSwitch(GearLogProb)


class HeadCall(NamedTuple):
    """A call of TRL's fused head, in the order of its nine arguments."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]
    temperature: float
    chunk_size: int
    softcap: float | None = None
    scale: float = 1.0
    outputs: tuple[str, ...] = OPTIONAL_OUTPUTS

    def cast(self) -> HeadCall:
        """The call with hidden states and head in autocast's dtype, where that is on."""
        kind = self.hidden.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    @property
    def head(self) -> Head:
        """The head as the operators take it."""
        return Head(self.weight, self.bias, self.softcap, self.scale)

    def operator(self, stats: tuple[str, ...], temperature: float | None = None) -> LinearCall:
        """The operator's call for these statistics."""
        return linear_call(self.hidden, self.head, self.targets, temperature=temperature or self.temperature, stats=stats)


class GearLogProb(torch.autograd.Function):
    """TRL's ChunkedLogProbFunction by this package's operator: nine arguments, five outputs, see `use_gear_head`.

    The head is gathered again around the backward under ZeRO-3, as in TRL's own. Under autocast hidden states and head are cast
    to its dtype for the call; without it a float32 head stays float32, where TRL rounds it to the hidden states' dtype.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        """The five outputs of a HeadCall, None where its `outputs` do not name one; chunk_size is unread.

        Log-probs, entropy, log_sum_sq_probs, mean_logits: [N], nats, float32 (float64 for float64). is_top1: [N] bool.
        """
        given = HeadCall(*arguments)
        asked = given.cast()
        call = asked.operator(("logprobs", "entropy") if "entropy" in given.outputs else ("logprobs",))
        values, state, *_ = linear_token_stats(*call)
        ctx.set_materialize_grads(False)  # an entropy that is only logged brings no gradient
        ctx.save_for_backward(given.hidden, given.weight, given.bias, given.targets, state)
        ctx.constants, ctx.count = arguments[4:], len(arguments)
        kind = given.hidden.device.type
        ctx.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        logprobs, entropy = (values[STAT_NAMES.index(name)] for name in ("logprobs", "entropy"))
        others = _others(asked, logprobs, state)
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        return logprobs, entropy if "entropy" in given.outputs else None, *others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias in their dtypes, from those of log-probs and entropy."""
        *tensors, state = ctx.saved_tensors
        given: Any = HeadCall(*tensors, *ctx.constants)
        arrived = {name: x for name, x in zip(("logprobs", "entropy"), gradients, strict=False) if x is not None}
        table = state.new_zeros((len(STAT_NAMES), state.shape[0]))
        for name, gradient in arrived.items():
            table[STAT_NAMES.index(name)] = gradient
        needed = [bool(need) for need in ctx.needs_input_grad[:3]]
        autocast = torch.autocast(state.device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None)
        with maybe_gather_lm_head_ctx(given.weight, given.bias), autocast:
            call = given.cast().operator(tuple(arrived))
            out = linear_token_stats_backward(*call, state, state.new_empty((0, 0)), state.new_empty((0, 0, 0)), table, needed)
        own = (x.to(of.dtype) if need else None for x, of, need in zip(out, given[:3], needed, strict=True))
        return *own, *[None] * (ctx.count - 3)


def _others(call: HeadCall, logprobs: Tensor, state: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """log_sum_sq_probs, mean_logits and is_top1 of a cast call: no gradient comes through them."""
    spread = mean = top = None
    if "log_sum_sq_probs" in call.outputs:  # log sum p^2 = 2 log p(y) - log q(y), q the distribution at half the temperature
        values, *_ = linear_token_stats(*call.operator(("logprobs",), call.temperature / 2))
        spread = 2 * logprobs - values[STAT_NAMES.index("logprobs")]
    if "mean_logits" in call.outputs:
        mean = _mean_logits(call) if call.softcap is None else _by_trl(call, "mean_logits")
    if "is_top1" in call.outputs:
        top = _is_top1(call, logprobs, state)
    return spread, mean, top


def _mean_logits(call: HeadCall) -> Tensor:
    """The mean over the vocabulary is linear in the head: hidden states times the mean of its rows."""
    row = call.weight.mean(0, dtype=torch.float32)
    shift = 0.0 if call.bias is None else call.bias.mean(dtype=torch.float32)
    with torch.autocast(row.device.type, enabled=False):
        return (call.hidden.to(row.dtype) @ row + shift) * (call.scale / call.temperature)


def _is_top1(call: HeadCall, logprobs: Tensor, state: Tensor) -> Tensor:
    """True where the target is the first of the largest logits: surely so above one half, and by TRL's look below it."""
    largest = -state[:, STATE_NAMES.index("log_z")]  # the log-prob of the largest logit: log_z is relative to it
    sure = logprobs > math.log(0.5)
    open_ = (~sure & (logprobs >= largest - 1e-5)).nonzero().flatten()  # the largest or a tie, at rounding's distance
    few = call._replace(hidden=call.hidden[open_], targets=call.targets[open_])
    return sure.index_copy(0, open_, _by_trl(few, "is_top1"))


def _by_trl(call: HeadCall, output: str) -> Tensor:
    """One output of TRL's own function."""
    with torch.no_grad():
        given = call._replace(outputs=(output,))
        return ChunkedLogProbFunction.apply(*given)[1 + OPTIONAL_OUTPUTS.index(output)]


# --- both prompts through one head -------------------------------------------------------------------------------------------


class _BothHidden:
    """Stands in the head's place while a micro-batch is scored twice: keeps the teacher's hidden states, then takes statistics.

    The rows of both passes are the completion's tokens in one order, whatever the prompts' lengths. Nothing of [N, V] is made for
    the teacher alone: both go through one sweep.
    """

    def __init__(self, stats: tuple[str, ...]):
        self.stats = stats
        self.mask = torch.empty(0, dtype=torch.bool)  # [b, length - 1] of the pass to come: positions whose next token is scored
        self.teacher: Tensor | None = None  # [n, D]
        self.found: Tensor | None = None  # [stats, n]

    def apply(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """A HeadCall's five outputs, log-probs and entropy 0: what is asked for stays in `found`."""
        call = HeadCall(*arguments).cast()
        mask, rows = self.mask.flatten().to(call.hidden.device), call.hidden.shape[0]
        if rows == mask.numel():  # where TRL has no Triton it scores every position, prompts too
            call = call._replace(hidden=call.hidden[mask], targets=call.targets[mask])
        scored = call.hidden.shape[0]
        if self.teacher is None:
            self.teacher = call.hidden
        else:
            same = scored == self.teacher.shape[0]
            require(same, f"TRL scored {scored} tokens", f"{self.teacher.shape[0]}, as for the teacher", "use k1, signal='k1'")
            operator = linear_call(
                call.hidden, call.head, call.targets, self.teacher, temperature=call.temperature, stats=self.stats
            )
            values, *_ = linear_token_stats(*operator)
            self.found = torch.stack([values[STAT_NAMES.index(name)] for name in self.stats])
        zero = call.hidden.new_zeros(rows, dtype=torch.float32)
        return zero, zero, None, None, None


# --- the trainer -------------------------------------------------------------------------------------------------------------

GIVES = ("signal", "entropy", "teacher_entropy", "forward_kl", "turn_ids")  # the inputs of methods that TRL's batches have
SIGNALS = ("k1", "reverse_kl")
OF_TEACHER = ("signal", "teacher_entropy", "forward_kl")


class GearGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with a credit method: advantages of shape (B, T) in place of (B,), all else as in TRL.

    After generation and rewards, and before the batch is shuffled, each completion is scored once more behind the teacher's
    prompt, by the policy itself without a gradient; the method turns what differs into token advantages. Metrics are under gear/.

    credit          a name out of gear_kernels.methods.METHODS or a method object, Gear(alpha=0.4).
    teacher_prompt  a function of a row, with all columns of the data set and `prompt` as the student saw it (what an
                    environment's reset added, too), to the teacher's prompt: messages where prompts are messages, else a string.
                    Not needed by methods that read no teacher (grpo, high_entropy).
    signal          k1, the log-ratio of the sampled tokens, or reverse_kl, KL(student || teacher) over the vocabulary; None: the
                    method's own. reverse_kl and the forward KL (sc_grpo, sgcd) take the statistics from both hidden states in one
                    sweep; k1 needs one pass behind the teacher's prompt, and shares the student's with TRL where TRL makes it.

    Other arguments are GRPOTrainer's. Every rank scores every row, so ZeRO-3's gathers meet. Dropout is off while scoring. Raises
    GearKernelsError, before a model is loaded, for methods that read what TRL does not have (turn, gigpo) or without a
    teacher_prompt; for images; and at the first batch where no row of any rank has a prompt of the teacher's own.
    """

    def __init__(
        self,
        *args: Any,
        credit: str | object = "gear",
        teacher_prompt: Callable[[dict[str, Any]], Any] | None = None,
        signal: str | None = None,
        **kwargs: Any,
    ):
        self._credit = choose(credit, GIVES, signals=SIGNALS, signal=signal, trainer="TRL")
        self._reads_teacher = any(name in self._credit.method.needs for name in OF_TEACHER)
        if self._reads_teacher and not callable(teacher_prompt):
            expected = "a function from a row to the teacher's prompt"
            given = f"credit {credit!r} reads a teacher, and teacher_prompt is {teacher_prompt!r}"
            raise bad_input(given, expected, "pass teacher_prompt, or a method without a teacher (grpo, high_entropy)")
        self._teacher_prompt = teacher_prompt
        self._prompts: list[Any] = []  # of the batch, as the student saw them
        self._passes: list[tuple[Tensor, Tensor]] | None = None  # log-probs and entropy of the policy, while a batch is scored
        self._seen_teacher = False  # a batch was scored: the teacher's prompts were looked at
        super().__init__(*args, **kwargs)
        require(not self._is_vlm, "a processor of images was given", "text alone", "use TRL's GRPOTrainer for this model")

    def _generate(self, prompts: list[Any]) -> Any:
        self._prompts = prompts
        return super()._generate(prompts)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's; while a batch is scored, the policy's passes are kept with the entropy, which the head takes anyway."""
        if self._passes is None or model is not self.model:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        result = super()._get_per_token_logps_and_entropies(model, *args, **{**kwargs, "compute_entropy": True})
        self._passes.append(result[:2])
        return result

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        model: Any = self.model
        training, self._passes = model.training, []
        try:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if not training:
                return batch
            model.eval()  # no dropout: its noise would be a signal
            with torch.no_grad():
                rows, metrics = self._score(inputs, batch)
        finally:
            self._passes = None
            model.train(training)
        credit = token_advantages(
            batch["advantages"],
            batch["completion_mask"],
            method=self._credit.method,
            step=self.state.global_step + 1,
            tool_mask=batch.get("tool_mask"),
            **rows,
        )
        batch["advantages"] = credit.token_advantages
        self._log_means({**credit.metrics, **metrics})
        return batch

    def _log_means(self, metrics: dict[str, Tensor]) -> None:
        """Log the ranks' means of 0-d tensors, by one collective."""
        values = torch.stack([x.float() for x in metrics.values()]).unsqueeze(0)
        gathered: Any = self.accelerator.gather(values)
        for name, value in zip(metrics, gathered.mean(0).tolist(), strict=True):
            self._metrics["train"][name].append(value)

    # --- scoring: what the method reads, [B, T] each

    def _score(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The rows that the method reads, and metrics."""
        method, signal = self._credit
        student = (batch["prompt_ids"], batch["prompt_mask"])
        if not self._reads_teacher:
            return ({"entropy": self._student(batch, student)[1]} if "entropy" in method.needs else {}), {}
        teacher, changed = self._teacher(inputs, batch)
        metrics = {"gear/teacher_prompts_changed": changed}
        if signal == "reverse_kl" or "forward_kl" in method.needs:
            names = ("logprobs", "teacher_logprobs", "entropy", "reverse_kl", "forward_kl", "teacher_entropy")
            found = self._both(batch, student, teacher, names)
            k1 = found["logprobs"] - found["teacher_logprobs"]
            rows = {"signal": found["reverse_kl"] if signal == "reverse_kl" else k1}
            return {**rows, **{name: found[name] for name in ("entropy", "forward_kl", "teacher_entropy")}}, metrics
        own, entropy = self._student(batch, student)
        other, other_entropy = self._pass(batch, teacher)
        return {"signal": own - other, "entropy": entropy, "teacher_entropy": other_entropy}, metrics

    def _teacher(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The teacher's prompts, left-padded ids and mask [B, P'], and the share of rows whose prompt is not the student's."""
        assert self._teacher_prompt is not None
        rows = [{**row, "prompt": prompt} for row, prompt in zip(inputs, self._prompts, strict=True)]
        prompts = [self._teacher_prompt(row) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            given, expected = (f"{type(x).__name__}" for x in (prompt, row["prompt"]))
            require(given == expected, f"teacher_prompt gave a {given}", f"a {expected} as the row's prompt", "return its like")
        ids = self._tokenize_prompts(prompts)[0]
        own = zip(batch["prompt_ids"].tolist(), batch["prompt_mask"].tolist(), strict=True)
        same = [[i for i, on in zip(*row, strict=True) if on] == list(new) for row, new in zip(own, ids, strict=True)]
        device = batch["prompt_ids"].device
        changed = 1 - torch.tensor(same, dtype=torch.float32, device=device).mean()
        if not self._seen_teacher:
            everywhere: Any = self.accelerator.gather(changed.reshape(1))
            given = "teacher_prompt left every prompt of the first batch as the student's"
            require(
                bool(everywhere.sum() > 0),
                given,
                "a hint in some",
                "put the ground truth into it: the signal would be 0 everywhere",
            )
            self._seen_teacher = True
        rows_of_ids, pad_id = [torch.as_tensor(row) for row in ids], cast(int, self._tokenizer.pad_token_id)
        padded = pad(rows_of_ids, padding_value=pad_id, padding_side="left").to(device)
        mask = pad([torch.ones_like(row) for row in rows_of_ids], padding_value=0, padding_side="left").to(device)
        return (padded, mask), changed

    def _student(self, batch: dict[str, Any], prompt: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy of the completions, from TRL's own pass where it made one without dropout."""
        old = batch.get("old_per_token_logps")
        made = next((found for found in self._passes or () if found[0] is old), None)
        return made if made is not None and not _drops(cast(torch.nn.Module, self.model)) else self._pass(batch, prompt)

    def _pass(self, batch: dict[str, Any], prompt: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy of the completions behind a prompt, nats."""
        ids, mask, keep = _behind(batch, prompt)
        size = self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, keep, batch_size=size, compute_entropy=True)[:2]

    def _both(self, batch: dict[str, Any], student: Any, teacher: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Statistics of the completions from the hidden states behind both prompts, a micro-batch at a time; 0 on padding."""
        model: Any = self.model
        passes, size, parts = [_behind(batch, prompt) for prompt in (teacher, student)], self.args.per_device_train_batch_size, []
        for start in range(0, passes[0][0].shape[0], size):
            both = _BothHidden(names)
            for ids, mask, keep in passes:
                ids, mask = ids[start : start + size], mask[start : start + size]
                labels = ids.masked_fill(mask == 0, -100)
                labels[:, :-keep] = -100
                both.mask = labels[:, 1:] != -100
                with HeadSwitch(both), self.accelerator.autocast():
                    model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            scored = both.mask[:, -passes[0][2] :]
            assert both.found is not None
            parts.append([x.new_zeros(scored.shape).masked_scatter(scored, x) for x in both.found])
        return {name: torch.cat(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}


def _behind(batch: dict[str, Any], prompt: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask of the completions behind a prompt, and how many tokens a completion has."""
    ids, mask = ((batch[name]) for name in ("completion_ids", "completion_mask"))
    return torch.cat([prompt[0], ids], 1), torch.cat([prompt[1], mask], 1), ids.shape[1]


def _drops(model: torch.nn.Module) -> bool:
    """Whether a forward of the model in training drops anything."""
    layers = any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in model.modules())
    config = getattr(model, "config", None)
    named = vars(config).items() if config is not None else ()
    return layers or any(("dropout" in key or key.endswith("pdrop")) and isinstance(x, float) and x > 0 for key, x in named)
