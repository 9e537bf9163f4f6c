"""The code of the README and of docs/ runs as it stands."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()


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
    for name in re.findall(r"(?:requirements|gear_trainer|docs)/[\w/]+\.(?:txt|py|yaml|png)", README):
        assert (ROOT / name).is_file(), name


def blocks(page):
    """The Python of a page of docs/, and before each block the reason why it is not run, or ""."""
    found = re.findall(r"(?:<!-- not run: (.+?) -->\n+)?^( *)```python.*?\n(.*?)^ *```$", (DOCS / page).read_text(), re.S | re.M)
    return [(why, textwrap.dedent(code)) for why, _, code in found]


PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_as_it_stands(page):
    """In one namespace, from the top. `<!-- not run: REASON -->` above a block keeps it out: it needs a GPU or a network."""
    names = {"__name__": "page"}
    for why, code in blocks(page):
        if not why:
            exec(compile(code, page, "exec"), names)
    check = globals().get("check_" + page.removesuffix(".md"))
    if check:
        check(names)


def check_operators(names):
    assert names["hidden"].grad.isfinite().all() and names["weight"].grad.any() and names["distill"].item() > 0


def check_mathematics(names):
    bent = torch.tensor([1.1, 1.095, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0])
    assert torch.allclose(names["success"].weights, bent) and torch.allclose(names["failure"].weights, 2 - bent)
    assert names["success"].segment_ids.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1]


def check_credit(names):
    weights = names["credit"].weights
    assert (weights[names["mask"]] >= 0.5).all() and weights[3] == 0


def check_where_models_live(names):
    assert issubclass(names["AdaptedHead"], names["Scored"])  # trained by test_where_models_live.py


def check_objective(names):
    assert names["logprobs"].grad.isfinite().all() and names["entropy"].grad.ne(0).all()


def check_index(names):
    assert names["hidden"].grad.any() and names["lm_head_weight"].grad.any()


def check_op_in_my_trainer(names):
    """Rows outside the mask stay out, and two updates have raised the chance of what succeeded over what failed."""
    mask, rewards = names["mask"], names["rewards"]
    assert (names["credit"].token_advantages[~mask] == 0).all() and names["scored"].entropy[mask].min() > 0
    with torch.no_grad():
        after = names["linear_token_stats"](
            names["hidden_states"](names["prompt"]), names["model"].lm_head.weight, names["targets"], stats=("logprobs",)
        ).logprobs
    change = (after - names["scored"].logprobs).sum(1) / mask.sum(1)
    assert change[rewards == 1].mean() > change[rewards == 0].mean()
    assert names["stats"].logprobs.shape == mask.shape and names["logits"].shape == (*mask.shape, 512)


def test_every_fence_of_python_is_found():
    """A block that the search above cannot read would not be run."""
    for page in PAGES:
        assert len(blocks(page)) == (DOCS / page).read_text().count("```python"), page


def test_the_site_has_every_page_and_every_page_a_title():
    listed = set(re.findall(r"(?:- |: )([\w./]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {path.name for path in DOCS.glob("*.md")}
    assert pages <= listed and all((ROOT / page).is_file() for page in listed - pages)
    assert all(path.read_text().startswith("# ") for path in DOCS.glob("*.md"))


# --- the table of features ------------------------------------------------------------------------------------------------------

FEATURES = (DOCS / "features.md").read_text()
ROWS = [
    line.strip("| ").split(" | ") for line in FEATURES.splitlines() if line.startswith("| ") and not line.startswith("| --- ")
]
ROWS = [row for row in ROWS if row[1:] != ["TRL", "verl", "OpenRLHF", "RL2"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_feature_of_ours_has_a_test_and_every_cell_an_answer(row):
    """The table cannot rot: a row that is ours to claim names tests that are there, and a row that is not names none."""
    _, ours, *theirs = row
    assert len(theirs) == 4 and all(re.match(r"(yes|no|partly|not checked)(:|,|$)", cell) for cell in theirs)
    links = re.findall(r"\[`(test_\w+)`\]\(\.\./tests/(test_\w+\.py)\)", ours)
    assert bool(links) == bool(re.match(r"(yes|partly),", ours)) and (links or re.match(r"no(:|$)", ours))
    for name, file in links:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), f"{file} has no {name}"


def test_keys_of_the_table_of_features_are_keys_of_a_configuration():
    from gear_trainer.config import Config

    ours = " ".join(row[1] for row in ROWS)
    keys = [text.partition("=")[0] for text in re.findall(r"`([a-z_.]+(?:=\w+)?)`", ours) if "." in text]
    assert len(set(keys)) > 30
    for key in keys:
        section = Config
        for name in key.split("."):
            assert name in section.model_fields, key
            section = section.model_fields[name].annotation
