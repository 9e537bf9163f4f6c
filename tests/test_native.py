"""The compiled pass itself: every instruction set of this machine, half conversions, threads, and the choice of back end."""

import doctest
import subprocess
import sys

import pytest
import torch

import gear_kernels
from gear_kernels import GearKernelsError, _native, backends, reference, token_stats
from gear_kernels.reference import STAT_NAMES, STATE_NAMES, SUM_NAMES

ISAS = _native.instruction_sets()
BETA = 0.3


def whole(isa, student, teacher, targets, grads, threads=1, inv_t=1 / 0.8):
    """values [7, n] and dz of whole rows, by the four compiled functions in turn."""
    n = student.shape[0]
    values, state, dz = torch.empty(len(STAT_NAMES), n), torch.empty(n, len(STATE_NAMES)), torch.empty_like(student)
    sums, shares = torch.zeros(2, n, len(SUM_NAMES), dtype=torch.float64), torch.zeros(2, n, 2, dtype=torch.float64)
    rows = (targets, -100, torch.full((n,), inv_t))
    _native.sweep(student, teacher, *rows, 0, True, sums, threads, isa)
    _native.finish(sums, *rows, teacher is not None, values, state, threads, isa)
    if teacher is not None:
        _native.mixture(student, teacher, *rows, 0, state, BETA, shares, threads, isa)
        values[STAT_NAMES.index("jsd")] = reference.jsd(shares.sum(0), BETA)
        state[:, STATE_NAMES.index("mixture_kl")] = shares.sum(0)[:, 0]
    _native.gradient(student, teacher, *rows, 0, state, BETA, grads, dz, threads, isa)
    return values, dz


def exact(student, teacher, targets, grads):
    leaf = student.double().requires_grad_()
    rows = reference.Rows(targets, torch.full((len(leaf),), 1 / 0.8).double(), -100)
    out = reference.token_stats(leaf, teacher.double(), rows, STAT_NAMES, BETA)
    chosen = [out[name] for name in reference.GRADIENT_NAMES]
    incoming = [grads[:, STAT_NAMES.index(name)].double() for name in reference.GRADIENT_NAMES]
    (dz,) = torch.autograd.grad(chosen, leaf, incoming)
    return torch.stack(list(out.values())).detach(), dz


def logprob_grads(sent):
    grads = torch.zeros(len(sent), len(STAT_NAMES))
    grads[:, 0] = sent
    return grads


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, dtype):
    torch.manual_seed(0)
    student = (torch.randn(7, 6151) * 3).to(dtype)
    teacher = (student + torch.randn(7, 6151) * 0.3).to(dtype)
    student[2, ::7] = teacher[2, ::7] = -torch.inf
    targets, grads = torch.randint(1, 7, (7,)), torch.randn(7, len(STAT_NAMES))
    values, dz = whole(isa, student, teacher, targets, grads)
    want, want_dz = exact(student, teacher, targets, grads)
    left = [STAT_NAMES.index(name) for name in reference.stats.ARGMAX_NAMES]  # to torch: 0 here
    assert not values[left].any() and left == list(range(len(STAT_NAMES)))[-len(left) :]
    torch.testing.assert_close(values[: left[0]].double(), want[: left[0]], rtol=5e-7, atol=2e-6)
    rounding = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    smallest = 2.0**-24 if dtype == torch.float16 else 0  # its subnormals end there
    torch.testing.assert_close(dz.double(), want_dz, rtol=rounding, atol=3e-6 * want_dz.abs().max().item() + smallest)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_value_is_read_exactly(isa, dtype):
    """All 65536 patterns as the only finite logit against 0: its log-prob tells the value back."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite() & (every.abs() < 50)]
    student = torch.stack([finite, torch.zeros_like(finite)], -1)
    n = len(finite)
    values, _ = whole(isa, student, None, torch.zeros(n, dtype=torch.long), torch.zeros(n, len(STAT_NAMES)), inv_t=1.0)
    torch.testing.assert_close(values[0].double(), student.double().log_softmax(-1)[:, 0], rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_gradients_are_rounded_to_nearest_even(isa, dtype):
    """The target's gradient alone (V = 2, p = 0 in float32) is the incoming one, so any float can be sent through the store."""
    torch.manual_seed(0)
    sent = torch.cat(
        [torch.randn(4000) * 10.0 ** torch.randint(-8, 6, (4000,)), torch.tensor([2**-25.0, 2**-24.0, 65519.0, 65520.0])]
    )
    sent = torch.cat([sent, sent.to(dtype).float() * (1 + 2**-8), sent.to(dtype).float() * (1 + 2**-11)])  # ties and near ties
    sent = sent[sent.isfinite()]
    n = len(sent)
    student = torch.tensor([[-200.0, 0.0]]).repeat(n, 1).to(dtype)
    _, dz = whole(isa, student, None, torch.zeros(n, dtype=torch.long), logprob_grads(sent), inv_t=1.0)
    assert torch.equal(dz[:, 0], sent.to(dtype))


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 33, 2500)
    targets, grads = torch.randint(2500, (33,)), torch.randn(33, len(STAT_NAMES))
    one, two = (whole(ISAS[-1], student, teacher, targets, grads, threads) for threads in (1, 4))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_wrong_arrays_are_refused():
    s, sums = torch.zeros(2, 3), torch.zeros(1, 2, len(SUM_NAMES), dtype=torch.float64)
    for student, teacher, table, isa in (
        (s.double(), None, sums, "baseline"),
        (s, torch.zeros(2, 4), sums, "baseline"),
        (s, None, sums[:, :1], "baseline"),
        (s, None, sums, "amx"),
    ):
        with pytest.raises(ValueError):
            _native.sweep(student, teacher, None, -100, torch.ones(2), 0, True, table, 1, isa)


