"""What people watch: trackers behind their packages' own signatures, MFU, idle share, memory, samples, the list of runs."""

import importlib.machinery
import json
import os
import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from gear_trainer import cli
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.policy.batching import Amount, amount
from gear_trainer.preflight.speed import PEAKS, ModelCost, model_cost, peak_of
from gear_trainer.rollout import Rollout
from gear_trainer.runs.console import Console
from gear_trainer.runs.files import RunFiles, note_end, prepare_run_dir
from gear_trainer.runs.metrics import Phases
from gear_trainer.runs.ranks import machine
from gear_trainer.runs.records import Records
from gear_trainer.runs.registry import find_runs, look
from gear_trainer.runs.trackers import check_trackers
from gear_trainer.tasks.base import Problem
from gear_trainer.train import sample, watch
from gear_trainer.train.watch import Watch, Yardsticks, _figures

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"


def config(tmp_path, *overrides):
    return load_config(DEMO, [f"output_dir={tmp_path}", "name=run", *overrides])


# --- trackers -------------------------------------------------------------------------------------------------------------


class WandbRun:
    """A run of wandb 0.31, its calls noted; arguments that it does not take are refused by Python."""

    def __init__(self):
        self.calls = []

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        self.calls.append(("define", name, step_metric))

    def log(self, data, step=None, commit=None):
        self.calls.append(("log", data, step))

    def finish(self, exit_code=None):
        self.calls.append(("finish", exit_code))


class TrackioRun:
    """A run of trackio 0.43, likewise."""

    def __init__(self):
        self.calls = []

    def log(self, metrics, step=None):
        self.calls.append(("log", metrics, step))

    def finish(self):
        self.calls.append(("finish",))


def table(columns=None, data=None, dataframe=None, rows=None, optional=True, allow_mixed_types=False, log_mode="IMMUTABLE"):
    return SimpleNamespace(columns=columns, data=data)


