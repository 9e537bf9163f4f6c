"""The GPU report's correctness items: every kernel against float64, on shapes and inputs that have broken kernels."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gear_kernels import Gear, Head, backend, linear_token_stats, token_stats
from gear_kernels.methods import METHODS, NORMALIZERS

from ..harness.cases import OUTPUTS, definition, plain
from ..harness.credit_inputs import Pack, credit_inputs, credit_packs
from ..harness.internals import GRADIENT_NAMES, STAT_NAMES, head_logits
from ..harness.peers import named
from .run import BF16, F16, F32, Item, Setting, Skip
from .timing import capture

# --- logits, and their comparison with float64 -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Logits [n, V] of both heads, targets [n] (one of them ignored) and temperatures [n]."""

    student: torch.Tensor
    teacher: torch.Tensor
    targets: torch.Tensor | None
    temperature: torch.Tensor

    def run(self, names: Sequence[str] = STAT_NAMES, student: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """token_stats of the package."""
        own = self.student if student is None else student
        found = token_stats(own, self.teacher, self.targets, temperature=self.temperature, stats=names)
        return named(found, names)

    def exact(self, names: Sequence[str] = STAT_NAMES, student: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The definition, in float64."""
        return definition(self.student if student is None else student, self.teacher, self.targets, names, self.temperature)

    def part(self, rows: list[int]) -> Problem:
        """Some of the rows."""
        return Problem(*(None if x is None else x[rows] for x in (self.student, self.teacher, self.targets, self.temperature)))


def problem(setting: Setting, n: int, vocab: int, dtype: torch.dtype = F32, seed: int = 0, masked: bool = True) -> Problem:
    """Random inputs; entropies and divergences as of language models, roughly."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=setting.device)
    student = normal(n, vocab) * 3
    teacher = student + normal(n, vocab) * 0.5
    targets = torch.randint(vocab, (n,), generator=generator, device=setting.device)
    if masked and n > 1:
        targets[n // 2] = -100
    temperature = torch.rand(n, generator=generator, device=setting.device) + 0.5
    return Problem(student.to(dtype), teacher.to(dtype), targets, temperature)


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], atol: float = 2e-6, rtol: float = 5e-7) -> float:
    """The largest absolute error in nats; raises beyond atol + rtol * |wanted|. NaN and infinities must match."""
    worst = 0.0
    for name, right in want.items():
        value = got[name].double()
        wrong = ~torch.isclose(value, right, rtol=rtol, atol=atol, equal_nan=True)
        finite = value.isfinite() & right.isfinite()
        error = (value - right)[finite].abs().max().item() if finite.any() else 0.0
        if wrong.any():
            at = int(wrong.nonzero()[0])
            example = f"row {at} is {value[at].item():.9g} for {right[at].item():.9g}"
            raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong; {example}; worst error {error:.2g}")
        worst = max(worst, error)
    return worst


def compare_gradients(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], dtype: torch.dtype, limit: float = 1.0) -> float:
    """The largest error over the largest entry; raises beyond `limit` roundings of the dtype (float32: 3e-6), or on NaN."""
    rounding = {F32: 3e-6, BF16: 1.02 * 2**-8, F16: 2**-10}[dtype] * limit
    worst = 0.0
    for i, (value, right) in enumerate(zip(got, want, strict=True)):
        scale = right.abs().max().item()
        error = (value.double() - right).abs().max().item()
        if not error <= rounding * scale + 1e-6:
            raise AssertionError(f"gradient {i}: error {error:.3g}, largest entry {scale:.3g}, allowed {rounding:.2g} of it")
        worst = max(worst, error / scale if scale > 1e-6 else error)
    return worst


