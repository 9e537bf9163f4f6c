"""The report's pages in headless Chromium: what is drawn, what a token says, weights made there, and that they ask for nothing.

Pages are of what tests/made_run.py makes; GEAR_REPORT_RUN names a run's folder of your own to be opened beside them.
"""

import json
import math
import os
import re
import shutil
import threading
import time
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import made_run
import pytest
import torch

from gear_kernels import credit_weights
from gear_kernels.methods import METHODS
from gear_trainer.report import evaluation, payload, serve, study
from gear_trainer.report.build import page_of, write_pages, write_report
from gear_trainer.report.samples import samples
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.records import read_records
from gear_trainer.runs.trackers import flat

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium; nothing else looks at the report's page"),
]
OWN = os.environ.get("GEAR_REPORT_RUN")
PATIENCE = 180  # seconds, a net under hangs
AUDITED = Path(__file__).parents[1] / "benchmarks" / "results" / "credit_truth" / "chains_late.parquet"
READY = "Number(document.documentElement.dataset.ready ?? 0)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of gear, the first with an audit, one of grpo; a page of each and one of all."""
    root = tmp_path_factory.mktemp("pages")
    made = [made_run.make_run(root / "a"), made_run.make_run(root / "b", 1), made_run.make_run(root / "c", 2, "grpo")]
    made_run.make_audit(made[0] / "audit" / "model")
    write_report(made[0])
    write_pages(made, root / "all.html")
    return made


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    """A page of each kind: a run's, a committed audit's, a study's, an evaluation's."""
    root = tmp_path_factory.mktemp("kinds")
    audit = Path(shutil.copy(AUDITED, root / "chains.parquet"))
    others = {"audit": audit, "study": made_run.make_study(root / "s"), "evaluation": made_run.make_evaluation(root / "e")}
    for path in others.values():
        write_report(path)
    return {name: page_of(path) for name, path in ({"run": runs[0]} | others).items()}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def visit(browser, runs):
    """Open a page at a view; afterwards it has asked for nothing but itself, and said nothing on the console."""
    opened = []

    def go(view="", file=None, size=(1440, 900), served=False, loud=False, **more):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **more)
        context.set_default_timeout(PATIENCE * 1000)
        page, asked, said = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        url = file if isinstance(file, str) else (file or runs[0] / "report.html").as_uri()
        page.goto(f"{url}#{view}")
        until(page, f"{READY} > 0")
        opened.append((context, url, asked, said, served, loud))
        return page

    yield go
    for context, url, asked, said, served, loud in opened:
        context.close()
        assert loud or not said, said
        foreign = [other for other in asked if other.split("#")[0] != url and not other.startswith("blob:")]
        assert served or not foreign, foreign