# arguments of `init`, as wandb 0.31.0 and trackio 0.43.0 have them
WANDB = """entity project dir id name notes tags config config_exclude_keys config_include_keys allow_val_change group job_type
mode force reinit resume resume_from fork_from save_code tensorboard sync_tensorboard monitor_gym settings"""
TRACKIO = """project name group space_id server_url dataset_id bucket_id config resume settings private embed auto_log_gpu
gpu_log_interval auto_log_cpu cpu_log_interval webhook_url webhook_min_level"""


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for both packages; the runs that they began: (package, arguments, run), in order."""
    begun = []

    def package(name, arguments, run):
        def init(**given):
            assert given.keys() <= set(arguments.split()), given.keys() - set(arguments.split())
            begun.append((name, given, run()))
            return begun[-1][2]

        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init, module.Table = init, table
        monkeypatch.setitem(sys.modules, name, module)

    package("wandb", WANDB, WandbRun)
    package("trackio", TRACKIO, TrackioRun)
    return begun


ALL = "tracking.trackers=[tensorboard,wandb,trackio]"


def test_every_tracker_gets_a_step_a_sample_and_the_end(tmp_path, packages):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tmp_path, ALL, "tracking.project=credit")
    check_trackers(cfg)
    files = RunFiles(cfg, 0)
    files.metrics({"step": 3, "reward_mean": 0.5, "loss": None, "seconds": {"step": 2.0}, "outcome": {"format": 1.0}})
    files.sample(3, "a rollout\nin two lines")
    files.close(failed=True)
    (_, wandb, run), (_, trackio, other) = packages
    assert wandb["project"] == trackio["project"] == "credit" and wandb["dir"] == str(cfg.run_dir)
    assert wandb["config"] == trackio["config"] == json.loads(cfg.model_dump_json())
    numbers = {"reward_mean": 0.5, "seconds/step": 2.0, "outcome/format": 1.0}
    assert run.calls[:3] == [("define", "step", None), ("define", "*", "step"), ("log", {"step": 3, **numbers}, None)]
    assert other.calls[0] == ("log", numbers, 3)
    shown = run.calls[3][1]["sample"].data, other.calls[1][1]["sample"].data
    assert shown == ([[3, "a rollout\nin two lines"]],) * 2
    assert run.calls[-1] == ("finish", 1) and other.calls[-1] == ("finish",)
    board = EventAccumulator(str(cfg.run_dir / "tensorboard"))
    board.Reload()
    assert {name: board.Scalars(name)[0].value for name in board.Tags()["scalars"]} == numbers
    assert board.Tensors("sample/text_summary")[0].tensor_proto.string_val[0] == b"    a rollout\n    in two lines"


def test_a_resumed_run_is_the_same_run_and_a_new_one_of_its_name_another(tmp_path, packages):
    cfg = config(tmp_path, ALL)
    for resume, start in ((False, 0), (True, 2), (False, 0)):
        prepare_run_dir(cfg, resume, start)
        files = RunFiles(cfg, start)
        files.metrics({"step": start + 1, "reward_mean": 0.5})
        files.close(failed=False)
    ids = [begun["id"] for name, begun, _ in packages if name == "wandb"]
    names = [begun["name"] for name, begun, _ in packages if name == "trackio"]
    assert ids[0] == ids[1] != ids[2] and names == [f"run-{one}" for one in ids]
    assert {begun["resume"] for _, begun, _ in packages} == {"allow"}
    assert [run.calls[-1] for name, _, run in packages if name == "wandb"] == [("finish", 0)] * 3


def test_what_cannot_track_is_one_line(tmp_path, packages, monkeypatch):
    with pytest.raises(ConfigError, match=r"tracking.trackers.*names wandb twice"):
        config(tmp_path, "tracking.trackers=[wandb,wandb]")
    monkeypatch.delitem(sys.modules, "trackio")
    monkeypatch.setattr("gear_trainer.runs.trackers.find_spec", lambda name: None if name == "trackio" else name)
    with pytest.raises(ConfigError, match="tracking.trackers: trackio is not installed: pip install trackio, or leave it out"):
        check_trackers(config(tmp_path, ALL))

    def no_login(**_):
        raise PermissionError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_login)
    with pytest.raises(
        ConfigError, match=r"wandb does not start \(PermissionError: api_key.*offline: WANDB_MODE=offline"
    ) as error:
        RunFiles(config(tmp_path, "tracking.trackers=[wandb]"), 0)
    assert "\n" not in str(error.value)


# --- the machine's numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "card, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("NVIDIA H20", 148e12), ("NVIDIA GB200", 2500e12), ("Tesla T4", None), ("NVIDIA H1000", None),
    ],
)  # fmt: skip
def test_a_cards_peak_is_that_of_the_longest_name_in_its_own(card, peak):
    assert peak_of(card) == peak


def tiny(**more):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=160, tie_word_embeddings=False, attn_implementation="eager", **sizes | more))


@pytest.mark.parametrize("trained", [True, False])
def test_flops_are_those_of_the_models_own_products(trained):
    """Counted by torch over a real forward and backward, whose eager attention multiplies every pair, seen or not."""
    lm, n, predicted = tiny(), 24, 9
    lm.model.embed_tokens.requires_grad_(False)
    if not trained:
        lm.requires_grad_(False)
    cost = model_cost(lm, "bfloat16", "NVIDIA H100 80GB HBM3")
    assert cost.trained is trained and cost.peak == 989e12
    given = torch.randn(1, n, 64, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = lm.lm_head(lm.model(inputs_embeds=given, use_cache=False).last_hidden_state[:, :predicted])
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    every = Amount(n, n * n, predicted)
    assert cost.flops(every, backward=False) == pytest.approx(forward.get_total_flops(), rel=0.02)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert cost.flops(every, backward=True) == pytest.approx(both, rel=0.02)


def test_a_token_meets_the_experts_that_it_is_sent_to():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    fields = Qwen3MoeConfig(vocab_size=50, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, **sizes)
    with torch.device("meta"):
        lm = Qwen3MoeForCausalLM(fields)
    experts = sum(p.numel() for name, p in lm.named_parameters() if ".experts." in name)
    inner = sum(p.numel() for p in lm.model.layers.parameters()) + lm.model.norm.weight.numel()
    assert experts == 8 * 3 * 32 * 24
    assert model_cost(lm, "bfloat16", "NVIDIA H200").body == inner - experts * 6 / 8


def test_what_no_peak_bounds_has_no_mfu():
    lm = tiny()
    assert model_cost(lm, "float32", "NVIDIA H200") is None and model_cost(lm, "bfloat16", "Some Card") is None
    assert model_cost(lm, "bfloat16") is None or torch.cuda.is_available()
    assert min(PEAKS.values()) > 1e13


def rollout(ids, prompt=(1, 2, 3), **more):
    r = Rollout(Problem("p", [], [], "42"), 0, 0, list(prompt), [9])
    ids = list(ids)
    r.append(ids, [-0.5] * len(ids))
    for name, value in more.items():
        setattr(r, name, value)
    return r


def test_the_work_of_rows_is_counted_from_their_lengths():
    long, tool = rollout([4] * 5), rollout([4, 5])
    tool.append([7, 7], None)
    assert amount([long, tool], [[1], [1, 2]]) == Amount(tokens=6 + 6, pairs=21 + 21, predicted=5 + 2)


def test_mfu_and_memory_stand_beside_their_yardsticks(tmp_path):
    cost = ModelCost(body=10.0, head=0.0, wide=0.0, trained=True, peak=100.0)
    shown = Watch(config(tmp_path), None, yardsticks=Yardsticks({"score": 2**31, "push": 1.0}, cost))
    found = shown._against({"score": 2.0, "update": 0.0}, {"score": 100.0, "update": 7.0}, {"score": 3 * 2**29, "credit": 2**30})
    assert found == {"mfu": {"score": 0.25}, "memory": {"score": 1.5, "credit": 1.0}, "memory_planned": {"score": 2.0}}, (
        "two ranks do 200 a second"
    )
    assert Watch(config(tmp_path), None)._against({"score": 2.0}, {}, {}) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="a peak of the resident set is read off /proc")
def test_a_phase_has_its_own_peak():
    phases = Phases()
    with phases("wide"):
        torch.ones(32 << 20, dtype=torch.float64).sum()  # 256 MiB, gone again
    with phases("narrow"):
        pass
    assert phases.peaks["wide"] - phases.peaks["narrow"] > 128 << 20
    phases.split()
    assert phases.peaks == {}


def test_an_engine_is_timed_in_its_own_calls_alone(monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    engine = SimpleNamespace(generate=lambda requests: requests, submit=lambda *_: None, collect=lambda: ["done"])
    timed = sample.Stopwatch(engine)
    assert timed.generate([1]) == [1] and timed.submit(0, None) is None and timed.collect() == ["done"]
    assert timed.seconds == 7.0


def test_lengths_and_outcomes_are_those_of_all_ranks(monkeypatch):
    """Ranks may know other names: each is averaged over the rollouts that have it."""
    others = [list(range(1, 99)), {"format": (3.0, 4), "exact": (1.0, 2)}]
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), [own, others]))
    found = _figures([99, 100], [{"format": 1.0}, {"format": 0.0, "steps": 5.0}])
    assert (found["response_length_p50"], found["response_length_p99"]) == (50, 99)
    assert found["outcome"] == {"exact": 0.5, "format": pytest.approx(4 / 6, rel=1e-5), "steps": 5.0}


# --- a rollout as text ------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer in whose text a token is a character."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_sample_is_text_that_no_terminal_obeys(tmp_path, capsys):
    made = Records(config(tmp_path), SimpleNamespace(tokenizer=Letters()))
    r = rollout(map(ord, "\x1b[31mred [bold]\n" + "x\n" * 100), prompt=map(ord, "question"), reward=0.5, success=True)
    text = made.text(r, 1.25)
    assert text.startswith(
        "problem p: reward 0.5, success, advantage +1.250, done\nPROMPT\nquestion\nRESPONSE\n\ufffd[31mred [bold]\n"
    )
    assert text.endswith("\nANSWER 42") and "\x1b" not in text
    Console(config(tmp_path), 0, quiet=False).sample(text)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 41 and shown[4] == "  | \ufffd[31mred [bold]" and shown[-1] == "  | ANSWER 42"
    assert shown[20] == f"  | ... {107 - 40} lines ..."


def test_a_sample_is_of_a_rollout_that_teaches_and_comes_every_so_many_steps(tmp_path, monkeypatch, capsys):
    cfg = config(tmp_path, "tracking.samples_every=2", "rollout.records=0")
    shown = Watch(cfg, SimpleNamespace(tokenizer=Letters()), 0, RunFiles(cfg, 0))
    monkeypatch.setattr(watch, "_figures", lambda *_: {})
    alike, telling = rollout(map(ord, "alike")), rollout(map(ord, "telling"))
    e = SimpleNamespace(rollouts=[alike, telling], advantages=[0.0, -1.0], lengths=[5, 7])
    monkeypatch.setattr(shown.console, "step", lambda values: None)
    for step in (1, 2, 3):
        shown.keep(step, e)
        shown.report({"step": step})
        assert ("telling" in capsys.readouterr().out) == (step == 2)


# --- runs -----------------------------------------------------------------------------------------------------------------


def made(tmp_path, name, beat=None, state=None, step=2):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"credit": "gear", "task": "mathapi", "train": {"steps": 4}}))
    rows = [{"step": 0, "held_out_success": 0.25}] + [{"step": s, "reward_mean": s / 4, "success": 0.5} for s in range(1, step)]
    rows.append({"step": step, "reward_mean": step / 4, "success": 0.5, "held_out_success": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state:
        note_end(folder, *state)
    if beat:
        ranks = tmp_path / f".{name}.ranks"
        ranks.mkdir()
        (ranks / "rank-0.json").write_text(json.dumps(beat).ljust(200))
    return folder


def beat(**more):
    import psutil

    me = {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine(), "started": psutil.Process().create_time()}
    return me | {"ended": None} | more


def test_the_state_of_a_run_is_read_off_its_files(tmp_path):
    states = {
        "goes": look(made(tmp_path, "goes", beat())),
        "elsewhere": look(made(tmp_path, "elsewhere", beat(machine="another"))),
        "done": look(made(tmp_path, "done", beat(), ("finished", 4, ""), step=4)),
        "asked": look(made(tmp_path, "asked", beat(pid=2**22 + 1), ("stopped", 2, "its launcher is gone"))),
        "raised": look(made(tmp_path, "raised", beat(pid=2**22 + 1, ended="ZeroDivisionError: planted"))),
        "killed": look(made(tmp_path, "killed", beat(pid=2**22 + 1))),
        "old": look(made(tmp_path, "old")),
        "older": look(made(tmp_path, "older", step=4)),
    }
    assert {name: run.state for name, run in states.items()} == {
        "goes": "running", "elsewhere": "running", "done": "finished", "asked": "stopped", "raised": "failed", "killed": "failed",
        "old": "failed", "older": "finished",
    }  # fmt: skip
    assert states["asked"].why == "its launcher is gone" and states["raised"].why == "rank 0: ZeroDivisionError: planted"
    assert "without a word" in states["killed"].why
    run = states["done"]
    assert (run.step, run.steps, run.reward, run.success, run.held_out) == (4, 4, 1.0, 0.5, (0.25, 0.75))
    os.utime(tmp_path / ".elsewhere.ranks" / "rank-0.json", (0, 0))
    assert look(tmp_path / "elsewhere").state == "failed", "no beat for too long"


def test_a_resumed_run_has_not_ended(tmp_path):
    cfg = config(tmp_path)
    prepare_run_dir(cfg, False, 0)
    note_end(cfg.run_dir, "stopped", 1)
    prepare_run_dir(cfg, True, 1)
    assert look(cfg.run_dir).state == "failed", "no beat, no word"


def test_runs_are_listed(tmp_path, capsys):
    made(tmp_path, "first", state=("finished", 4, ""), step=4)
    broken = made(tmp_path, "second")
    (broken / "config.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    os.utime(tmp_path / "first" / "state.json", (0, 2**33))
    assert cli.main(["runs", str(tmp_path)]) == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert first == [
        str(tmp_path / "first"),
        "gear",
        "mathapi",
        "finished",
        "4/4",
        "1.000",
        "0.500",
        "0.250 -> 0.750",
        "0 s ago",
        "-",
    ]
    assert second[0].endswith("second") and second[-1] == "its config.json cannot be read"
    assert [run.path.name for run in find_runs(tmp_path / "first")] == ["first"]
    assert cli.main(["runs", str(tmp_path / "no-run")]) == 2
    assert "no-run: no run there (config.json is missing)" in capsys.readouterr().err
