"""The operators as torch.library sees them: opcheck, torch.compile without a graph break, and no look at values on the way."""

import pytest
import torch

import gear_kernels
from gear_kernels import FusedHead, GearKernelsError, backends, linear_token_stats, ops, reference, token_stats

ALL = list(reference.STAT_NAMES)
BACKENDS = sorted(backends.BACKENDS)


def logits_case(n=6, vocab=300):
    g = torch.Generator().manual_seed(0)
    student, other = torch.randn(2, n, vocab, generator=g)
    targets = torch.randint(vocab, (n,), generator=g)
    targets[1] = -100
    return student, student + 0.1 * other, targets


def hidden_case(n=6, width=8, vocab=300):
    g = torch.Generator().manual_seed(1)
    student, other = torch.randn(2, n, width, generator=g)
    weight, bias = torch.randn(vocab, width, generator=g), torch.randn(vocab, generator=g)
    return student, weight, bias, student + 0.1 * other


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    """Schema, autograd registration, fake twin, ahead-of-time dispatch with dynamic shapes: torch's own checks."""
    student, teacher, targets = logits_case()
    inverse = torch.ones(6)
    logits, linear = torch.ops.gear_kernels.token_stats, torch.ops.gear_kernels.linear_token_stats
    calls = [
        (logits, (student.requires_grad_(), teacher, targets, inverse, -100, ALL, 0.3, backend)),
        (logits, (student, None, None, inverse, -100, ["entropy"], 0.3, backend)),
    ]
    hidden, weight, bias, teacher_hidden = hidden_case()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    constants = ops.LinearCall(*[None] * 8, ALL, backend, 10**5, -100, 0.3, 5.0, 1.2, 290, None, 0.5)[8:]
    for tail in ((teacher_hidden, None, None), (torch.randn(6, 5), torch.randn(300, 5), torch.randn(300))):
        for tolerance, keeps in ((0.0, ""), (0.1, ""), (0.0, "logits")):
            own = (*constants[:-4], tolerance, (), False, keeps)
            calls.append((linear, (*leaves, *tail, targets.clamp_max(289), inverse, *own)))
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator.default, arguments).values()) == {"SUCCESS"}


def loss_of_logits(student, teacher, targets):
    out = token_stats(student * 2, teacher, targets, temperature=0.7, stats=ALL)
    return (out.logprobs + 0.1 * out.entropy + out.reverse_kl.tanh() + out.forward_kl + out.jsd).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_logits_equal_eager(backend):
    student, teacher, targets = logits_case()
    torch._dynamo.reset()  # or it would reuse what it traced for another back end
    compiled = torch.compile(loss_of_logits, fullgraph=True, backend="aot_eager")
    with gear_kernels.backend(backend):
        for n in (6, 5, 3):  # a changed N recompiles once, then is dynamic
            leaves = [student[:n].clone().requires_grad_() for _ in range(2)]
            losses = [f(s, teacher[:n], targets[:n]) for f, s in zip((compiled, loss_of_logits), leaves, strict=True)]
            for loss in losses:
                loss.backward()
            assert torch.equal(losses[0], losses[1])
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-8)  # the tanh around is torch's


