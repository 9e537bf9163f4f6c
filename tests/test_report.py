"""What a report is made of, without a browser: the numbers that the page is given, warnings, the page's shell, server, twin."""

import base64
import gzip
import html
import http.client
import io
import json
import math
import os
import re
import socket
import struct
import threading
from types import SimpleNamespace

import made_run
import numpy as np
import psutil
import pyarrow as pa
import pytest
from rich.console import Console

from benchmarks.reports import report_page
from gear_kernels.methods import METHODS
from gear_trainer import build, cli
from gear_trainer.errors import ConfigError
from gear_trainer.report import health, pages, payload, serve, terminal
from gear_trainer.report.build import write_pages, write_report
from gear_trainer.report.statistics import estimate
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.ranks import Beats, machine
from gear_trainer.runs.records import SCHEMA, read_records, read_table
from gear_trainer.runs.trackers import flat


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one method, a third of another, and an audit in the first."""
    root = tmp_path_factory.mktemp("runs")
    made = [made_run.make_run(root / "a"), made_run.make_run(root / "b", 1), made_run.make_run(root / "c", 2, "grpo")]
    made_run.make_audit(made[0] / "audit" / "model")
    return made


# --- what the page is given ---------------------------------------------------------------------------------------------------


def test_every_number_of_a_run_is_in_its_series(runs):
    metrics = read_metrics(runs[0] / "metrics.jsonl")
    found = payload.describe(runs[0])["series"]
    assert found.keys() == {name for m in metrics for name in flat(m)} and "seconds/rollout" in found
    for name, (steps, values) in found.items():
        assert [(m["step"], flat(m)[name]) for m in metrics if name in flat(m)] == list(zip(steps, values, strict=True))


def test_runs_of_a_method_have_a_mean_and_its_interval(runs):
    shown = payload.manifest(runs)
    (band,) = shown["bands"]
    assert (band["name"], band["runs"]) == ("gear, mean of 2", [0, 1]), "of the third there is one alone"
    curves = [dict(zip(*run["series"]["entropy"], strict=True)) for run in shown["runs"][:2]]
    for step, mean, low, high in band["series"]["entropy"]:
        assert (mean, low, high) == tuple(estimate([curve[step] for curve in curves])[:3])
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def unpacked(data):
    """A pack, read as its module says, by other code than the page's."""
    data = gzip.decompress(data)
    (length,) = struct.unpack("<I", data[:4])
    header, at, columns = json.loads(data[4 : 4 + length]), 4 + length, {}
    for name, kind in header["columns"]:
        size = header["starts"][-1] * int(kind[1])
        block = np.frombuffer(data[at : at + size], np.uint8)
        columns[name] = block if kind == "u1" else block.reshape(4, -1).T.copy().view(f"<{kind}").ravel()
        at += size
    assert at == len(data)
    return header, columns


def test_a_pack_holds_every_token_exactly(runs):
    rows = read_records(runs[0], 3)
    header, columns = unpacked(payload.pack(read_table(runs[0], 3)))
    assert [header["pieces"][i] for i in columns["piece"]] == [t for r in rows for t in r["tokens"]]
    assert header["starts"] == [0, *np.cumsum([len(r["ids"]) for r in rows])]
    assert [r["length"] for r in header["rows"]] == [sum(r["mask"]) for r in rows]
    none, _ = unpacked(payload.pack(read_table(runs[0], 3).slice(0, 0)))
    assert (none["rows"], none["starts"]) == ([], [0])
    for name in (*made_run.FLOATS, "weight", "signal", "turn_rewards", "sampler_logprobs"):
        stored = [x for r in rows for x in r[name] or [None] * len(r["ids"])]
        np.testing.assert_array_equal(columns[name], np.array([math.nan if x is None else x for x in stored], np.float32))
    for name in ("ids", "segment", "turn"):
        assert columns[name].tolist() == [-1 if x is None else x for r in rows for x in r[name]]
    anchors = [x for r in rows for x in r["anchors"]]
    pairs = set(zip(anchors, columns["anchors"].tolist(), strict=True))
    assert len(pairs) == len(set(anchors)), "another number for each anchor, the same for the same"