# --- choice of back end -----------------------------------------------------------------------------------------------


def chosen(dtype=torch.float32):
    return backends.choose(torch.device("cpu"), dtype)


def test_choice(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    assert chosen() == "native" and chosen(torch.float64) == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert chosen() == "reference"
    with gear_kernels.backend("native"):
        assert chosen() == "native" and chosen(torch.float64) == "reference"
    assert chosen() == "reference"


@pytest.fixture
def compiled_triton(monkeypatch):
    """As it is outside these tests: on a CPU Triton's kernels are not interpreted."""
    monkeypatch.setattr(backends.triton.load()[0], "INTERPRETED", False)


def test_unknown_and_impossible_choices(monkeypatch, compiled_triton):
    with pytest.raises(GearKernelsError, match="names the back end 'cuda'; expected one of reference, triton, native"):
        gear_kernels.backend("cuda").__enter__()
    monkeypatch.setenv(backends.ENVIRONMENT, "fast")
    with pytest.raises(GearKernelsError, match="GEAR_KERNELS_BACKEND names the back end 'fast'"):
        token_stats(torch.zeros(1, 2), stats=("entropy",))
    with gear_kernels.backend("triton"), pytest.raises(GearKernelsError, match="'triton', but it runs on GPUs"):
        token_stats(torch.zeros(1, 2), stats=("entropy",))


def test_R7_the_back_ends_that_can_serve_are_named(monkeypatch, compiled_triton):
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    with pytest.raises(GearKernelsError, match=r"GEAR_KERNELS_BACKEND asks for .*To mend: choose native or reference\.$"):
        token_stats(torch.zeros(1, 2), stats=("entropy",))
    monkeypatch.setattr(backends.native, "load", lambda: (None, "the compiled module is missing (test)"))
    for name in ("triton", "native"):
        with gear_kernels.backend(name), pytest.raises(GearKernelsError, match=r"To mend: choose reference\.$"):
            token_stats(torch.zeros(1, 2), stats=("entropy",))


def test_missing_module_warns_once_and_says_so(monkeypatch, capsys):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends.native, "load", lambda: (None, "the compiled module is missing (test)"))
    backends._warn_missing.cache_clear()
    with pytest.warns(UserWarning, match="reference back end, many times slower: the compiled module is missing"):
        assert chosen() == "reference"
    with gear_kernels.backend("native"), pytest.raises(GearKernelsError, match="compiled module is missing"):
        chosen()
    gear_kernels.show()
    assert "not native: the compiled module is missing" in capsys.readouterr().out


@pytest.mark.parametrize("table", backends.native.TABLES)
def test_a_module_built_from_other_sources_is_no_back_end(monkeypatch, table):
    """Columns and numbers travel by place: a list in another order must not be served, or results would change their names."""
    load, own = backends.native.load.__wrapped__, backends.native.TABLES[table]
    assert load() == (_native, None) and tuple(_native.tables()[table]) == own
    other = (own[1], own[0], *own[2:]) if len(own) > 1 else ("1",)
    monkeypatch.setitem(backends.native.TABLES, table, other)
    module, reason = load()
    assert module is None and f"built from other sources (its {table} differ)" in reason


def test_show(monkeypatch, compiled_triton, capsys):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    gear_kernels.show()
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and f"native ({ISAS[-1]}" in text and "not triton: it runs on GPUs" in text
    with gear_kernels.backend("reference"):
        gear_kernels.show()
    assert "backend(...) asks for reference" in capsys.readouterr().out


def test_docstring_examples():
    from gear_kernels import losses, stats

    assert sum(doctest.testmod(module).attempted for module in (losses, stats)) >= 3
    assert not any(doctest.testmod(module).failed for module in (losses, stats))


def test_import_needs_torch_only():
    code = "import sys, gear_kernels; print([m for m in ('transformers', 'deepspeed', 'vllm') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