def test_compiled_head_by_inductor_equals_eager():
    hidden, weight, bias, teacher_hidden = hidden_case()
    head = FusedHead(8, 300)
    targets, temperature = torch.randint(300, (2, 3)), torch.rand(2, 3) + 0.5

    def loss(h, t):
        out = head(h.view(2, 3, 8), targets, t.view(2, 3, 8), temperature=temperature, stats=ALL)
        return (out.logprobs + out.reverse_kl + out.jsd).sum()

    found = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        head.zero_grad()
        leaf = hidden.clone().requires_grad_()
        function(leaf, teacher_hidden).backward()
        found.append((leaf.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compiled_code_keeps_the_back_end_it_was_traced_with():
    student, teacher, targets = logits_case()
    graphs = []

    def record(graph, example):
        graphs.append(graph)
        return graph.forward

    with gear_kernels.backend("reference"):
        torch.compile(lambda s: token_stats(s, teacher, targets).entropy, fullgraph=True, backend=record)(student)
    (call,) = [node for node in graphs[0].graph.nodes if "token_stats" in str(node.target)]
    assert call.args[-1] == "reference"


def test_shapes_without_values():
    """Under fake tensors and on the meta device nothing is computed or looked at, also by the checks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = torch.empty(2, 3, 8, requires_grad=True), torch.empty(300, 8, requires_grad=True)
        targets = torch.empty(2, 3, dtype=torch.long)
        out = linear_token_stats(hidden, weight, targets, hidden.detach(), stats=ALL)
        assert all(value.shape == (2, 3) and value.dtype == torch.float32 for value in out)
        out.reverse_kl.sum().backward()
        assert hidden.grad.shape == (2, 3, 8) and weight.grad.shape == (300, 8)


def test_value_errors_reach_the_caller_of_compiled_code():
    student, teacher, targets = logits_case()
    compiled = torch.compile(loss_of_logits, fullgraph=True, backend="aot_eager")
    compiled(student, teacher, targets)
    with pytest.raises(GearKernelsError, match="targets holds 300"):
        compiled(student, teacher, targets.clamp_min(0) * 0 + 300)


def test_double_backward_is_refused():
    student, teacher, targets = logits_case()
    leaf = student.requires_grad_()
    (gradient,) = torch.autograd.grad(token_stats(leaf, teacher, targets).entropy.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)not implemented|does not require grad|autograd formula"):
        torch.autograd.grad(gradient.sum(), leaf)


# --- the code around GPU kernels, without a GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", (8192, 700, 16))
def test_gpu_path_neither_looks_at_values_nor_keeps_logits(monkeypatch, n):
    """The Qwen3-8B head on the meta device, taken for a GPU: any look at a value raises there, and every tensor is counted.

    The kernels are left out; what runs is all that stands around them: checks, tiles, GEMMs into float32, sums of gradients.
    """
    from gear_kernels import tiling

    tiles = []

    def finish(sums, task):
        n = sums.shape[1]
        return sums.new_empty((len(ALL), n), dtype=torch.float32), sums.new_empty((n, 9), dtype=torch.float32)

    def gradient(student, teacher, task, state, grads, dz):
        assert dz.dtype == torch.bfloat16 and student.z.dtype == teacher.z.dtype == torch.float32 and dz.shape == student.z.shape
        tiles.append(tuple(student.z.shape))

    kernels = {
        "sweep": lambda student, teacher, task, sums: tiles.append(tuple(student.z.shape)),
        "finish": finish,
        "mixture": lambda *arguments: None,
        "gradient": gradient,
        "splits": lambda rows, columns: 1,
    }
    for name, function in kernels.items():
        monkeypatch.setattr(backends.BACKENDS["triton"], name, function)
    monkeypatch.setattr(tiling, "on_gpu", lambda device: True)
    d, v = 4096, 151936
    with torch.device("meta"):
        hidden, teacher, weight = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((n, d), (n, d), (v, d)))
        targets, inverse, grads = torch.empty(n, dtype=torch.long), torch.empty(n), torch.empty(n, len(ALL))
    ops.check_values(targets, inverse, v, -100)
    for backward in (False, True):
        tensors = (hidden, weight, None, teacher, None, None, targets, inverse)
        call = ops.tiled(ops.LinearCall(*tensors, ("reverse_kl", "jsd"), "triton", tiling.limits(hidden.device).workspace))
        tiles.clear()
        if backward:
            found = call.backward(torch.empty(n, 9, device="meta"), grads, [True, True, False])
            assert [g.dtype for g in found[:2]] == [torch.bfloat16] * 2 and found[2] is None
        else:
            call.forward()
        assert sum(rows * columns for rows, columns in tiles) == n * v
        held = sum(x.nbytes for x in call.scratch.values()) + (n * d * 4 if backward else 0)  # + the hidden gradient's sums
        assert held <= 0.3 * 2**30, f"{held / 2**20:.0f} MiB"  # docs/architecture.md, Goals on a GPU