def test_groups_are_read_by_themselves(runs):
    whole, some = read_table(runs[0], 2), read_table(runs[0], 2, groups=[1, 5])
    assert some.to_pylist() == [r for r in whole.to_pylist() if r["group"] in (1, 5)]
    assert "group" not in read_table(runs[0], 2, ["reward"], [1]).column_names


def test_an_audit_has_true_advantages_that_sum_to_the_outcome(runs):
    header, columns = unpacked(payload.pack(payload.rollouts(runs[0], "audit/model")))
    for row, a, b in zip(header["rows"], header["starts"], header["starts"][1:], strict=False):
        assert np.nansum(columns["true_advantage"][a:b]) == pytest.approx(row["success"] - 0.5, abs=1e-6)
    kept = payload.rollouts(runs[0], "audit/model", [0]).to_pylist()
    assert {r["group"] for r in kept} == {0} and kept[0]["k1/sibling"] is None and len(kept) == made_run.SIZE
    r = kept[1]
    assert r["k1/truth"][0] == np.float32(np.float32(r["logprobs"][0]) - np.float32(r["teacher_logprobs/truth"][0]))


def test_a_run_of_before_has_its_signal_made_from_log_probs(tmp_path):
    rows = [made_run.row(__import__("random").Random(0), 1, 0, 0, False)]
    made_run.weigh(rows, "gear", {})
    table = pa.Table.from_pylist(rows, schema=SCHEMA).set_column(
        SCHEMA.get_field_index("raw_signal"), SCHEMA.field("raw_signal"), pa.nulls(1, SCHEMA.field("raw_signal").type)
    )
    _, columns = unpacked(payload.pack(table))
    np.testing.assert_array_equal(columns["raw_signal"], columns["logprobs"] - columns["teacher_logprobs"])


def test_a_page_carries_what_fits_and_says_so(runs):
    shown = payload.manifest(runs[:2])
    every = payload.sample(runs[:2], shown, 1 << 30)
    assert len(every) == 2 * made_run.STEPS + 1 and shown["runs"][0]["sample"] == shown["runs"][0]["recorded"]
    one = len(every["0/12"])
    few = payload.sample(runs[:2], shown, 5 * one)
    assert list(few)[:2] == ["0/audit/model", "1/12"] and sum(map(len, few.values())) <= 5 * one
    part = payload.sample(runs[1:2], payload.manifest(runs[1:2]), one // 2)
    header, _ = unpacked(part["0/12"])
    assert 0 < len({r["group"] for r in header["rows"]}) < made_run.GROUPS and len(part["0/12"]) <= one // 2


def test_the_methods_of_the_page_are_the_kernels_but_for_random():
    found = payload.methods()
    assert found.keys() == METHODS.keys() - {"random"}
    assert found["gear"]["fields"]["kl_threshold"] == METHODS["gear"].kl_threshold and "seed" not in found["gear"]["offered"]


@pytest.mark.parametrize("folder, said", [("none", "no run there"), ("broken", "no such column|Parquet|parquet")])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, folder, said):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "audit.parquet").write_text("no file of that kind")
    with pytest.raises(ConfigError, match=said):
        payload.manifest([tmp_path / folder])


# --- warnings -----------------------------------------------------------------------------------------------------------------


def steady(**changed):
    """Twelve healthy steps; `changed`: by name the value of a step's share of the run, in [0, 1]."""
    base = list(made_run.metrics(0, 12))[1:]
    return [m | {name: value(i / 11) for name, value in changed.items()} for i, m in enumerate(base)]