def until(page, expression):
    """Wait for an expression; Playwright's own way evaluates text in the page, which the page's policy forbids."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


@contextmanager
def redrawn(page):
    """What is done inside makes the page draw anew."""
    before = page.evaluate(READY)
    yield
    until(page, f"{READY} > {before}")


def pick(page, label, value):
    with redrawn(page):
        page.get_by_label(label, exact=True).first.select_option(value)


def slide(page, field, value):
    page.evaluate(
        """([field, value]) => { const s = document.querySelector(`input[data-field=${field}]`); s.value = value;
        s.dispatchEvent(new Event("input", { bubbles: true })); }""",
        [field, value],
    )


# --- curves -------------------------------------------------------------------------------------------------------------------


def test_every_curve_is_metrics_jsonl(visit, runs):
    page = visit("view=curves")
    page.evaluate("gear.drawWaiting()")
    drawn = page.evaluate("gear.charts().flatMap(({panel}) => panel.lines.map((line) => [line.name, line.points]))")
    plotted = page.evaluate(
        "gear.charts().flatMap(({panel, chart}) => panel.lines.map((line, i) => [line.name, chart.data[0].map((s, k) => "
        "[s, chart.data[i + 1][k]]).filter(([, v]) => v !== null)]))"
    )
    assert drawn == plotted
    still = set(page.evaluate("[...document.querySelectorAll('.constants [data-panel]')].map((node) => node.dataset.panel)"))
    wanted = {}
    for m in read_metrics(runs[0] / "metrics.jsonl"):
        for name, value in flat(m).items():
            wanted.setdefault(name, []).append([m["step"], value])
    found = dict(drawn)
    assert found.keys() | still == wanted.keys() and not found.keys() & still
    for name, points in found.items():
        assert points == wanted[name], name
    for name in still:
        assert len({value for _, value in wanted[name]}) == 1 and len(wanted[name]) > 1, name
    ink = page.evaluate(
        "gear.charts().map(({chart}) => { const c = chart.ctx.canvas; return chart.ctx.getImageData(0, 0, c.width, c.height)"
        ".data.some((v) => v > 0); })"
    )
    assert ink and all(ink)


def test_runs_are_overlaid_with_their_mean_and_band(visit, runs, tmp_path):
    page = visit("view=curves", runs[0].parent / "all.html")
    lines = page.evaluate("gear.charts().find(({panel}) => panel.title === 'reward_mean').panel.lines")
    assert [line["label"] for line in lines] == ["a", "b", "c", "gear, mean of 2"]
    assert [bool(line["faint"]) for line in lines[:3]] == [True, True, False]
    (band,) = payload.bands(payload.manifest(runs)["runs"])
    assert lines[3]["band"] == [[step, low, high] for step, _, low, high in band["series"]["reward_mean"]]
    assert lines[3]["points"] == [[step, mean] for step, mean, _, _ in band["series"]["reward_mean"]]


def test_cursors_and_zoom_are_linked(visit):
    page = visit("view=curves")
    page.evaluate("gear.drawWaiting()")
    plots = page.locator(".panel[data-panel=reward_mean] .u-over"), page.locator(".panel[data-panel=entropy] .u-over")
    box = plots[0].bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
    steps = [
        page.locator(f".panel[data-panel={name}] .value").first.inner_text() for name in ("reward_mean", "entropy", "success")
    ]
    assert steps[0].startswith("step ") and len(set(steps)) == 1, "all panels tell of the same place"
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60, steps=4)
    page.mouse.up()
    spans = page.evaluate("gear.charts().map(({panel, chart}) => [panel.title, chart.scales.x.max - chart.scales.x.min])")
    assert all(span < 6 for name, span in spans if name in ("reward_mean", "entropy", "success"))
    with redrawn(page):
        page.get_by_label("logarithmic").check()
    assert set(page.evaluate("gear.charts().map(({chart}) => chart.scales.y.distr)")) == {3}


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_panel_is_saved_at_the_size_of_a_column(visit, kind, tmp_path):
    page = visit("view=curves")
    page.locator(".panel[data-panel=reward_mean]").hover()
    with page.expect_download() as waiting:
        page.get_by_label(f"save reward_mean as {kind}").click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    assert file.name == f"reward_mean.{kind}"
    if kind == "png":
        header = file.read_bytes()[:24]
        assert header[1:4] == b"PNG" and int.from_bytes(header[16:20]) == 1980, "3.3 in at 600 dots"
        return
    root = ElementTree.parse(file).getroot()
    ways = [node.get("points").split() for node in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert root.get("width") == "3.3in" and [len(way) for way in ways] == [made_run.STEPS]
    assert not [node.tag for node in root.iter() if node.tag.endswith(("script", "foreignObject", "image"))]


# --- a token's numbers --------------------------------------------------------------------------------------------------------


def told(page):
    """The inspector's numbers by key."""
    rows = page.evaluate("[...document.querySelectorAll('.inspector tr')].map((r) => [r.dataset.key, r.cells[1].textContent])")
    return {key: text.replace(" nats", "").replace("−", "-") for key, text in rows}


def test_what_a_token_says_is_what_was_stored(visit, runs):
    page = visit("view=credit&step=12&group=2&sample=1")
    r = next(r for r in read_records(runs[0], 12) if (r["group"], r["sample"]) == (2, 1))
    stored = {"weight": "weight", "signal": "raw_signal", "g": "signal", "entropy": "entropy", "logprob": "logprobs"}
    stored |= {
        "teacher_logprob": "teacher_logprobs",
        "teacher_entropy": "teacher_entropy",
        "forward_kl": "forward_kl",
        "id": "ids",
    }
    stored |= {"trained_weight": "weight", "token_advantage": "token_advantages", "sampler_logprob": "sampler_logprobs"}
    for i in range(len(r["ids"])):
        page.locator(f"#t0-{i}").hover()
        found = told(page)
        if not r["mask"][i]:
            assert found.keys() == {"id"} and int(found["id"]) == r["ids"][i]
            continue
        for key, column in stored.items():
            assert float(found[key]) == pytest.approx(r[column][i], rel=5.1e-6, abs=1e-9), (i, key)
        if (own := r["segment"][i]) >= 0:
            places = [k for k, s in enumerate(r["segment"]) if s == own]
            assert found["segment"].startswith(f"{places[0]} to {places[-1]}, ")
        else:
            assert "segment" not in found


