"""A rollout server: requests and answers, weights on their way, faults as one line each, and sampling ahead of the training.

The server is a stand-in on loopback; the last test starts vLLM's own.
"""

import copy
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from fake_vllm import EOS, Wire, fake_vllm
from scripted_engine import Scripted

from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.policy import lora
from gear_trainer.preflight.checks import check
from gear_trainer.recipe import resolve
from gear_trainer.rollout import Request, Rollout, engine_class, leave_out_stale, make_engine, vllm_server, weight_transfer
from gear_trainer.rollout.types import Completion
from gear_trainer.rollout.vllm_server import ServerError, completion
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.metrics import Sums
from gear_trainer.runs.records import Records, read_records
from gear_trainer.tasks.base import Outcome, Problem, Reply
from gear_trainer.train.ahead import Ahead
from gear_trainer.train.sample import StepSampler

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"


def config(*overrides):
    return load_config(DEMO, ["rollout.engine=vllm_server", *overrides])


@pytest.fixture
def fake():
    with fake_vllm() as server:
        yield server


@pytest.fixture
def connect(fake, monkeypatch):
    """Makes the engine of a rank, connected to the stand-in by a wire in place of gloo."""
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: SimpleNamespace(eos_token_id=EOS))
    monkeypatch.setattr(vllm_server, "LOOK", 0.1)
    monkeypatch.setattr(vllm_server, "EPITAPH", 0.1)
    fake.group = Wire()
    monkeypatch.setattr(weight_transfer, "join", lambda *_: fake.group)

    def made(*overrides):
        fake.asked.clear()
        return make_engine(config(f"rollout.server.url={fake.url}", *overrides), "folder")

    return made


def request(*ids, most=8):
    return Request(list(ids), most, 7, 0.5, 0.9)


# --- requests and answers -------------------------------------------------------------------------------------------------


def test_turns_come_back_in_order_and_with_the_samplers_logprobs(fake, connect):
    engine = connect()
    fake.asked.clear()
    found = engine.generate([request(10), request(20, most=2), request(30)])
    assert found[0] == Completion([11, 12, 13, 14, EOS], [-1.1, -1.2, -1.3, -1.4, -0.1], True, 0)
    assert found[1] == Completion([21, 22], [-2.1, -2.2], False, 0) and found[2].ids[0] == 31
    sent = next(body for _, body in fake.asked if body["token_ids"] == [10])["sampling_params"]
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert sent == {**drawn, "seed": 7, "max_tokens": 8, "logprobs": 0, "detokenize": False}