PLANTED = {
    "nearly_all": ("share_above_threshold", {"share_above_threshold": lambda x: 0.97}),
    "none": ("segments_per_trajectory", {"segments_per_trajectory": lambda x: 0.0}),
    "unclosed": ("share_unclosed", {"share_unclosed": lambda x: 0.8}),
    "teacher": ("teacher_gain_success", {"teacher_gain_success": lambda x: -0.01}),
    "silent": ("silent_trajectories", {"silent_trajectories": lambda x: 0.5}),
    "gap": ("logprob_gap_mean", {"logprob_gap_mean": lambda x: 1e-4 + 0.02 * x}),
    "entropy": ("entropy", {"entropy": lambda x: 0.5 * (1 - x) + 0.001}),
    "length": ("response_length", {"response_length": lambda x: 100 - 90 * x}),
    "tools": ("tool_calls", {"tool_calls": lambda x: 1 - x}),
    "groups": ("zero_advantage", {"zero_advantage": lambda x: 0.95}),
    "truncated": ("truncated", {"truncated": lambda x: 0.5}),
    "skipped": ("updates_skipped", {"updates_skipped": lambda x: 0.5}),
}


def test_a_healthy_run_warns_of_nothing():
    assert health.warnings(steady(), silent=0.0) == [] and health.warnings([]) == []


@pytest.mark.parametrize("metric, changed", PLANTED.values(), ids=PLANTED)
def test_each_ill_is_named_with_its_reason_and_mend(metric, changed):
    (found,) = health.warnings(steady(**changed))
    assert found.metric == metric and all(len(part) > 20 for part in found[:3])


def test_grpo_has_no_segments_and_is_not_blamed():
    assert health.warnings(steady(segments_per_trajectory=lambda x: 0.0, mean_signal=lambda x: 0.0)) == []


def test_a_teacher_that_falls_silent_mid_trace_is_found():
    def table(*signals):
        rows = [{"raw_signal": None if s is None else [*s, None], "mask": [True] * 8 + [False]} for s in signals]
        return pa.Table.from_pylist(rows, schema=pa.schema([SCHEMA.field("raw_signal"), SCHEMA.field("mask")]))

    loud, falls, mute = [0.5] * 8, [0.5] * 4 + [1e-5] * 4, [0.0] * 8
    assert health.silent_tails(table(loud, falls, mute, None)) == 0.5, "who never spoke is counted elsewhere"
    assert health.silent_tails(table(None, mute)) is None
    (found,) = health.warnings(steady(), silent=0.5)
    assert "50%" in found.found and found.metric == "mean_signal"


# --- the page's shell ---------------------------------------------------------------------------------------------------------


def test_no_text_of_a_model_stands_in_the_page(runs, tmp_path):
    write_report(runs[0])
    text = (runs[0] / "report.html").read_text()
    for piece in ("globalThis.planted", "onerror", "question 0", "\x1b", "\u202e"):
        assert piece not in text
    assert text.count("<script") == 2 + len(re.findall("<script type=.text/plain", text)) and len(text) < 5_000_000
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]*)"', text)[1])
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'none'" in policy


def shown_by(file):
    """The manifest that a page carries."""
    (stored,) = re.findall('data-name="manifest">([^<]*)<', file.read_text())
    return json.loads(gzip.decompress(base64.b64decode(stored)))


def test_the_page_that_a_run_writes_at_its_end_says_that_it_finished(tmp_path, monkeypatch, capsys):
    folder = made_run.make_run(tmp_path / "done", steps=2)
    (folder / "state.json").unlink()
    beat = {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine(), "ended": None, "run": "x", "lost": {}}
    (tmp_path / ".done.ranks").mkdir()
    (tmp_path / ".done.ranks" / "rank-0.json").write_text(json.dumps(beat | {"started": psutil.Process().create_time()}))
    assert payload.describe(folder)["state"] == "running"
    train, checkpoint = SimpleNamespace(steps=2), SimpleNamespace(export=False)
    trainer = SimpleNamespace(interrupts=SimpleNamespace(why=""))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr(Beats, "running", SimpleNamespace(stop=lambda: None))
    assert build.finish(SimpleNamespace(run_dir=folder, train=train, checkpoint=checkpoint), trainer, 2) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    (run,) = shown_by(folder / "report.html")["runs"]
    assert (run["state"], run["step"]) == ("finished", 2)


