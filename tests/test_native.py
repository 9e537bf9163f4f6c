"""The compiled pass itself: every instruction set of this machine, half conversions, threads, and the choice of back end."""

import doctest
import subprocess
import sys

import pytest
import torch

import gear_kernels
from gear_kernels import GearKernelsError, _native, ops, reference, token_stats

ISAS = _native.instruction_sets()


def run(isa, student, teacher, targets, grads, threads=1):
    n = student.shape[0]
    values, state, dz = torch.empty(6, n), torch.empty(n, 8), torch.empty_like(student)
    rows = (student, teacher, targets, -100, torch.full((n,), 1 / 0.8))
    _native.forward(*rows, values, state, threads, isa)
    _native.backward(*rows, state, grads, dz, threads, isa)
    return values, dz


def exact(student, teacher, targets, grads):
    leaf = student.double().requires_grad_()
    options = {"inv_temperature": torch.full((len(leaf),), 1 / 0.8).double(), "ignore_index": -100, "stats": reference.STAT_NAMES}
    out = reference.token_stats(leaf, teacher.double(), targets, **options)
    chosen = [out[name] for name in ops.GRADIENT_NAMES]
    (dz,) = torch.autograd.grad(chosen, leaf, list(grads.double().T))
    return torch.stack(list(out.values())).detach(), dz


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, dtype):
    torch.manual_seed(0)
    student = (torch.randn(7, 6151) * 3).to(dtype)
    teacher = (student + torch.randn(7, 6151) * 0.3).to(dtype)
    student[2, ::7] = teacher[2, ::7] = -torch.inf
    targets, grads = torch.randint(1, 7, (7,)), torch.randn(7, 4)
    values, dz = run(isa, student, teacher, targets, grads)
    want, want_dz = exact(student, teacher, targets, grads)
    torch.testing.assert_close(values.double(), want, rtol=5e-7, atol=2e-6)
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
    values = torch.empty(6, len(finite))
    rows = (student, None, torch.zeros(len(finite), dtype=torch.long), -100, torch.ones(len(finite)))
    _native.forward(*rows, values, torch.empty(len(finite), 8), 1, isa)
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
    grads = torch.zeros(n, 4)
    grads[:, 0] = sent
    rows = (student, None, torch.zeros(n, dtype=torch.long), -100, torch.ones(n))
    state, dz = torch.empty(n, 8), torch.empty_like(student)
    _native.forward(*rows, torch.empty(6, n), state, 1, isa)
    _native.backward(*rows, state, grads, dz, 1, isa)
    assert torch.equal(dz[:, 0], sent.to(dtype))


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 33, 2500)
    targets, grads = torch.randint(2500, (33,)), torch.randn(33, 4)
    one, two = (run(ISAS[-1], student, teacher, targets, grads, threads) for threads in (1, 4))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_dz_may_overwrite_the_student():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 2500)
    targets, grads = torch.randint(2500, (5,)), torch.randn(5, 4)
    _, want = run(ISAS[-1], student, teacher, targets, grads)
    values, state = torch.empty(6, 5), torch.empty(5, 8)
    rows = (student, teacher, targets, -100, torch.full((5,), 1 / 0.8))
    _native.forward(*rows, values, state, 1, ISAS[-1])
    _native.backward(*rows, state, grads, student, 1, ISAS[-1])
    assert torch.equal(student, want)


def test_wrong_arrays_are_refused():
    s, v, st = torch.zeros(2, 3), torch.zeros(6, 2), torch.zeros(2, 8)
    for student, teacher, isa in ((s.double(), None, "baseline"), (s, torch.zeros(2, 4), "baseline"), (s, None, "amx")):
        with pytest.raises(ValueError):
            _native.forward(student, teacher, None, -100, torch.ones(2), v, st, 1, isa)


# --- choice of back end -----------------------------------------------------------------------------------------------


def chosen(dtype=torch.float32):
    return ops.choose(torch.device("cpu"), dtype).name


def test_choice(monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    assert chosen() == "native" and chosen(torch.float64) == "reference"
    monkeypatch.setenv(ops.ENVIRONMENT, "reference")
    assert chosen() == "reference"
    with gear_kernels.backend("native"):
        assert chosen() == "native" and chosen(torch.float64) == "reference"
    assert chosen() == "reference"


def test_unknown_and_impossible_choices(monkeypatch):
    with pytest.raises(GearKernelsError, match="names the back end 'cuda'; expected one of reference, triton, native"):
        gear_kernels.backend("cuda").__enter__()
    monkeypatch.setenv(ops.ENVIRONMENT, "fast")
    with pytest.raises(GearKernelsError, match="GEAR_KERNELS_BACKEND names the back end 'fast'"):
        token_stats(torch.zeros(1, 2), stats=("entropy",))
    with gear_kernels.backend("triton"), pytest.raises(GearKernelsError, match="'triton', but it is not built yet"):
        token_stats(torch.zeros(1, 2), stats=("entropy",))


def test_missing_module_warns_once_and_says_so(monkeypatch, capsys):
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    monkeypatch.setattr(ops, "_load_native", lambda: (None, "the compiled module is missing (test)"))
    ops._warn_missing.cache_clear()
    with pytest.warns(UserWarning, match="reference back end, many times slower: the compiled module is missing"):
        assert chosen() == "reference"
    with gear_kernels.backend("native"), pytest.raises(GearKernelsError, match="compiled module is missing"):
        chosen()
    gear_kernels.show()
    assert "not native: the compiled module is missing" in capsys.readouterr().out


def test_show(monkeypatch, capsys):
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    gear_kernels.show()
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and f"native ({ISAS[-1]}" in text and "not triton: it is not built yet" in text
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