def weighted(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss through every differentiable output that is finite, with fixed weights by row."""
    total = torch.zeros((), dtype=torch.float64, device=next(iter(values.values())).device)
    for i, name in enumerate(GRADIENT_NAMES):
        if name in values:
            rows = torch.arange(len(values[name]), device=total.device)
            total = total + (torch.where(values[name].isfinite(), values[name], 0).double() * torch.cos(rows * 1.7 + i)).sum()
    return total


def gradients(function: Callable, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of `weighted` outputs of the function, with respect to copies of its leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(weighted(function(*leaves)), leaves)


def check(given: Problem, names: Sequence[str] = STAT_NAMES, atol: float = 2e-6) -> dict:
    """Values and gradients of given logits against float64."""
    error = compare(given.run(names), given.exact(names), atol)
    if not set(names) & set(GRADIENT_NAMES):
        return {"error": error}
    got = gradients(lambda s: given.run(names, s), given.student)
    want = gradients(lambda s: given.exact(names, s), given.student.double())
    if got[0].dtype != given.student.dtype:
        raise AssertionError(f"gradient of dtype {got[0].dtype}")
    return {"error": error, "gradient_error": compare_gradients(got, want, given.student.dtype)}


# --- a head's inputs, and their comparison ------------------------------------------------------------------------------------


_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Hidden:
    """Hidden states [n, d], head tensors and options of linear_token_stats. leaves: what gets gradients."""

    student: torch.Tensor
    teacher: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    own: torch.Tensor | None  # the teacher's own weight
    targets: torch.Tensor
    options: dict  # softcap, scale, valid_vocab
    workspace: int | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Hidden states, weight, and the bias where there is one."""
        return [x for x in (self.student, self.weight, self.bias) if x is not None]

    def run(self, student, weight, bias=None, names: Sequence[str] = STAT_NAMES) -> dict[str, torch.Tensor]:
        """linear_token_stats of the package."""
        own = None if self.own is None else Head(self.own, **self.options)
        options = {"teacher_head": own, "stats": names, "workspace_bytes": self.workspace, "temperature": _TEMPERATURE}
        head = Head(weight, bias, **self.options)
        return named(linear_token_stats(student, head, self.targets, self.teacher, **options), names)

    def exact(self, student, weight, bias=None, names: Sequence[str] = STAT_NAMES) -> dict[str, torch.Tensor]:
        """The definition, in float64."""
        logits = head_logits(student.double(), weight.double(), _double(bias), **self.options)
        own, own_bias = (weight, bias) if self.own is None else (self.own, None)
        with torch.no_grad():
            other = head_logits(self.teacher.double(), own.double(), _double(own_bias), **self.options)
        return definition(logits, other, self.targets, names, _TEMPERATURE)


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


def linear(setting: Setting, dtype=F32, shape=(37, 1187, 64), bias=False, own=False, workspace=None, **options) -> Hidden:
    """Random hidden states and head; logits of a standard deviation of 3."""
    n, vocab, width = shape
    generator = torch.Generator(setting.device).manual_seed(vocab + width)
    normal = functools.partial(torch.randn, generator=generator, device=setting.device)
    student, weight = normal(n, width), normal(vocab, width) * (3 / math.sqrt(width))
    teacher, other = student + 0.15 * normal(n, width), weight + 0.1 * normal(vocab, width) / math.sqrt(width)
    targets = torch.randint(options.get("valid_vocab", vocab), (n,), generator=generator, device=setting.device)
    if n > 1:
        targets[n // 2] = -100
    tensors = (student.to(dtype), teacher.to(dtype), weight.to(dtype))
    return Hidden(
        *tensors, normal(vocab).to(dtype) if bias else None, other.to(dtype) if own else None, targets, options, workspace
    )


def check_linear(given: Hidden, atol: float = 2e-5, names: Sequence[str] = STAT_NAMES) -> dict:
    """Values and all gradients against float64. The GEMM's own float32 rounding comes on top of the statistics': 2e-5 nats."""
    error = compare(given.run(*given.leaves, names=names), given.exact(*given.leaves, names=names), atol, rtol=2e-6)
    got = gradients(lambda *x: given.run(*x, names=names), *given.leaves)
    want = gradients(lambda *x: given.exact(*x, names=names), *(x.double() for x in given.leaves))
    dtype = given.student.dtype
    return {"error": error, "gradient_error": compare_gradients(got, want, dtype, limit=10 if dtype == F32 else 2)}


# --- the items ----------------------------------------------------------------------------------------------------------------

SUBSETS = (("logprobs", "entropy"), OUTPUTS, ("reverse_kl",), ("forward_kl",), ("jsd",), ("teacher_logprobs", "teacher_entropy"))


def correctness_items(setting: Setting) -> list[Item]:
    """Every kernel, on shapes and inputs that have broken kernels; all kinds spread evenly, so that none is last and cut."""
    kinds = [make(setting) for make in (credit_items, _shape_items, linear_items, _edge_items, _graph_items)]
    places = [((i + 0.5) / len(kind), item) for kind in kinds for i, item in enumerate(kind)]
    return [item for _, item in sorted(places, key=lambda place: place[0])]


def _shape_items(setting: Setting) -> list[Item]:
    vocabularies = setting.pick((1, 127, 1187, 32003, 151936), (1, 127, 300))
    found = [
        Item(f"{plain(dtype)}, V={vocab}", lambda v=vocab, d=dtype: check(problem(setting, 5, v, d, seed=v)))
        for vocab, dtype in itertools.product(vocabularies, (F32, BF16, F16))
    ]
    found += [
        Item(f"subset {'+'.join(names)}", lambda names=names: check(problem(setting, 9, 1187, seed=1), names))
        for names in SUBSETS
    ]
    found.append(Item("divergences, no targets", lambda: _check_without_targets(setting)))
    for n in setting.pick((0, 1, 2, 300, 5000), (0, 1, 40)):
        vocab = setting.pick(32003 if n <= 300 else 1187, 300)
        found.append(
            Item(f"N={n}, V={vocab}", lambda n=n, v=vocab: check(problem(setting, n, v, BF16)) if n else _no_rows(setting))
        )
    draw = random.Random(0)
    for seed in range(setting.pick(8, 4)):
        n, vocab, dtype = draw.randint(1, 200), draw.randint(2, setting.pick(9000, 300)), draw.choice((F32, BF16, F16))
        name = f"random: {plain(dtype)}, N={n}, V={vocab}"
        found.append(Item(name, lambda n=n, v=vocab, d=dtype, s=seed: check(problem(setting, n, v, d, s))))
    return found


def _check_without_targets(setting: Setting) -> dict:
    full = problem(setting, 6, 1187, masked=False)
    return check(Problem(full.student, full.teacher, None, full.temperature), ("entropy", "reverse_kl", "forward_kl", "jsd"))


def _no_rows(setting: Setting) -> dict:
    empty = problem(setting, 2, 300).part([])
    leaf = empty.student.detach().requires_grad_()
    values = empty.run(STAT_NAMES, leaf)
    (gradient,) = torch.autograd.grad(weighted(values), leaf)
    assert gradient.shape == (0, 300) and all(v.shape == (0,) for v in values.values())
    return {}


def _edge_items(setting: Setting) -> list[Item]:
    checks = (_all_ignored, _masked_vocabulary, _teacher_zero, _rows_of_nothing, _strided, _mixed_dtypes, _tiny_divergence)
    found = [Item(f.__name__.strip("_").replace("_", " "), functools.partial(f, setting)) for f in checks]
    raises = "on a CPU they raise instead"
    return found + [
        Item("targets out of range", lambda: _targets_out_of_range(setting), raises),
        Item("more than 2^31 logits", lambda: _large(setting), "needs some 20 GiB"),
    ]


def _all_ignored(setting: Setting) -> dict:
    given = problem(setting, 7, 1187)
    given.targets.fill_(-100)
    given.student[2] = math.nan
    values = given.run()
    (gradient,) = gradients(lambda s: given.run(STAT_NAMES, s), given.student)
    assert not any(v.any() for v in values.values()) and not gradient.any(), "an ignored row gave something"
    return {}


def _masked_vocabulary(setting: Setting) -> dict:
    """-inf in both heads: whole first blocks, and single columns."""
    given = problem(setting, 6, setting.pick(20000, 700), masked=False)
    for z in (given.student, given.teacher):
        z[0, :-5] = -math.inf
        z[1, : z.shape[1] // 2] = -math.inf
        z[2, ::3] = -math.inf
    given.targets[:3] = given.student.shape[1] - 1
    given.targets[4] = 0
    given.student[4, 0] = given.teacher[4, 0] = -math.inf  # a target that cannot be
    return check(given)


def _teacher_zero(setting: Setting) -> dict:
    """Finite under the student, -inf under the teacher, and the other way round: one of the divergences is infinite."""
    given = problem(setting, 6, 1187, masked=False)
    given.teacher[0, 7] = given.student[1, 9] = -math.inf
    given.targets[:2] = 11
    found = check(given)
    values = given.run()
    assert values["reverse_kl"][0] == math.inf and values["forward_kl"][1] == math.inf
    return found


def _rows_of_nothing(setting: Setting) -> dict:
    """Rows of -inf and of NaN are NaN, and leave their neighbours alone."""
    given = problem(setting, 6, 1187, masked=False)
    given.student[1] = -math.inf
    given.student[3, 5] = math.nan
    return {"error": compare(given.run(), given.exact())}


def _strided(setting: Setting) -> dict:
    """Slices that start off the 16 byte grid, transposed logits, gaps between rows."""
    wide = problem(setting, 9, 1200, BF16)
    views = (lambda z: z[:, 1:1188], lambda z: z.T.contiguous().T, lambda z: z[:, :640], lambda z: z[:, ::2])
    errors = []
    for view in views:
        student, teacher = view(wide.student), view(wide.teacher)
        targets = torch.where(wide.targets >= 0, wide.targets % student.shape[1], wide.targets)
        errors.append(check(Problem(student, teacher, targets, wide.temperature)))
    return {name: max(e[name] for e in errors) for name in errors[0]}


def _mixed_dtypes(setting: Setting) -> dict:
    given = problem(setting, 6, 1187, BF16)
    return check(Problem(given.student, given.teacher.float(), given.targets, given.temperature))


def _tiny_divergence(setting: Setting) -> dict:
    """A true KL of 5e-5 nats: the mean error over the rows may be 1 % of it, and no row is negative."""
    n, vocab = setting.pick((256, 151936), (64, 1187))
    base = problem(setting, n, vocab, masked=False)
    noise = torch.randn(base.student.shape, generator=torch.Generator(setting.device).manual_seed(1), device=setting.device)
    given = Problem(base.student, base.student + 0.01 * noise, base.targets, torch.ones_like(base.temperature))
    got, want = given.run(("reverse_kl",))["reverse_kl"], given.exact(("reverse_kl",))["reverse_kl"]
    bias = (got.double() - want).mean().item()
    assert not (got < 0).any() and abs(bias) <= 0.01 * want.mean().item(), f"mean error {bias:.2g} at a KL of {want.mean():.2g}"
    return {"error": (got - want).abs().max().item(), "bias": bias, "mean_kl": want.mean().item()}


def _targets_out_of_range(setting: Setting) -> dict:
    given = problem(setting, 6, 1187, masked=False)
    given.targets[1], given.targets[2] = 1187, -7
    nan = given.run(("logprobs",))["logprobs"].isnan()
    assert nan.tolist() == [False, True, True, False, False, False], f"NaN in {nan.tolist()}"
    return {}


def _large(setting: Setting) -> dict:
    """bfloat16 logits of 2.49e9 elements; the rows at both ends and around the 2^31st element are checked."""
    n, vocab = 16384, 151936
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        raise Skip("less than 24 GiB of memory are free")
    generator = torch.Generator(setting.device).manual_seed(0)
    student = torch.empty(n, vocab, dtype=BF16, device=setting.device).normal_(0, 3, generator=generator)
    teacher = torch.empty_like(student).normal_(0, 0.5, generator=generator).add_(student)
    targets = torch.randint(vocab, (n,), generator=generator, device=setting.device)
    given = Problem(student.requires_grad_(), teacher, targets, torch.ones(n, device=setting.device))
    at = 2**31 // vocab
    picked = [0, at - 1, at, at + 1, n - 1]
    values = given.run()
    (gradient,) = torch.autograd.grad(weighted(values), student)
    error = compare({name: v[picked] for name, v in values.items()}, given.part(picked).exact())
    rows = torch.tensor(picked, device=setting.device)
    leaf = student.detach()[picked].double().requires_grad_()
    small = Problem(leaf, teacher[picked], targets[picked], given.temperature[picked])
    terms = [
        (value * torch.cos(rows * 1.7 + GRADIENT_NAMES.index(name))).sum()
        for name, value in small.exact(GRADIENT_NAMES, leaf).items()
    ]
    (want,) = torch.autograd.grad(torch.stack(terms).sum(), leaf)
    return {"error": error, "gradient_error": compare_gradients([gradient[picked]], [want], BF16)}


# --- hidden states ----------------------------------------------------------------------------------------------------------


def linear_items(setting: Setting) -> list[Item]:
    """Heads of all kinds, tiles cut every way, autocast."""
    shape = setting.pick((37, 1187, 64), (13, 300, 32))
    heads = {
        "plain": {},
        "bias": {"bias": True},
        "scale": {"scale": 0.5},
        "softcap": {"softcap": 5.0},
        "bias scale softcap": {"bias": True, "scale": -0.7, "softcap": 8.0},
        "valid_vocab": {"valid_vocab": shape[1] - 34, "bias": True},
        "own teacher head": {"own": True, "softcap": 9.0},
    }
    found = [
        Item(f"linear {plain(dtype)}, {name}", lambda d=dtype, h=head: check_linear(linear(setting, d, shape, **h)))
        for name, head in heads.items()
        for dtype in ((F32, BF16) if name == "plain" else (BF16,))
    ]
    found.append(Item("linear float16, plain", lambda: check_linear(linear(setting, F16, shape))))
    shapes = setting.pick([(1, 151936, 256), (700, 32003, 128), (33, 127, 64), (5, 1, 16)], [(1, 300, 16), (5, 1, 16)])
    found += [Item(f"linear {s}", lambda s=s: check_linear(linear(setting, BF16, s))) for s in shapes]
    for workspace in (64 << 10, 1 << 20):
        cut = setting.pick((150, 2003, 64), (40, 501, 64))
        run = functools.partial(linear, setting, BF16, cut, workspace=workspace, bias=True)
        found.append(Item(f"linear, workspace {workspace >> 10} KiB", lambda run=run: check_linear(run())))
    found.append(Item("linear, default set", lambda: check_linear(linear(setting, BF16, shape), names=OUTPUTS)))
    return [*found, Item("linear under autocast", lambda: _autocast(setting))]


def _autocast(setting: Setting) -> dict:
    given = linear(setting, F32)
    with torch.autocast(setting.device, dtype=BF16):
        return check_linear(given)


# --- how it runs ------------------------------------------------------------------------------------------------------------


def _calls(setting: Setting) -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Forward and backward of both operators as functions of their leaves, and the leaves: few rows, and many."""
    vocab = setting.pick(32003, 1187)
    shape = setting.pick((48, 2003, 64), (20, 300, 32))
    few, many, hidden = problem(setting, 3, vocab), problem(setting, shape[0], vocab, BF16), linear(setting, BF16, shape)
    return {
        "logits, few rows": (lambda s: _both(few.run(STAT_NAMES, s), s), [few.student]),
        "logits": (lambda s: _both(many.run(STAT_NAMES, s), s), [many.student]),
        "hidden states": (lambda h, w: _both(hidden.run(h, w), h, w), hidden.leaves),
    }


def _both(values: dict[str, torch.Tensor], *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [*(value.detach() for value in values.values()), *torch.autograd.grad(weighted(values), leaves)]


def _fresh(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [leaf.detach().clone().requires_grad_() for leaf in leaves]


def _same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise AssertionError(f"tensor {i} differs {what}, by {(a.double() - b.double()).abs().max().item():.3g}")


def _graph_items(setting: Setting) -> list[Item]:
    kinds = {
        "repeats": (_repeats, ""),
        "torch.compile": (_compile, ""),
        "no host synchronisation": (_no_sync, "CUDA's sync debug mode"),
        "CUDA graph": (_graph, "CUDA graphs"),
        "another stream": (_stream, "CUDA streams"),
    }
    return [
        Item(f"{kind}: {name}", lambda f=function, name=name: f(setting, name), reason)
        for kind, (function, reason) in kinds.items()
        for name in ("logits, few rows", "logits", "hidden states")
    ]


def _repeats(setting: Setting, name: str) -> dict:
    function, leaves = _calls(setting)[name]
    first = function(*_fresh(leaves))
    for _ in range(setting.pick(10, 2)):
        _same(function(*_fresh(leaves)), first, "from the first call")
    return {}


def _compile(setting: Setting, name: str) -> dict:
    """The graph must be whole; what inductor makes of the loss may round otherwise."""
    vocab = setting.pick(1187, 300)
    given, hidden = problem(setting, 12, vocab, BF16), linear(setting, BF16, (12, vocab, 64))
    if name == "hidden states":
        function, leaves = (lambda h, w: weighted(hidden.run(h, w))), hidden.leaves
    else:
        given = given.part([0, 1, 2]) if "few" in name else given
        function, leaves = (lambda s: weighted(given.run(STAT_NAMES, s))), [given.student]
    compiled = torch.compile(function, fullgraph=True, backend=setting.pick("inductor", "aot_eager"))
    got, want = (torch.autograd.grad(f(*x), x) for f, x in ((compiled, _fresh(leaves)), (function, _fresh(leaves))))
    return {"gradient_error": compare_gradients(got, [w.double() for w in want], BF16)}


def _no_sync(setting: Setting, name: str) -> dict:
    function, leaves = _calls(setting)[name]
    function(*_fresh(leaves))  # compiles, and loads cuBLAS
    fresh = _fresh(leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*fresh)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def _graph(setting: Setting, name: str) -> dict:
    """Captured once, replayed on other inputs."""
    function, leaves = _calls(setting)[name]
    static = _fresh(leaves)
    graph, captured = capture(lambda: function(*static))
    others = [leaf * 0.9 for leaf in leaves]
    with torch.no_grad():
        for leaf, other in zip(static, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    _same(captured, function(*_fresh(others)), "from the eager call")
    return {}


def _stream(setting: Setting, name: str) -> dict:
    """On a side stream while the default stream is busy."""
    function, leaves = _calls(setting)[name]
    want = function(*_fresh(leaves))
    fresh, busy, side = _fresh(leaves), torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):
        busy = busy @ busy * 1e-3
    with torch.cuda.stream(side):
        got = function(*fresh)
    torch.cuda.synchronize()
    _same(got, want, "on another stream")
    return {}


# --- credit -----------------------------------------------------------------------------------------------------------------


def credit_items(setting: Setting) -> list[Item]:
    """Every method on packs of every kind against the reference back end on the CPU, then how the scan runs."""
    packs = setting.pick((1 << 16, 512, 4096), (1 << 8, 8, 16))
    methods = {**METHODS, "gear, caps": Gear(max_segment_len=5, stop_at_turn=True, renormalize=True)}
    methods |= {f"gear, {name}": Gear(normalizer=name) for name in NORMALIZERS}
    found = [
        Item(f"credit {name}", lambda m=method: credit_same(setting, m, credit_packs(*packs)), seconds=60)
        for name, method in methods.items()
    ]
    gpu = "CUDA's profiler and sync debug mode"
    return [*found, Item("credit, launches and synchronisations", lambda: _credit_launches(setting), gpu_only=gpu)]


def credit_same(setting: Setting, method: object, packs: dict[str, Pack]) -> dict:
    """Segments equal to the reference's, weights within a few roundings; twice the same bits."""
    worst = 0.0
    for p in packs.values():
        more = credit_inputs(method, p)
        with backend("reference"):
            want = p.credit(method, **more)
        there = {name: x.to(setting.device) for name, x in more.items()}
        got, again = (p.to(setting.device).credit(method, **there) for _ in range(2))
        _same(got[:6], again[:6], "from the first call")
        _same([got.segment_ids.cpu(), got.onsets.cpu()], [want.segment_ids, want.onsets], "from the reference")
        for a, b in zip(got[:4], want[:4], strict=True):
            worst = max(worst, (a.cpu() - b).abs().max().item() if a.numel() else 0.0)
        for name, value in got.diagnostics.items():
            assert abs(value.item() - want.diagnostics[name].item()) <= 1e-4 * (1 + abs(value.item())), name
    assert worst <= 2e-6, f"off by {worst:.3g}"
    return {"error": worst}


def _credit_launches(setting: Setting) -> dict:
    p = credit_packs(1 << 16)["typical, 512 sequences"].to(setting.device)
    p.credit()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            p.credit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("_scan_kernel" in name for name in names) == 1 and len(names) <= 3, names
    return {"kernels": len(names)}