def test_a_name_that_is_html_is_a_name(tmp_path):
    folder = made_run.make_run(tmp_path / "<script>x", steps=1)
    write_report(folder)
    assert "<title>&lt;script&gt;x</title>" in (folder / "report.html").read_text()


def test_the_script_is_put_together_from_modules_that_know_each_other():
    text = pages.script()
    assert "import {" not in text and "export " not in text and "</script" not in text.lower()
    assert {path.stem for path in pages.PAGE.glob("*.js")} == set(pages.MODULES)


def test_the_command_writes_pages_of_one_and_of_several(runs, tmp_path, capsys):
    assert cli.main(["report", str(runs[1])]) == 0 and "0.200 before, 0.700 after 12 steps" in capsys.readouterr().out
    assert cli.main(["report", "--together", str(tmp_path / "all.html"), *map(str, runs)]) == 0
    assert (tmp_path / "all.html").stat().st_size > 10_000
    assert cli.main(["report", str(runs[0] / "audit" / "model")]) == 0 and (runs[0] / "audit" / "model" / "report.html").is_file()
    assert cli.main(["report", str(tmp_path)]) == 2 and "no run there" in capsys.readouterr().err


# --- the terminal -------------------------------------------------------------------------------------------------------------


def test_the_twin_shows_numbers_warnings_and_a_rollout_that_no_terminal_obeys(runs, tmp_path):
    ill = made_run.make_run(tmp_path / "ill", steps=4)
    lines = [json.dumps(m | {"share_unclosed": 0.9}) for m in read_metrics(ill / "metrics.jsonl")]
    (ill / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out = Console(file=io.StringIO(), width=120, color_system=None)
    terminal.show([runs[0], ill], out)
    text = out.file.getvalue()
    assert "held_out_success" in text and "90% of the segments are cut" in text and "step 12, group" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066]", text)


@pytest.mark.parametrize(
    "piece, shown", [("\x1b[31m", "␛[31m"), ("\u202e", "⟨U+202E⟩"), ("a\nb", "a↵\nb"), ("\x7f", "␡"), ("é字", "é字")]
)
def test_what_would_not_be_seen_is_a_sign(piece, shown):
    assert terminal.visible(piece) == shown


def test_a_sparkline_is_as_wide_as_it_may():
    assert terminal.sparkline([0, 1]) == "▁█" and len(terminal.sparkline(range(1000))) == terminal.WIDTH
    assert set(terminal.sparkline([2.0] * 5)) == {"▄"}


# --- the server ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(runs):
    with serve.server(runs) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made.server_address
        made.shutdown()
        thread.join(10)


def get(address, path, **headers):
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_served_run_gives_its_rows_and_groups(runs, served):
    assert served[0] == "127.0.0.1"
    status, page = get(served, "/")
    assert status == 200 and "connect-src 'self'" in html.unescape(gzip.decompress(page).decode())
    status, data = get(served, "/data/manifest")
    assert json.loads(gzip.decompress(data)) == payload.manifest(runs, live=True) and status == 200
    rows = json.loads(gzip.decompress(get(served, "/data/rows?run=1&key=3")[1]))
    assert [(r["group"], r["sample"]) for r in rows] == [(g, s) for g in range(made_run.GROUPS) for s in range(made_run.SIZE)]
    assert "prompt" not in rows[0] and rows[0]["length"] > 0
    header, _ = unpacked(get(served, "/data/pack?run=1&key=3&groups=2,4")[1])
    assert {r["group"] for r in header["rows"]} == {2, 4}
    assert unpacked(get(served, "/data/pack?run=0&key=audit%2Fmodel&groups=1")[1])[0]["rows"][0]["group"] == 1


