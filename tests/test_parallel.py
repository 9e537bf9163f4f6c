"""Vocabulary-parallel heads: 2 gloo ranks with a shard each against the whole head in one process."""

import json

import pytest
import torch
from parallel_ranks import CASES

from gear_kernels import parallel, reference


@pytest.fixture(scope="module")
def results(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    run = server.call(folder / "log", "parallel_ranks:main", folder / "results.json", TORCHDYNAMO_DISABLE="0")
    assert run.wait(900) == [0, 0], run.text()[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", [*CASES, "mesh"])
def test_shards_equal_the_whole_head(results, case):
    dtype = CASES[case][1] if case in CASES else torch.float32
    allowed = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-6}[dtype]
    for quantity, error in results[case].items():
        # gradients of half inputs are rounded to their dtype; shards may round another way at a tie
        bound = 2**-9 if dtype == torch.bfloat16 and quantity != "values" else allowed
        assert error <= bound, f"{quantity}: {error}"


def test_number_of_collectives_is_as_documented(results):
    """Forward: the gathers of sums and of where the largest logits stand, the mixture's all_reduce (jsd); backward: the hidden
    gradient's all_reduce.
    """
    assert results["collectives"] == {"all_gather": 2, "all_reduce": 2}


def test_few_rows_over_unequal_columns(results):
    """The ranks cut their tiles into unequal numbers of splits: what they gather has one shape all the same."""
    assert results["few rows"] < 1e-6


def test_rows_may_be_sharded_under_a_whole_head(results):
    assert results["whole head"] < 1e-6


def test_shards_that_are_not_the_rank_s_are_refused(results):
    first, second, third = results["refused"]
    assert first.startswith("head.shards is [300, 432]; expected 2 numbers of rows, that of rank 0 366")
    assert second.startswith("head.shards was given without a group") and third.startswith("head.sequence_parallel was given")


def test_unequal_shards_are_refused_unless_they_are_named(results):
    assert "the ranks' vocabulary shards have [366, 365] rows; expected shards of one size" in results["unequal"]


def test_R5_a_rank_that_raises_alone_leaves_the_others_to_the_timeout(results):
    """As parallel.py says: checks run before the first collective and ask no other rank."""
    first, second = results["lone refusal"]
    assert first.startswith("GearKernelsError: targets holds 1")
    assert not second.startswith(("GearKernelsError", "no error")), second
    assert "ask no other rank" in parallel.__doc__ and "group's timeout" in parallel.__doc__


def test_compiled_without_a_graph_break(results):
    assert results["compiled"]


def test_merging_is_associative_and_independent_of_the_cut():
    """Any cut of the vocabulary, merged in any grouping, gives the statistics of the whole (float64)."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 100, generator=g, dtype=torch.double) * 5
    student[1, :40] = teacher[2, 30:] = -torch.inf
    rows = reference.Rows(torch.tensor([0, 99, -100, 50, 20]), torch.full((5,), 1.3, dtype=torch.double), -100)
    whole = reference.finish(reference.sweep(student, teacher, rows), rows)
    edges = [0, 1, 30, 31, 77, 100]
    parts = [reference.sweep(student[:, a:b], teacher[:, a:b], rows, a) for a, b in zip(edges, edges[1:], strict=False)]
    flat = reference.merge(torch.stack(parts), rows)
    left = reference.merge(torch.stack(parts[:3]), rows)
    nested = reference.merge(torch.stack([left, reference.merge(torch.stack(parts[3:]), rows)]), rows)
    for sums in (flat, nested):
        merged = reference.finish(sums, rows)
        for name, value in whole.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)