def test_segments_are_bracketed_where_they_open_and_end(visit, runs):
    page = visit("view=credit&step=12&group=2&sample=1")
    r = next(r for r in read_records(runs[0], 12) if (r["group"], r["sample"]) == (2, 1))
    policy = [i for i, m in enumerate(r["mask"]) if m]
    marked = {kind: page.evaluate(f"[...document.querySelectorAll('.t.{kind}')].map((t) => Number(t.dataset.i))") for kind in
              ("seg", "onset", "ends", "open")}  # fmt: skip
    own = [r["segment"][i] for i in policy]
    assert marked["seg"] == [i for i in policy if r["segment"][i] >= 0]
    assert marked["onset"] == [i for k, i in enumerate(policy) if own[k] >= 0 and (k == 0 or own[k - 1] != own[k])]
    ends = [i for k, i in enumerate(policy) if own[k] >= 0 and (k + 1 == len(own) or own[k + 1] != own[k])]
    assert sorted(marked["ends"] + marked["open"]) == ends
    assert page.evaluate("[...document.querySelectorAll('.turn')].map((t) => t.dataset.label)") == [
        "turn 1",
        "tool result",
        "turn 2",
    ]


def test_keys_walk_tokens_and_segments_and_the_address_follows(visit, runs):
    page = visit("view=credit&step=12&group=2&sample=1&token=3")
    at = lambda: page.evaluate("Number(document.querySelector('[aria-selected=true]').dataset.i)")  # noqa: E731
    assert at() == 3 and page.evaluate("document.activeElement.className") == "tokens", "the link leads to the token"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert at() == 4 and "token=4" in page.url
    page.keyboard.press("Home")
    onsets = page.evaluate("[...document.querySelectorAll('.t.onset')].map((t) => Number(t.dataset.i))")
    page.keyboard.press("ArrowDown")
    assert at() == next(i for i in onsets if i > 0)
    page.keyboard.press("End")
    page.keyboard.press("ArrowUp")
    assert at() == onsets[-1] and float(told(page)["weight"]) > 0
    href = page.locator(".inspector a").get_attribute("href")
    again = visit(href.lstrip("#"))
    assert again.evaluate("document.querySelector('[aria-selected=true]').dataset.i") == str(onsets[-1])


# --- weights made in the page -------------------------------------------------------------------------------------------------

SETTINGS = {
    "gear": [{}, {"kl_threshold": 0.35}, {"entropy_ratio": 0.8}, {"alpha": 1.3}, {"signal_floor": 0.05}, {"max_segment_len": 3},
             {"stop_at_turn": True}, {"renormalize": True}, {"entropy_floor": 0.3}, {"kl_threshold": 0.0},
             *({"normalizer": name} for name in ("max", "minmax", "abs_max", "quantile", "none"))],
    "entropy_window": [{}, {"window": 3}], "fixed": [{}, {"fixed_len": 3}], "tilt": [{}, {"alpha": 0.9}],
    "kl_only": [{}, {"max_segment_len": 2}], "cl_egrsd": [{}, {"look_ahead": 1}], "rlsd": [{"decay_steps": 0}],
    "turn": [{}, {"std": False}], "gigpo": [{}, {"std": True, "gamma": 0.5}], "sgcd": [{}, {"stable": 3.0, "gamma": 2.0}],
}  # fmt: skip


@pytest.fixture(scope="module")
def two_hundred(runs):
    """Two hundred rollouts that have an advantage, of seven steps: their numbers of groups made different by step."""
    found = []
    for step in range(1, made_run.STEPS + 1):
        found += [r | {"group": 100 * step + r["group"]} for r in read_records(runs[0], step) if r["advantage"]]
    return found[:200]


def test_the_page_offers_every_method_that_is_tried_here(visit):
    offered = visit("view=credit").evaluate("Object.keys(gear.manifest().methods)")
    assert set(offered) == set(METHODS) - {"random"}


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"random"}))
def test_weights_made_in_the_page_are_credit_weights(visit, two_hundred, name):
    tried = SETTINGS.get(name, [{}])
    found = visit("view=credit").evaluate(
        """async ([name, tried]) => {
          const { creditWeights, packed, rolloutsOf, source } = gear, method = gear.manifest().methods[name];
          let all = [];
          for (let step = 1; step <= 12; step++)
            for (const r of rolloutsOf(await source.pack(0, step)))
              all.push({ ...r, row: { ...r.row, group: 100 * step + r.row.group } });
          all = all.filter((r) => r.row.advantage).slice(0, 200);
          return tried.map((set) => {
            const fields = { ...method.fields, ...set };
            const out = creditWeights(method.kind, fields, packed(all, gear.needsOf(method, fields)));
            return [out.weights, out.tokenAdvantages, out.segments, out.onsets].map((x) => Array.from(x));
          });
        }""",
        [name, tried],
    )
    for given, (weights, advantages, segments, onsets) in zip(tried, found, strict=True):
        method = replace(METHODS[name], **given)
        needs = {*METHODS[name].needs, *method.needs, "turn_ids"}
        want = credit_weights(**made_run.packed(two_hundred, needs), method=method)
        assert len(weights) == len(want.weights) > 3000
        assert segments == want.segment_ids.tolist(), given
        assert [bool(x) for x in onsets] == want.onsets.tolist(), given
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float32), want.weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(advantages, dtype=torch.float32), want.token_advantages, rtol=0, atol=2e-6)