def test_each_thread_collects_what_it_submitted(fake, connect):
    engine, found = connect(), {}

    def sample(ticket, token):
        engine.submit(ticket, request(token))
        engine.submit(ticket + 1, request(token + 50))
        found[ticket] = {}
        while len(found[ticket]) < 2:
            found[ticket] |= dict(engine.collect())

    threads = [threading.Thread(target=sample, args=job) for job in ((0, 10), (5, 20))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {t: c.ids[0] for t, c in found[0].items()} == {0: 11, 1: 61}
    assert {t: c.ids[0] for t, c in found[5].items()} == {5: 21, 6: 71} and engine.collect() == []


def test_a_turn_under_way_during_a_push_says_which_weights_sampled_each_token(fake, connect):
    engine = connect()
    engine.submit(0, request(99))
    while fake.paths().count("/inference/v1/generate") < 2:
        time.sleep(0.001)
    engine.push(iter([("a", torch.ones(2))]))
    (_, turn), *_ = engine.collect()
    assert turn.versions == [0, 0, 1, 1, 1] and turn.version == 0
    rollout = Rollout(Problem("p", [], [], ""), 0, 0, [99], [99])
    rollout.append(turn.ids, turn.logprobs, turn.token_versions)
    rollout.append([5], None)
    (later,) = engine.generate([request(3)])
    rollout.append(later.ids, later.logprobs, later.token_versions)
    assert rollout.versions == [0, 0, 1, 1, 1, -1, 1, 1, 1, 1, 1]
    tokenizer = SimpleNamespace(decode=lambda ids: "")
    record = Records(config(), SimpleNamespace(tokenizer=tokenizer))._record(rollout, 0.0, _Nothing(), 0)
    assert record["versions"] == [0, 0, 1, 1, 1, None, 1, 1, 1, 1, 1]


class _Nothing(dict):
    def __missing__(self, key):
        return [None]


def test_a_request_that_the_server_broke_off_is_no_turn():
    choice = {"token_ids": [3], "finish_reason": "abort", "logprobs": {"content": []}}
    with pytest.raises(vllm_server.Refused, match=r"broken off \(abort\)"):
        completion(choice, EOS, 0)


# --- weights ----------------------------------------------------------------------------------------------------------------


def test_a_push_pauses_sends_every_tensor_and_resumes(fake, connect, monkeypatch):
    monkeypatch.setattr(vllm_server, "chunks", lambda weights, device: weight_transfer.chunks(weights, device, 40))
    engine, buffer = connect(), torch.zeros(4)
    wanted = {f"w{i}": torch.full((4,), float(i)) for i in range(5)}

    def weights():  # each is valid until the next is asked for
        for name, tensor in wanted.items():
            yield name, buffer.copy_(tensor)
        yield "half", torch.full((3, 2), 2.5, dtype=torch.bfloat16).t()

    for version in (1, 2):
        fake.asked.clear()
        engine.push(weights())
        assert engine.version == version and fake.version == str(version) and not fake.paused
        met = ["/init_weight_transfer_engine"] if version == 1 else []
        updates = ["/update_weights"] * 3
        assert fake.paths() == [*met, "/pause?mode=keep", "/start_weight_update", *updates, "/finish_weight_update", "/resume"]
        assert [len(body["update_info"]["names"]) for path, body in fake.asked if path == "/update_weights"] == [2, 2, 2]
    assert fake.weights["half"].shape == (2, 3) and fake.weights["half"].dtype == torch.bfloat16
    for name, tensor in wanted.items():
        torch.testing.assert_close(fake.weights[name], tensor, rtol=0, atol=0)
    assert engine.generate([request(10)])[0].version == 2


def test_other_ranks_gather_and_leave_the_sending_to_rank_0(fake, connect):
    engine = connect()
    engine.rank, left = 1, iter([("a", torch.ones(1)), ("b", torch.ones(1))])
    fake.asked.clear()
    engine.push(left)
    assert next(left, None) is None and engine.version == 1 and fake.asked == []


def test_adapters_are_named_once_and_then_replaced_where_they_are(fake, connect, tmp_path):
    """Requests under way go on with the new ones, as with whole weights; a later run finds those of an earlier one."""
    engine, file = connect("lora.rank=4"), tmp_path / "adapter"
    for version, call in ((1, "/v1/load_lora_adapter"), (2, "/collective_rpc")):
        fake.asked.clear()
        file.write_text(f"of {version}")
        engine.push_adapter(tmp_path)
        assert fake.paths() == ["/pause?mode=keep", call, "/update_weight_version", "/resume"] and not fake.paused
        assert fake.adapters == {"policy": [f"of {version}"]} and fake.version == str(version) and engine.version == version
        assert engine.generate([request(10)])[0].version == version and fake.asked[-1][1]["model"] == "policy"
    again = connect("lora.rank=4")
    again.push_adapter(tmp_path)
    assert fake.paths()[-3:] == ["/collective_rpc", "/update_weight_version", "/resume"] and again.version == 1
    other, other.rank = connect("lora.rank=4"), 1
    fake.asked.clear()
    other.push_adapter(tmp_path)
    assert other.version == 1 and fake.asked == []


@pytest.mark.parametrize(
    "path, error, why",
    [("/v1/load_lora_adapter", ConfigError, "start it as --dry-run says"), ("/resume", ServerError, "is lost")],
)
def test_a_server_that_takes_no_adapters(fake, connect, tmp_path, path, error, why):
    engine = connect("lora.rank=4")
    fake.faults[path] = 404
    with pytest.raises(error) as caught:
        engine.push_adapter(tmp_path)
    one_line(caught, f"{path}: HTTP 404", why)


# --- faults -----------------------------------------------------------------------------------------------------------------


def one_line(caught, *parts):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    for part in parts:
        assert part in text, (part, text)


def test_nobody_there(monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: SimpleNamespace(eos_token_id=EOS))
    monkeypatch.setattr(vllm_server, "FOUND_WITHIN", 0.0)
    with pytest.raises(ConfigError) as caught:
        make_engine(config("rollout.server.url=http://127.0.0.1:9"), "folder")
    one_line(caught, "rollout.server.url=http://127.0.0.1:9: /health: ", "start it (--dry-run prints how)")


@pytest.mark.parametrize("path", ["/update_weight_version", "/inference/v1/generate"])
def test_a_server_that_was_started_otherwise(fake, connect, path):
    fake.faults[path] = 404
    with pytest.raises(ConfigError) as caught:
        connect()
    one_line(caught, f"rollout server {fake.url}: {path}: HTTP 404", "start it as --dry-run says")


@pytest.mark.parametrize("fault, why", [("drop", "/inference/v1/generate: "), (500, "HTTP 500"), ("hang", "/health: no answer")])
@pytest.mark.parametrize("continuous", [False, True])
def test_a_server_that_is_lost_in_mid_generation(fake, connect, fault, why, continuous):
    engine = connect(*["rollout.server.timeout=1.5"] * (fault == "hang"))
    fake.faults |= {"/inference/v1/generate": fault} | ({"/health": "hang"} if fault == "hang" else {})
    with pytest.raises(ServerError) as caught:
        if continuous:
            engine.submit(0, request(10))
            engine.collect()
        else:
            engine.generate([request(10), request(11)])
    one_line(caught, f"rollout server {fake.url} is lost", why, "--resume goes on")


def test_a_slow_turn_is_no_lost_server(fake, connect):
    engine = connect("rollout.server.timeout=1.5")
    threading.Timer(2.5, fake.pushed.set).start()
    assert engine.generate([request(99)])[0].ended, "its /health answers all the while"


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/pause?mode=keep", "/update_weights", "/finish_weight_update"])
@pytest.mark.parametrize("fault", [500, "hang"])
def test_a_server_that_is_lost_in_mid_push(fake, connect, path, fault):
    engine = connect(*["rollout.server.timeout=1.5"] * (fault == "hang"))
    fake.faults[path] = fault
    with pytest.raises(ServerError) as caught:
        engine.push(iter([("a", torch.ones(2))]))
    why = "HTTP 500" if fault == 500 else "no answer within rollout.server.timeout=1.5 s"
    one_line(caught, "is lost", f"{path}: {why}", "--resume goes on")
    assert engine.version == 0


def test_a_trainers_end_that_fails_is_the_cause_not_the_servers_silence(connect, fake):
    def broken():
        raise OSError("no route")

    def silent():
        time.sleep(0.2)
        raise vllm_server.Refused("/update_weights: no answer")

    with pytest.raises(weight_transfer.TransferError, match="OSError: no route"):
        weight_transfer.meanwhile(broken, silent, 1.0)
    with pytest.raises(weight_transfer.TransferError, match="weights were not taken within 0.1 s"):
        weight_transfer.meanwhile(lambda: time.sleep(5), lambda: None, 0.1)


def test_a_server_that_ends_at_its_start_says_why(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: SimpleNamespace(eos_token_id=EOS))
    planted = [sys.executable, "-c", "print('may cause `OSError: files`'); raise ValueError('no such model')"]
    monkeypatch.setattr(vllm_server, "command", lambda *_: planted)
    with pytest.raises(ServerError) as caught:
        make_engine(config(f"output_dir={tmp_path}", "name=x"), "folder")
    one_line(caught, "ended before it served (exit code 1, ValueError: no such model)", str(tmp_path / "x" / "vllm_server.log"))


def lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_ends_with_whoever_started_it(tmp_path):
    """Killed or not: nothing of it is left on the machine."""
    code = (
        "import os, sys; from pathlib import Path; from gear_trainer.rollout.serving import Served\n"
        "served = Served([sys.executable, '-c', 'import time; time.sleep(600)'], dict(os.environ), Path(sys.argv[1]))\n"
        "print(served.process.pid, flush=True); sys.stdin.read() if sys.argv[2] == 'killed' else None\n"
    )
    for how in ("killed", "ended"):
        parent = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "log", how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        pid = int(parent.stdout.readline())
        if how == "killed":
            os.kill(parent.pid, signal.SIGKILL)
        parent.wait(60)
        deadline = time.monotonic() + 60
        while lives(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not lives(pid), how


# --- what is looked at before a start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.server.url=localhost:8000"], "not an http address"),
        (["rollout.server.url=http://a:1", "rollout.server.devices=[3]"], "names another: leave one out"),
        (["rollout.server.devices=[2,3]"], "rollout.server.tensor_parallel_size=1 GPUs takes as many"),
        (["rollout.server.devices=[3,3]", "rollout.server.tensor_parallel_size=2"], "as many, each once"),
        (["rollout.vllm.engine_args.tensor_parallel_size=2"], "set rollout.server.tensor_parallel_size"),
        (["rollout.vllm.engine_args.max_modle_len=2"], "did you mean 'max_model_len'"),
        (["rollout.vllm.kv_cache_mib=1", "model.path=Qwen/Qwen3-8B"], "one sequence of rollout.max_model_len"),
        (["rollout.staleness=1", "rollout.turn_timeout=null"], "rollout.staleness=1 samples in a thread"),
        (
            ["rollout.staleness=1", "rollout.engine=vllm_colocated"],
            "samples in turn with the trainer; set rollout.engine=vllm_server",
        ),
        (["lora.rank=8", "rollout.vllm.engine_args.max_lora_rank=4"], "no room for adapters of lora.rank=8"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(overrides, message):
    sizes = {"num_hidden_layers": 36, "num_key_value_heads": 8, "hidden_size": 4096, "head_dim": 128}
    with pytest.raises(ConfigError) as caught:
        cfg = config(*overrides)
        engine_class(cfg).check(cfg, sizes if "Qwen3-8B" in cfg.model.path else None)
        check(cfg)
    one_line(caught, message)


def test_a_model_that_does_not_split():
    sizes = {"num_attention_heads": 24, "num_key_value_heads": 4, "intermediate_size": 1024}
    for parts, message in {
        5: "=5 does not divide the model's 24 attention heads",
        3: "=3 does not divide the model's 1024 hidden units",
        6: "=6 neither divides the model's 4 key-value heads nor",
    }.items():
        given = sizes | {"intermediate_size": 1026} if parts == 6 else sizes
        with pytest.raises(ConfigError, match=message):
            vllm_server.check_server(config(f"rollout.server.tensor_parallel_size={parts}"), given)
    for parts in (1, 2, 4, 8):
        vllm_server.check_server(config(f"rollout.server.tensor_parallel_size={parts}"), sizes)


def test_a_rank_on_a_gpu_of_the_server_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    vllm_server.check_devices([7], torch.device("cuda", 2))
    with pytest.raises(ConfigError, match=r"devices=\[6, 7\]: a rank trains on GPU 6; give the server others"):
        vllm_server.check_devices([6, 7], torch.device("cuda", 2))


def test_the_dry_run_prints_the_command():
    said = engine_class(config()).describe(
        config("rollout.server.url=http://10.0.0.2:8001", "rollout.server.tensor_parallel_size=2")
    )
    for part in (
        "VLLM_SERVER_DEV_MODE=1", "--host 10.0.0.2 --port 8001", "--tensor-parallel-size 2", "--enable-scale-out",
        "--logprobs-mode processed_logprobs", """--weight-transfer-config '{"backend": "gloo"}'""", "--enforce-eager",
        "--worker-extension-cls gear_trainer.rollout.workers.Extension", "--kv-cache-memory-bytes 67108864",
    ):  # fmt: skip
        assert part in said, part
    assert "sleep" not in said and "started with" in said and "started by rank 0" in engine_class(config()).describe(config())


def test_a_server_has_room_for_adapters_where_these_are_pushed():
    for push, told in (("adapter", True), ("merged", False)):
        said = engine_class(config()).describe(config("lora.rank=12", f"lora.push={push}"))
        for part in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "--enable-lora --max-loras 1 --max-lora-rank 16"):
            assert (part in said) == told, said


def test_a_servers_environment_has_nothing_of_its_starters_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    held = vllm_server.environment(config("rollout.server.devices=[6]"))
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & held.keys()
    assert held["CUDA_VISIBLE_DEVICES"] == "6" and held["VLLM_SERVER_DEV_MODE"] == "1" and held["PATH"] == os.environ["PATH"]


# --- ahead of the training ----------------------------------------------------------------------------------------------------


def test_what_is_ahead_is_begun_when_its_turn_comes_and_never_past_the_last():
    begun, gates = [], {step: threading.Event() for step in range(1, 7)}

    def draw(step):
        begun.append(step)
        assert gates[step].wait(30)
        if step == 5:
            raise SystemExit("a task's own")
        return f"of {step}"

    ahead = Ahead(draw, 2, 5)
    for gate in gates.values():
        gate.set()
    assert ahead.take(1) == "of 1"
    deadline = time.monotonic() + 30
    while len(begun) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert begun == [1, 2, 3], "two steps ahead, not three"
    assert [ahead.take(step) for step in (2, 3, 4)] == ["of 2", "of 3", "of 4"]
    with pytest.raises(SystemExit, match="a task's own"):
        ahead.take(5)
    assert begun == [1, 2, 3, 4, 5]


class Beside(Scripted):
    samples_beside_training = True


class Quick:
    """One turn, and it is over."""

    tools, max_turns, shows_truth = None, 1, True

    def train_problem(self, index):
        return Problem(str(index), [], [], "")

    def callers(self, problem):
        return "quick", 1

    def episode(self, problem):
        outcome = Outcome(1.0, True)
        return SimpleNamespace(step=lambda _: Reply(), outcome=lambda _: outcome, close=lambda: None)


def sampler(staleness, engine):
    overrides = ["credit=grpo", "rollout.group_size=2", "rollout.prompts_per_step=2", "world_size=1", "train.steps=4"]
    cfg = load_config(DEMO, [*overrides, "rollout.engine=test_vllm_server:Beside", f"rollout.staleness={staleness}"])
    chat = SimpleNamespace(prompt_ids=lambda *_: [1], escapes=lambda *_: 0, tokenizer=SimpleNamespace(decode=lambda ids: ""))
    return StepSampler(cfg, resolve(cfg), Quick(), chat, engine, 0)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_token_is_older_than_the_bound(staleness):
    engine = Beside(None, None)
    engine.version = 1  # the run's first push
    sample, ids = sampler(staleness, engine), {}
    for step in (1, 2, 3, 4):
        sums = Sums()
        rollouts = sample(step, sums)
        ids[step] = [r.ids for r in rollouts]
        assert len(rollouts) == 4 and not any(r.dropped for r in rollouts)
        if staleness:
            assert sums._totals["groups_stale"] == 0 and max(sums._peaks["token_age_max"]) <= min(staleness, step - 1)
        engine.version += 1
    if staleness:
        assert ids == {step: [r.ids for r in sampler(0, engine)(step, Sums())] for step in ids}, "the same seeds"


def test_a_group_with_a_token_that_is_too_old_is_left_out_whole():
    def rollout(group, *versions):
        r = Rollout(Problem("p", [], [], ""), group, 0, [1], [1])
        r.append(list(range(len(versions))), [0.0] * len(versions), list(versions))
        r.append([5], None)
        return r

    rollouts = [rollout(0, 3, 3), rollout(0, 4), rollout(1, 2, 3), rollout(1, 4), rollout(2)]
    assert leave_out_stale(rollouts, 4, 1) == 1 and [r.dropped for r in rollouts] == [False, False, True, True, False]
    assert leave_out_stale(rollouts, 5, 1) == 2, "a group is counted once"


# --- vLLM's own server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny tied model's folder, the model, and another with its sizes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from gear_trainer.demo.qwen3_tokenizer import subset_tokenizer
    from gear_trainer.tasks import make_task

    path, task = tmp_path_factory.mktemp("tiny"), make_task("mathapi", 0)
    tokenizer = subset_tokenizer([m["content"] for i in range(50) for m in task.train_problem(i).messages], path)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2, "hidden_size": 32}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True}
    config = Qwen3Config(intermediate_size=32, initializer_range=0.3, dtype="float32", **sizes, **words)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(Qwen3ForCausalLM(config).eval())
    found[0].save_pretrained(path)
    return path, *found


