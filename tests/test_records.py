"""The rollouts that a run keeps: what is stored comes back exactly, the same rollouts are the same bytes.

Files of before are read too.
"""

import json
import math
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from gear_trainer.config import load_config
from gear_trainer.rollout import Rollout
from gear_trainer.runs.files import RunFiles, write_whole
from gear_trainer.runs.records import COLUMNS, LISTS, SCHEMA, Records, read_records, read_table, recorded_steps, records_path
from gear_trainer.tasks.base import Problem

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"


def tokenizer(pieces):
    return SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids)))


def rollouts(texts=("a", "b")):
    """Two turns with a reply between them, and a rollout that said nothing."""
    spoken = Rollout(Problem("p", [], [], "42"), 0, 0, [1], [1], reward=0.1, success=True)
    for ids, logprobs in (([0, 1], [-0.1, -0.2]), ([0], None), ([1], [-0.3])):
        spoken.append(ids, logprobs, None if logprobs is None else [3] * len(ids))
        spoken.turns += logprobs is None
    return [spoken, Rollout(Problem("q", [], [], "7"), 0, 1, [1], [1])], tokenizer(texts)


def rows(tmp_path, made, chat, **columns):
    cfg = load_config(DEMO, [f"output_dir={tmp_path}", "name=run", "world_size=1", "rollout.group_size=2"])
    given = {name: [columns.get(name), None] for name in COLUMNS.values()}
    return Records(cfg, chat).rows(made, [1 / 3, -1 / 3], given), RunFiles(cfg, 0)


def test_numbers_come_back_as_they_were(tmp_path):
    made, chat = rollouts()
    odd = torch.tensor([1 / 3, math.inf, -1e-30])
    table, files = rows(tmp_path, made, chat, logprobs=odd, signal=odd, segments=torch.tensor([-1, 0, 0], dtype=torch.int32))
    files.records(1, table)
    first, second = read_records(tmp_path / "run", 1)
    assert [first["logprobs"][i] for i in (0, 1, 3)] == odd.tolist() and first["logprobs"][2] is None
    assert first["raw_signal"] == first["logprobs"] and first["segment"] == [-1, 0, None, 0]
    assert (first["mask"], first["turn"]) == ([True, True, False, True], [0, 0, -1, 1]) and first["advantage"] == 1 / 3
    assert first["tokens"] == ["a", "b", "a", "b"] and first["response"] == "abab" and first["versions"] == [3, 3, None, 3]
    assert second["ids"] == [] and second["teacher_logprobs"] is None and second["end"] == "done"


def test_the_same_rollouts_are_the_same_bytes(tmp_path):
    made, chat = rollouts()
    table, files = rows(tmp_path, made, chat)
    for step in (1, 2):
        files.records(step, table)
    one, two = (records_path(tmp_path / "run", step).read_bytes() for step in (1, 2))
    assert one == two and recorded_steps(tmp_path / "run") == [1, 2]


def test_a_file_that_was_being_written_is_no_step(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    (folder / "step-00001.parquet.partial").write_bytes(b"PAR1")
    write_whole(folder / "step-00002.jsonl", "")
    assert recorded_steps(tmp_path) == [2] and read_records(tmp_path, 2) == []


def test_text_that_is_no_unicode_is_kept_as_its_escape(tmp_path):
    made, chat = rollouts(("\ud800", "\x00\u202eb"))
    made[0].reference, made[0].failures = "\udfff", ["\ud83d"]
    table, files = rows(tmp_path, made, chat)
    files.records(1, table)
    first, _ = read_records(tmp_path / "run", 1)
    assert first["tokens"][:2] == ["\\ud800", "\x00\u202eb"]
    assert first["reference"] == "\\udfff" and first["failures"] == ["\\ud83d"]


BEFORE = {
    "problem": "p", "group": 0, "sample": 0, "reward": 1.0, "success": True, "advantage": 0.5, "calls": 1, "errors": 0,
    "truncated": False, "failures": [], "dropped": False, "texts_escaped": 0, "replies_cut": 0, "prompt": "q", "response": "ab",
    "answer": "1", "reference": None, "prompt_ids": [7], "ids": [1, 2], "tokens": ["a", "b"], "mask": [1, 0],
    "sampler_logprobs": [-0.125, None], "versions": [0, None], "logprobs": [-0.125, None], "teacher_logprobs": None,
    "entropy": [0.25, None], "signal": [0.5, None], "segment": [0, None], "weight": [1.0625, None],
}  # fmt: skip


def test_a_run_of_before_is_read(tmp_path):
    """JSON lines, whose mask is of 0 and 1, without what is kept since."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-00003.jsonl").write_text(json.dumps(BEFORE) + "\n")
    (found,) = read_records(tmp_path, 3)
    assert {name: found[name] for name in BEFORE} == BEFORE | {"mask": [True, False]} and found.keys() == set(SCHEMA.names)
    assert found["raw_signal"] is None and found["end"] is None and recorded_steps(tmp_path) == [3]
    assert read_table(tmp_path, 3, ["reward", "weight"]).column_names == ["reward", "weight"]


def test_a_file_with_fewer_columns_is_read(tmp_path):
    made, chat = rollouts()
    table, _ = rows(tmp_path, made, chat)
    pq.write_table(table.drop(["forward_kl"]), records_path(tmp_path / "run", 1))
    assert read_table(tmp_path / "run", 1).schema.names == SCHEMA.names and set(LISTS) < set(SCHEMA.names)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "run", 2)