def weights_of(page):
    """Weights of the policy tokens of all rollouts that the view read, by (group, sample)."""
    rows = page.evaluate("gear.showing().all.map((r) => [r.row.group, r.row.sample, r.policy.map((i) => r.credit.weights[i])])")
    return {(group, sample): weights for group, sample, weights in rows}


def test_sliders_and_methods_weigh_anew(visit, runs):
    page = visit("view=credit&step=12&group=2&sample=1")
    rows = read_records(runs[0], 12)
    stored = {(r["group"], r["sample"]): [w for w, m in zip(r["weight"], r["mask"], strict=True) if m] for r in rows}
    assert_near(weights_of(page), stored)
    slide(page, "kl_threshold", "0.4")
    slide(page, "alpha", "1.1")
    slide(page, "entropy_ratio", "0.9")
    page.get_by_label("normalizer").select_option("quantile")
    moved = replace(METHODS["gear"], kl_threshold=0.4, alpha=1.1, entropy_ratio=0.9, normalizer="quantile")
    assert_near(weights_of(page), made(rows, moved))
    assert "set.alpha=1.1" in page.url, "a link shows the same"
    pick(page, "method", "sgcd")
    assert_near(weights_of(page), made(rows, METHODS["sgcd"]))
    slide(page, "kl_threshold", "0.3")
    assert_near(weights_of(page), made(rows, replace(METHODS["sgcd"], kl_threshold=0.3)))
    with redrawn(page):
        page.get_by_text("as the run had it").click()
    assert_near(weights_of(page), stored)


def made(rows, method):
    """Weights by (group, sample); 1 where there is no advantage."""
    own = [r for r in rows if r["advantage"]]
    given = iter(credit_weights(**made_run.packed(own, method.needs), method=method).weights.tolist())
    return {(r["group"], r["sample"]): [next(given) if r["advantage"] else 1.0 for m in r["mask"] if m] for r in rows}


def assert_near(found, wanted):
    assert found.keys() == wanted.keys()
    for key, weights in wanted.items():
        assert found[key] == pytest.approx(weights, abs=1e-6), key


# --- which rollouts -----------------------------------------------------------------------------------------------------------


def listed(page):
    return page.evaluate("[...document.querySelectorAll('.samples button')].map((b) => b.getAttribute('aria-label'))")


def test_filters_leave_what_fits(visit, runs):
    page = visit("view=credit&step=5")
    rows = read_records(runs[0], 5)
    label = lambda r: f"group {r['group']}, sample {r['sample']}, {'solved' if r['success'] else 'failed'}"  # noqa: E731
    fits = lambda rule: [label(r) for r in rows if rule(r)]  # noqa: E731
    assert listed(page) == fits(lambda r: True)
    pick(page, "outcome", "failed")
    assert listed(page) == fits(lambda r: not r["success"])
    pick(page, "end", "turns")
    assert listed(page) == fits(lambda r: not r["success"] and r["end"] == "turns")
    pick(page, "outcome", "")
    pick(page, "end", "")
    pick(page, "task", "sums")
    assert listed(page) == fits(lambda r: r["problem"].startswith("sums/"))
    pick(page, "advantage", "yes")
    assert listed(page) == fits(lambda r: r["problem"].startswith("sums/") and r["advantage"])
    with redrawn(page):
        page.get_by_label("reward from").fill("0.5")
        page.get_by_label("reward from").blur()
    assert listed(page) == fits(lambda r: r["problem"].startswith("sums/") and r["advantage"] and r["reward"] >= 0.5)
    pick(page, "step", "7")
    assert "step=7" in page.url and page.locator(".card h2").inner_text().startswith("sums/7-")


def test_siblings_stand_side_by_side_from_their_first_difference(visit, runs):
    page = visit("view=credit&step=12&group=3&sample=0&beside=all")
    ids = [r["ids"] for r in read_records(runs[0], 12) if r["group"] == 3]
    apart = next(i for i, own in enumerate(zip(*ids, strict=False)) if len(set(own)) > 1)
    assert f"The first {apart} tokens are the same" in page.locator(".work").inner_text() and page.locator(
        ".card"
    ).count() == len(ids)
    tops = page.evaluate("[...document.querySelectorAll('.rest')].map((part) => part.getBoundingClientRect().top)")
    assert max(tops) - min(tops) < 1, "the first difference is at one height"
    assert page.evaluate("[...document.querySelectorAll('[data-differs]')].map((t) => Number(t.dataset.i))") == [apart] * len(ids)
    pick(page, "beside it", "2")
    assert page.locator(".card").count() == 2