def logprobs(model, prompt, ids):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def decoded(engine):
    """Tokens that the server has sampled so far."""
    lines = engine.http._client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:generation_tokens_total"))


def pushed_into(engine, prompts, push):
    """Turns one of which a push came into; where the server was through before it, as on a busy machine, others are begun."""
    for _ in range(20):
        for k, prompt in enumerate(prompts):
            engine.submit(k, Request(prompt, 1000, k))
        before, deadline = decoded(engine), time.monotonic() + 300
        while decoded(engine) < before + 100 and time.monotonic() < deadline:
            time.sleep(0.005)
        push(engine.version + 1)
        found = {}
        while len(found) < len(prompts):
            found |= dict(engine.collect())
        if any(len(set(turn.token_versions)) == 2 for turn in found.values()):
            return found
    raise AssertionError("none was under way")


def whole(engine, model, tmp_path):
    """Push all weights."""
    from gear_trainer.policy.gather import gathered_weights

    engine.push(gathered_weights(model))


def alone(engine, model, tmp_path):
    """Push adapters, in a folder that is gone behind it."""
    from gear_trainer.policy.gather import adapter_state_dict

    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        lora.write(Path(folder), model, adapter_state_dict(model))
        engine.push_adapter(Path(folder))


def adapted(model, section):
    """The model behind two sets of adapters, which move it as far as other weights would."""
    out = [copy.deepcopy(model) for _ in range(2)]
    for seed, lm in enumerate(out):
        lora.attach(lm, section, seed)
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.3)
    return [lm.eval() for lm in out]