def test_a_manifest_that_is_known_is_not_made_again_until_something_changed(served, runs):
    known = payload.manifest(runs, live=True)["stamp"]
    assert known and get(served, f"/data/manifest?known={known}") == (204, b"")
    (runs[2] / "metrics.jsonl").touch()
    assert get(served, f"/data/manifest?known={known}")[0] == 200
    (runs[2] / "state.json").rename(runs[2] / "kept")
    try:
        assert payload.stamp(runs) == "", "of a run that goes on nothing is known"
    finally:
        (runs[2] / "kept").rename(runs[2] / "state.json")


def test_evaluations_and_studies_are_told_of_like_runs(tmp_path):
    evaluation, study = made_run.make_evaluation(tmp_path / "e"), made_run.make_study(tmp_path / "s")
    shown = payload.manifest([evaluation, study, tmp_path / "s" / "study.json"])["runs"]
    assert [run["kind"] for run in shown] == ["evaluation", "study", "study"] and shown[1]["arms"] == shown[2]["arms"]
    assert shown[0]["recorded"] == ["samples"] and not shown[1]["recorded"]
    json.dumps(shown, allow_nan=False)
    header, columns = unpacked(payload.pack(payload.rollouts(evaluation, "samples", [2])))
    assert {r["group"] for r in header["rows"]} == {2} and columns["turn"].min() == -1 and "logprobs" not in columns
    with pytest.raises(FileNotFoundError):
        payload.rollouts(evaluation, "audit")
    packs = payload.sample([evaluation, study], {"runs": shown[:2]}, 6000)
    assert list(packs) == ["0/samples"] and len(packs["0/samples"]) <= 6000, "some of its problems"
    out = Console(file=io.StringIO(), width=160, color_system=None)
    terminal.show([evaluation, study], out)
    text = out.file.getvalue()
    assert "Why episodes ended" in text and "less grpo" in text and "ValueError: <script>" in text


def test_a_file_of_full_size_is_measured_and_said():
    found = json.loads(report_page.FILE.read_text())
    assert (found["shape"]["steps"], found["shape"]["rollouts"], found["shape"]["tokens"]) == (2000, 1024, 2000)
    page = " ".join((report_page.ROOT / "docs" / "report.md").read_text().split())
    assert report_page.sentence(found) in page


def test_the_synthetic_run_of_that_file_is_a_run(tmp_path):
    folder = report_page.make_run(tmp_path / "large", steps=3, rollouts=16, tokens=120)
    (run,) = payload.manifest([folder])["runs"]
    assert run["recorded"] == [1, 2, 3] and set(report_page.NAMES) <= run["series"].keys() and run["state"] == "finished"
    rows = read_records(folder, 3)
    assert rows == read_records(folder, 1) and {len(r["ids"]) for r in rows} == {120} and len(rows) == 16
    assert all(0.9 - 1e-6 <= w <= 1.1 + 1e-6 for r in rows for w in r["weight"] if w is not None)


NOWHERE = (
    "/etc/passwd", "/data/pack?run=9&key=1", "/data/pack?run=-1&key=1", "/data/pack?run=0&key=99&groups=1", "/data/rows?run=0",
    "/data/rows?run=0&key=..%2F..%2Fx", "/data/rows?run=0&key=audit%2F..", "/data/pack?run=0&key=1&groups=x",
    "/data/none?run=0&key=1",
)  # fmt: skip


@pytest.mark.parametrize("path", NOWHERE)
def test_what_is_not_there_is_not_found(served, path):
    assert get(served, path)[0] == 404


def test_another_hosts_page_is_refused(served):
    assert get(served, "/data/manifest", Host="evil.example")[0] == 403


def test_a_port_that_is_taken_is_said_in_one_line(runs, served):
    with pytest.raises(ConfigError, match=f"--port {served[1]}: .* give another"):
        serve.server(runs, served[1])


def test_pages_of_several_runs_name_them_apart(tmp_path):
    folders = [made_run.make_run(tmp_path / side / "run", steps=1) for side in "ab"]
    write_pages(folders, tmp_path / "x.html")
    assert [run["name"] for run in payload.manifest(folders)["runs"]] == [str(folder) for folder in folders]