def test_a_group_that_is_not_there_is_said(visit, runs):
    page = visit("view=credit&step=12&group=77&sample=3")
    assert "Group 77, sample 3 is not here" in page.locator(".work .bad").first.inner_text()
    assert visit("view=credit&step=12&group=2&sample=3").locator(".work > .bad").count() == 0


def test_why_a_sibling_got_less_credit(visit, runs):
    """The path of docs/report.md: choose the sample, put its sibling beside it, go to where they differ, read both weights."""
    page = visit("view=credit&step=12")
    with redrawn(page):
        page.get_by_label("group 3, sample 3").click()
    pick(page, "beside it", "1")
    means = page.locator(".card .mean").all_inner_texts()
    rows = {r["sample"]: r for r in read_records(runs[0], 12) if r["group"] == 3}
    for text, sample in zip(means, (3, 1), strict=True):
        own = [w for w in rows[sample]["weight"] if w is not None]
        assert float(re.search(r"mean W ([\d.]+)", text)[1]) == pytest.approx(math.fsum(own) / len(own), rel=1e-3)
    page.locator("[data-differs]").first.click()
    assert "segment" in told(page) or "g" in told(page)


# --- divergent tokens, warnings, comparison, audits ---------------------------------------------------------------------------


def test_divergent_tokens_are_counted(visit, runs):
    page = visit("view=tokens&step=9&top=0.1")
    spots = [(abs(s), t) for r in read_records(runs[0], 9) if r["raw_signal"]
             for s, t in zip(r["raw_signal"], r["tokens"], strict=True) if s is not None]  # fmt: skip
    top = sorted(spots, key=lambda spot: -spot[0])[: math.ceil(0.1 * len(spots))]
    cells = "[r.cells[0].textContent, Number(r.cells[1].textContent)]"
    rows = page.evaluate(f"[...document.querySelectorAll('.grid tbody tr')].map((r) => {cells})")
    assert (
        sum(count for _, count in rows) == len(top)
        and f"Of {len(spots)} policy tokens" in page.locator("section.view").inner_text()
    )
    assert dict(rows)[" so"] == sum(text == " so" for _, text in top)
    page.locator(".token").first.click()
    with redrawn(page):
        page.locator(".examples a").first.click()
    assert "view=credit" in page.url and page.locator("[aria-selected=true]").text_content() == rows[0][0].rstrip("\n")
    whole = visit("view=tokens&span=run")
    assert "Steps 1, " in whole.locator("section.view").inner_text()