KINDS = ["whole", *(["alone"] if os.environ.get("GEAR_SERVERS") else [])]  # a server's start takes 50 CPU seconds


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_push_in_mid_turn_on_vllms_own_server(models, tmp_path, kind):
    """Of a turn that is under way, tokens before the push have the old weights' log-probs and those behind it the new ones', to
    rounding: nothing of the old keys and values is left. The model is split over two processes. A later run takes the server over
    in mid-push. Then it is killed in mid-turn. With GEAR_SERVERS=all the same for adapters."""
    folder, *both = models
    most = ["rollout.max_model_len=1024", "rollout.max_new_tokens=1000", "rollout.server.tensor_parallel_size=2"]
    most += ["lora.rank=4"] if kind == "alone" else []
    cfg, push = config(f"output_dir={tmp_path}", "name=served", *most), {"whole": whole, "alone": alone}[kind]
    both = adapted(both[0], cfg.lora) if kind == "alone" else both
    engine = make_engine(cfg, str(folder))
    assert engine.http.ask("GET", "/get_world_size") == {"world_size": 2}
    if kind == "alone":
        push(engine, both[1], tmp_path)  # nobody samples before the first push; version 1
    prompts = [[5 + k, 6, 7] for k in range(8)]
    found = pushed_into(engine, prompts, lambda version: push(engine, both[version % 2], tmp_path))
    again = engine.generate([Request(prompt, 40, 0) for prompt in prompts])
    assert all(turn.version == engine.version and turn.versions is None for turn in again)
    for k, turn in [*found.items(), *enumerate(again)]:
        wanted = torch.stack([logprobs(model, prompts[k], turn.ids) for model in both])
        of = torch.tensor(turn.token_versions)  # the pushes took turns between the models
        assert (of.diff() >= 0).all() and turn.ended == (turn.ids[-1] == engine.eos)
        torch.testing.assert_close(torch.tensor(turn.logprobs), wanted.gather(0, of[None] % 2)[0], rtol=0, atol=1e-4)
    for path in ("/pause?mode=keep", *["/start_weight_update"] * (kind == "whole")):  # an earlier run, killed in mid-push
        engine._post(path)
    again = make_engine(config(f"rollout.server.url={engine.url}", *most), str(folder))
    push(again, both[0], tmp_path)
    (turn,) = again.generate([Request(prompts[0], 40, 0)])
    assert turn.version == again.version == 1
    torch.testing.assert_close(torch.tensor(turn.logprobs), logprobs(both[0], prompts[0], turn.ids), rtol=0, atol=1e-4)
    engine.submit(0, Request(prompts[0], 1000, 0))
    os.killpg(engine.served.process.pid, signal.SIGKILL)
    with pytest.raises(ServerError) as caught:
        engine.collect()
    one_line(caught, "ended (exit code -9", str(engine.served.log), "--resume goes on")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_ranks_train_one_step_off(server, tmp_path):
    """The demo on one server: no group is too old, each token says which push sampled it, and the pushes arrived."""
    few = ["rollout.prompts_per_step=4", "rollout.group_size=4", "train.steps=3", "eval.every=0", "checkpoint.export=false"]
    off = [
        "name=ahead",
        f"output_dir={tmp_path}",
        "rollout.engine=vllm_server",
        "rollout.staleness=1",
        "rollout.schedule=continuous",
    ]
    run = server.start(tmp_path / "log", *off, *few)
    assert run.wait(1700) == [0, 0], run.text()[-6000:]
    steps = read_metrics(tmp_path / "ahead" / "metrics.jsonl")
    assert [m["step"] for m in steps] == [1, 2, 3] and steps[0]["logprob_gap_max"] < 1e-4
    assert [m["groups_stale"] for m in steps] == [0, 0, 0] and [m["token_age_max"] for m in steps] == [0, 1, 1]
    assert steps[2]["logprob_gap_mean"] < 0.5, "a push that did not arrive shows as nats"
    for step in (1, 2, 3):
        for row in read_records(tmp_path / "ahead", step):
            assert [v is None for v in row["versions"]] == [not m for m in row["mask"]]
            assert {v for v in row["versions"] if v is not None} <= {step, max(1, step - 1)}
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
