"""The code of the README and of docs/ runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_op_in_five_lines_and_the_fused_head():
    torch.manual_seed(0)
    n, d, v = 12, 16, 50
    op, head = re.findall(r"```python\n(.*?)```", README, re.S)
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    targets = torch.randint(v, (n,))
    names = dict(
        hidden=hidden,
        lm_head_weight=weight,
        targets=targets,
        teacher_hidden=torch.randn(n, d),
        advantages=torch.tensor([1.0, -1.0]),
        cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32),
    )
    exec(op, names)
    names["loss"].backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
    names["model"] = nn.Module()
    names["model"].lm_head = nn.Linear(d, v, bias=False)
    exec(head, names)
    assert names["stats"].reverse_kl.shape == (n,) and names["model"].lm_head(hidden).shape == (n, v)


def test_files_that_the_readme_names_exist():
    root = Path(__file__).parents[1]
    for name in re.findall(r"(?:requirements|gear_trainer|docs)/[\w/]+\.(?:txt|py|yaml|png)", README):
        assert (root / name).is_file(), name


@pytest.mark.parametrize("page", ("operators.md", "credit.md", "mathematics.md", "objective.md"))
def test_pages(page):
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / page).read_text(), re.S):
        exec(block, names)
    if page == "operators.md":
        assert names["hidden"].grad.isfinite().all() and names["weight"].grad.any() and names["distill"].item() > 0
    elif page == "objective.md":
        assert names["logprobs"].grad.isfinite().all() and names["entropy"].grad.ne(0).all()
    elif page == "mathematics.md":
        bent = torch.tensor([1.1, 1.095, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0])
        assert torch.allclose(names["success"].weights, bent) and torch.allclose(names["failure"].weights, 2 - bent)
        assert names["success"].segment_ids.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1]
    else:
        weights = names["credit"].weights
        assert (weights[names["mask"]] >= 0.5).all() and weights[3] == 0