def test_warnings_stand_with_reason_and_mend(visit, tmp_path):
    ill = made_run.make_run(tmp_path / "ill", steps=4)
    lines = [json.dumps(m | {"share_unclosed": 0.9}) for m in read_metrics(ill / "metrics.jsonl")]
    (ill / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_report(ill)
    page = visit("view=health", ill / "report.html")
    text = page.locator(".warning").inner_text()
    assert "90% of the segments are cut" in text and "Mend: Lower credit_args.entropy_ratio" in text
    assert page.locator(".count").inner_text() == "1"


def test_two_runs_are_compared_on_the_same_problems(visit, runs):
    page = visit("view=compare&a=0:12&b=1:12", runs[0].parent / "all.html")
    assert f"{made_run.GROUPS} problems are in both" in page.locator("section.view").inner_text()
    sides = [read_records(run, 12) for run in runs[:2]]
    problem = page.locator(".grid tbody th").first.inner_text()
    shares = [sum(r["success"] for r in side if r["problem"] == problem) / made_run.SIZE for side in sides]
    found = page.locator(".grid tbody tr").first.locator("td a").all_inner_texts()
    assert [float(x) for x in found] == pytest.approx(shares, rel=1e-3)
    with redrawn(page):
        page.locator(".grid tbody td a").nth(1).click()
    assert "run=1" in page.url
    other = visit("view=credit&step=12&group=1&sample=0&beside=run1", runs[0].parent / "all.html")
    assert other.locator(".card h2").all_inner_texts() == [
        "words/12-1, sample 0".replace("words", "sums"),
        "b: sums/12-1, sample 0",
    ]


def test_an_audit_shows_true_advantages_under_any_teacher(visit, runs):
    page = visit("view=credit&step=audit/model&group=1&sample=2&colour=truth")
    table = {(r["group"], r["sample"]): r for r in payload.rollouts(runs[0], "audit/model").to_pylist()}
    r = table[1, 2]
    i = next(i for i, a in enumerate(r["true_advantage"]) if not math.isnan(a) and a)
    page.locator(f"#t0-{i}").hover()
    assert float(told(page)["true_advantage"]) == pytest.approx(r["true_advantage"][i], abs=1e-6)
    assert float(told(page)["signal"]) == pytest.approx(r["k1/truth"][i], rel=1e-5)
    pick(page, "teacher", "wrong")
    pick(page, "signal", "reverse_kl")
    page.locator(f"#t0-{i}").hover()
    assert float(told(page)["signal"]) == pytest.approx(r["reverse_kl/wrong"][i], rel=1e-5)


def colours(page):
    """The colour of each policy token of the first card: its share of the full one, and its hue."""
    found = page.evaluate(
        "[...document.querySelectorAll('.card:first-child .t:not(.env)')].map((t) => [Number(t.dataset.i), "
        "Number(t.style.getPropertyValue('--v')), t.classList.contains('down')])"
    )
    return {i: (share, down) for i, share, down in found}


def test_a_committed_audit_opens_where_a_rollout_leaves_the_solution(visit, pages):
    page = visit("", pages["audit"])
    table = payload.rollouts(AUDITED, "audit").to_pylist()
    r = next(r for r in table if r["advantage"] and r["deviation"] >= 0)
    shown = page.evaluate("gear.showing().seats[0].r.row")
    assert (shown["group"], shown["sample"]) == (r["group"], r["sample"]), "the first that leaves it"
    policy, off = [i for i, m in enumerate(r["mask"]) if m], r["deviation"]
    assert page.evaluate("[...document.querySelectorAll('[data-deviates]')].map((t) => Number(t.dataset.i))") == [off]
    assert f"token {off}" in page.locator(".card header").inner_text()
    for i in (policy[0], off, policy[-1]):
        page.locator(f"#t0-{i}").hover()
        found = told(page)
        assert float(found["value"].replace("−", "-")) == pytest.approx(r["value"][i], abs=1e-6)
        assert float(found["true_advantage"]) == pytest.approx(r["true_advantage"][i], abs=1e-6)
        assert found["reach"] == ("in reach" if i < off else "out of reach from here on" if i == off else "out of reach")
    largest = max(abs(r["true_advantage"][i]) for i in policy)
    for i, (share, down) in colours(page).items():
        assert down == (r["true_advantage"][i] < 0) and (share == 1) <= (abs(r["true_advantage"][i]) > 0.3 * largest)
    pick(page, "colour", "value")
    assert {i: share for i, (share, _) in colours(page).items()} == {i: pytest.approx(r["value"][i], abs=6e-4) for i in policy}
    pick(page, "colour", "deviation")
    assert colours(page) == {i: (0, False) if i < off else (1 if i == off else 0.4, True) for i in policy}


# --- studies and evaluations --------------------------------------------------------------------------------------------------


def rows_of(page, title):
    """The texts of a table's cells by row."""
    rows = '[...document.querySelectorAll(`[data-table="${title}"] tbody tr`)].map((r) => [...r.cells].map((c) => c.textContent))'
    return page.evaluate(f"(title) => {rows}", title)


def assert_tables(page, tables):
    """Every table is in the page, cell by cell."""
    assert page.evaluate("[...document.querySelectorAll('[data-table]')].map((t) => t.dataset.table)") == [
        t.title for t in tables
    ]
    for table in tables:
        assert rows_of(page, table.title) == table.rows, table.title


def test_a_study_shows_differences_curves_cost_and_failures(visit, pages):
    page, found = visit("", pages["study"]), json.loads((pages["study"].parent / "study.json").read_text())
    assert_tables(page, study.tables(found))
    assert page.locator("nav[aria-label=views] a").all_inner_texts() == ["Figures", "Curves", "Set-up"]
    failed = next(row for row in rows_of(page, "Failures") if "<script>globalThis.planted = 3</script>" in row[2])
    assert failed[0] == "grpo-7" and page.evaluate("globalThis.planted") is None
    ran = {name: arm for name, arm in found["arms"].items() if arm["curve"]}
    differences = [arm["difference"]["area"] for name, arm in ran.items() if name != "grpo"]
    drawn = page.locator(".forest").first.locator("circle")
    assert drawn.count() == len(differences) >= 3
    places = [float(x) for x in drawn.evaluate_all("(all) => all.map((c) => c.getAttribute('cx'))")]
    means = [d["mean"] for d in differences]
    slope = (places[1] - places[0]) / (means[1] - means[0])
    assert places[2] == pytest.approx(places[0] + slope * (means[2] - means[0]), abs=0.05), "in proportion"
    with redrawn(page):
        page.get_by_role("link", name="Curves").click()
    page.evaluate("gear.drawWaiting()")
    panels = dict(page.evaluate("gear.charts().map(({panel}) => [panel.title, panel.lines])"))
    assert list(panels) == ["all arms", *(name for name in ran if name != "grpo")]
    for name, lines in panels.items():
        for arm, line in zip(["grpo", *(n for n in ran if n != "grpo" and name in (n, "all arms"))],
                             [line for line in lines if not line.get("faint")], strict=True):  # fmt: skip
            assert line["points"] == [[p["step"], p["mean"]] for p in ran[arm]["curve"]]
            assert line["band"] == [[p["step"], p["low"], p["high"]] for p in ran[arm]["curve"]]
        thin = [line["points"] for line in lines if line.get("faint")]
        assert thin == ([] if name == "all arms" else [r["points"] for r in ran[name]["runs"] if r["points"]])


def test_an_evaluation_shows_its_figures_and_its_rollouts_in_words(visit, pages):
    page, folder = visit("", pages["evaluation"]), pages["evaluation"].parent
    result = json.loads((folder / "result.json").read_text())
    assert_tables(page, evaluation.tables(result))
    assert "the <b>service</b> is away" in rows_of(page, "Left out")[0][1]
    assert page.locator(".forest circle").count() == 3, "two categories and all"
    with redrawn(page):
        page.get_by_role("link", name="Rollouts").click()
    with redrawn(page):
        page.get_by_label("group 2, sample 1").click()
    table = {(r["group"], r["sample"]): r for r in samples(folder).to_pylist()}
    r = table[2, 1]
    texts = page.evaluate("gear.showing().seats[0].r.texts")
    assert texts == r["tokens"] and "".join(texts) == next(
        x["response"] for x in map(json.loads, (folder / "rollouts.jsonl").open()) if (x["index"], x["sample"]) == (2, 1)
    )
    labels = page.evaluate("[...document.querySelectorAll('.turn')].map((t) => t.dataset.label)")
    assert labels == ["turn 1", "tool result", "turn 2"]
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert "question 2 <b>bold</b>" in page.locator(".card footer").inner_text(), "the problem's prompt, kept once"
    pick(page, "beside it", "3")
    assert page.locator(".card").count() == 2 and page.locator("[data-differs]").count() == 2
    assert page.get_by_label("colour").count() == 0 and page.get_by_label("kl threshold").count() == 0


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_differences_are_saved_as_a_figure(visit, pages, kind, tmp_path):
    page = visit("inches=6.9", pages["study"])
    with page.expect_download() as waiting:
        page.get_by_label(re.compile(f"save after the last step.* as {kind}")).click()
    file = tmp_path / f"x.{kind}"
    waiting.value.save_as(file)
    if kind == "png":
        assert int.from_bytes(file.read_bytes()[16:20]) == 4140, "6.9 in at 600 dots"
    else:
        root = ElementTree.parse(file).getroot()
        assert root.get("width") == "6.9in" and len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3
        assert "var(" not in file.read_text(), "its colours are its own"


# --- untrusted text -----------------------------------------------------------------------------------------------------------


def test_what_a_model_wrote_changes_nothing_but_its_cell(visit, runs):
    """Every hostile piece is shown in some rollout; the page's scripts, elements, title and direction stay its own."""
    page, seen = visit("view=credit&beside=all"), ""
    for step in range(1, 5):
        for group in range(made_run.GROUPS):
            with redrawn(page):
                page.evaluate(f"location.hash = 'view=credit&beside=all&step={step}&group={group}'")
            seen += page.locator(".cards").inner_text()
            assert page.evaluate("document.querySelectorAll('.cards script, .cards img, .cards b:not(header b)').length") == 0
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert "<b>bold</b>␛[1m" in page.locator(".card footer").first.inner_text()
    assert page.evaluate("globalThis.planted") is None and page.title() == "a"
    for shown in ("<script>globalThis.planted = 1</script>", "<img src=x onerror=planted=1>", "␛[31mred", "⟨U+202E⟩evil⟨U+2066⟩"):
        assert shown in seen, shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", seen)
    assert page.evaluate("getComputedStyle(document.querySelector('.t')).unicodeBidi") == "isolate"


def test_a_script_that_is_put_in_does_not_run(visit):
    page = visit(loud=True)
    blocked = page.evaluate(
        """() => new Promise((done) => {
          document.addEventListener("securitypolicyviolation", (event) => done(event.violatedDirective), { once: true });
          const script = document.createElement("script");
          script.textContent = "globalThis.planted = 2";
          document.body.append(script);
        })"""
    )
    assert blocked.startswith("script-src") and page.evaluate("globalThis.planted") is None


# --- everybody ----------------------------------------------------------------------------------------------------------------

VIEWS = {"figures": "", "curves": "", "credit": "&beside=all&token=5", "tokens": "", "health": "", "compare": "", "setup": ""}


def views_of(page):
    """Every view of an open page, one after the other."""
    links = page.evaluate("[...document.querySelectorAll('nav[aria-label=views] a')].map((a) => a.getAttribute('href'))")
    for view in (re.search(r"view=(\w+)", href)[1] for href in links):
        with redrawn(page):
            page.evaluate(f"location.hash = 'x=1&view={view}{VIEWS[view]}'")
        yield view


@pytest.mark.parametrize("kind", ["run", "audit", "study", "evaluation"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_labels_and_roles(visit, pages, scheme, kind):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(file=pages[kind], color_scheme=scheme)
    for view in views_of(page):
        found = Axe().run(page).response["violations"]
        told = [[v["id"], v["help"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"]] for v in found]
        assert not found, json.dumps([view, told], indent=1)


@pytest.mark.parametrize("kind", ["run", "audit", "study", "evaluation"])
def test_a_narrow_window_has_no_width_to_scroll(visit, pages, kind):
    page = visit(file=pages[kind], size=(390, 844))
    wide = {view: width for view in views_of(page) if (width := page.evaluate("document.documentElement.scrollWidth")) > 390}
    assert not wide


# --- served -------------------------------------------------------------------------------------------------------------------


def test_a_live_run_is_followed(visit, tmp_path):
    folder = made_run.make_run(tmp_path / "live", steps=3)
    made = serve.server([folder])
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        page = visit("view=curves", f"http://127.0.0.1:{made.server_address[1]}/", served=True)
        assert page.evaluate("gear.manifest().runs[0].step") == 3
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "reward_mean": 0.125, "success": 0.5}) + "\n")
        until(page, "gear.manifest().runs[0].step === 4")
        until(page, "gear.charts().find(({panel}) => panel.title === 'reward_mean').panel.lines[0].points.at(-1)[1] === 0.125")
        with redrawn(page):
            page.evaluate("location.hash = 'view=credit&step=2&group=4&sample=1'")
        rows = [r for r in read_records(folder, 2) if r["group"] == 4]
        stored = {(4, r["sample"]): [w for w in r["weight"] if w is not None] for r in rows}
        assert_near(weights_of(page), stored)
        with redrawn(page):
            page.evaluate("location.hash = 'view=tokens&step=2'")
        assert page.locator(".grid tbody tr").count() > 3
    finally:
        made.shutdown()
        thread.join(10)
        made.server_close()


def test_only_what_is_shown_is_asked_for_and_drawn(visit, runs):
    made = serve.server(runs[:1])
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{made.server_address[1]}/"
    try:
        page = visit("view=curves", url, served=True)
        asked = []
        page.on("request", lambda request: "manifest" in request.url or asked.append(request.url.removeprefix(url)))
        drawn, panels = page.evaluate("[gear.charts().length, document.querySelectorAll('.panel').length]")
        assert 0 < drawn < panels and not asked, "panels below the window wait, and no rollout was asked for"
        page.locator(".panel").last.scroll_into_view_if_needed()
        until(page, f"gear.charts().length > {drawn}")
        with redrawn(page):
            page.evaluate("location.hash = 'view=credit&step=5&group=3'")
        assert asked == ["data/rows?run=0&key=5", "data/pack?run=0&key=5&groups=3"], "a step's list, a group"
        with redrawn(page):
            page.get_by_label("group 3, sample 1").click()
        assert len(asked) == 2, "its sibling is there already"
        with redrawn(page):
            page.evaluate("location.hash = 'view=health'")
        assert len(asked) == 2
    finally:
        made.shutdown()
        thread.join(10)
        made.server_close()


@pytest.mark.skipif(not OWN, reason="GEAR_REPORT_RUN=runs/NAME: a run of your own")
def test_a_run_of_your_own_opens_in_every_view(visit, tmp_path):
    write_pages([Path(OWN)], tmp_path / "own.html")
    assert (tmp_path / "own.html").stat().st_size < 5_000_000
    for _ in views_of(visit(file=tmp_path / "own.html")):
        pass
    page = visit("view=credit", tmp_path / "own.html")
    steps = payload.describe(Path(OWN))["recorded"]
    stored = {(r["group"], r["sample"]): [w for w in r["weight"] if w is not None] for r in read_records(Path(OWN), steps[-1])}
    assert_near(weights_of(page), stored)
