"""The trainer's parts that need no process group: advantages, batching, chat rendering, rollouts, metrics, sync, report."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gear_kernels import sparse
from gear_trainer.config import load_config
from gear_trainer.demo.qwen3_tokenizer import subset_tokenizer
from gear_trainer.errors import ConfigError
from gear_trainer.policy.batching import micro_batch, padding_micro_batch, split_rows
from gear_trainer.policy.checkpoint import MANIFEST, latest_step
from gear_trainer.policy.forward import Forward
from gear_trainer.policy.gather import buckets, gathered_weights, tied_head
from gear_trainer.policy.model import Policy
from gear_trainer.recipe import resolve
from gear_trainer.rollout import Completion, Limits, Rollout, roll_out, seed_of
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.files import RunFiles, next_free, read_metrics
from gear_trainer.runs.metrics import MEASURED, Phases, Sums
from gear_trainer.runs.records import SCHEMA, Records, read_records
from gear_trainer.tasks import make_task
from gear_trainer.tasks.base import Message, Problem
from gear_trainer.train.advantages import group_advantages
from gear_trainer.train.credit import assign
from gear_trainer.train.experience import pack_with
from gear_trainer.train.guards import SyncError, check_gap
from gear_trainer.train.loop import Trainer
from gear_trainer.train.schedule import schedule
from gear_trainer.train.score import score
from gear_trainer.train.watch import Watch, Yardsticks

ROOT = Path(__file__).parents[1]
DEMO = "gear_trainer/configs/mathapi_cpu.yaml"
PROBLEM = Problem("p", [], [], "1")


def _rollout(prompt=3, teacher=5, ids=(7, 8, 9), mask=(1, 1, 1), group=0, reward=0.0):
    r = Rollout(PROBLEM, group, 0, list(range(20, 20 + prompt)), list(range(40, 40 + teacher)))
    r.ids, r.mask, r.reward = list(ids), [bool(m) for m in mask], reward
    r.sampler_logprobs, r.turn_ids = [-0.5] * len(r.ids), [0] * len(r.ids)
    return r


def test_group_advantages_are_relative_to_their_group():
    rollouts = [_rollout(group=g, reward=x) for g, x in [(0, 1), (0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (2, 0.25), (2, 0.75)]]
    got = group_advantages(rollouts)
    assert got[:4] == pytest.approx([0.8660, -0.8660, -0.8660, 0.8660], abs=1e-4)
    assert got[4:6] == [0.0, 0.0]
    assert group_advantages(rollouts, "dr_grpo")[6:] == [-0.25, 0.25]


def test_micro_batch_indices_predict_the_policy_tokens():
    rollouts = [_rollout(3, 5, (7, 8, 9, 10), (1, 0, 0, 1)), _rollout(4, 6, (5,), (1,))]
    batch = micro_batch(rollouts, [0, 1], teacher=True)
    student, teacher = batch.student.input_ids.flatten(), batch.teacher.input_ids.flatten()
    assert batch.student.input_ids.shape == (2, 7) and batch.teacher.input_ids.shape == (2, 9)
    assert student[batch.student.index + 1].tolist() == teacher[batch.teacher.index + 1].tolist() == batch.targets.tolist()
    assert batch.targets.tolist() == [7, 10, 5]
    assert student[batch.student.index].tolist() == [22, 9, 23] and teacher[batch.teacher.index].tolist() == [44, 9, 45]


@pytest.mark.parametrize("teacher", [False, True])
def test_micro_batches_keep_the_budget_and_every_row_once(teacher):
    rng = random.Random(0)
    rollouts = [_rollout(rng.randint(1, 30), rng.randint(1, 60), range(rng.randint(1, 90)), [1] * 90) for _ in range(50)]
    for r in rollouts:
        r.mask = r.mask[: len(r.ids)]
    split = split_rows(rollouts, list(range(50)), 400, teacher)
    assert sorted(i for rows in split for i in rows) == list(range(50))
    for rows in split:
        batch = micro_batch(rollouts, rows, teacher)
        assert len(rows) == 1 or max(x.input_ids.numel() for x in (batch.student, batch.teacher) if x) <= 400
    assert split == split_rows(rollouts, list(range(50)), 400, teacher)
    dummy = padding_micro_batch(teacher)
    assert (dummy.teacher is not None) == teacher and dummy.rows == []


def test_rollouts_without_policy_tokens_make_an_empty_micro_batch():
    batch = micro_batch([_rollout(ids=(), mask=())], [0], teacher=True)
    assert batch.targets.shape == batch.student.index.shape == (0,) and batch.targets.dtype == torch.int64


def test_T4_scoring_does_not_pad_students_to_the_teachers_width(alone):
    """What reaches the model in a scoring pass: each side as wide as its own longest row, and nobody's numbers change."""
    lengths = [(4, 24, (7, 8, 9, 10)), (3, 20, (5, 6)), (4, 24, (3, 2, 1)), (2, 22, (11,))]
    rollouts = [_rollout(prompt, teacher, ids, [1] * len(ids)) for prompt, teacher, ids in lengths]
    cfg = load_config(DEMO, ["rollout.max_model_len=60", "train.tokens_per_micro_batch=64"])
    policy, shapes = Policy(_tiny(False, 70).eval()), []
    policy.lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    recipe = resolve(cfg)
    experience = pack_with(recipe, rollouts, [1.0, -1.0, 0.0, 1.0], torch.device("cpu"))
    score(recipe, experience, schedule(cfg, recipe, experience).score, Forward(policy, None, 1.0))
    assert sorted(shapes) == [(1, 5), (1, 7), (1, 22), (2, 8), (2, 28)], (
        "64 tokens a forward hold two of 28; A = 0 has no teacher"
    )
    found = experience.rows(("logprobs", "teacher_logprobs"), 4)
    assert [x is None for x in found["teacher_logprobs"]] == [False, False, True, False]
    for r, logprobs, teacher in zip(rollouts, found["logprobs"], found["teacher_logprobs"], strict=True):
        assert logprobs.tolist() == pytest.approx(_alone(policy.lm, r.prompt_ids, r.ids), abs=1e-5)
        if teacher is not None:
            assert teacher.tolist() == pytest.approx(_alone(policy.lm, r.teacher_prompt_ids, r.ids), abs=1e-5)


def test_the_heads_backward_may_be_sparse():
    """The same gradients of all weights within the tolerance, where the policy is sure enough for columns to be left out."""
    torch.manual_seed(0)
    lm, grads, kept = _tiny(False, 70).eval(), [], []
    with torch.no_grad():
        lm.lm_head.weight.mul_(150)
    batch = micro_batch([_rollout(4, 24, (7, 8, 9, 10), [1] * 4)], [0], teacher=False)
    for backward in ("exact", "sparse"):
        policy = Policy(lm, backward)
        with sparse.reports() as reports:
            policy(batch, 1.0, ("logprobs",)).logprobs.sum().backward()
        kept += [report.kept for report in reports]
        grads.append([p.grad.clone() for p in policy.parameters()])
        policy.zero_grad()
    assert len(kept) == 1 and 0 < kept[0] < 0.5
    for name, exact, other in zip(dict(policy.named_parameters()), *grads, strict=True):
        assert (exact - other).norm() <= 4 * sparse.TOLERANCE * exact.norm(), name


def credit_of(overrides, rollouts, advantages, sums=None):
    """What credit makes of rollouts whose every statistic is 1, by column for each rollout."""
    recipe = resolve(load_config(DEMO, overrides))
    experience = pack_with(recipe, rollouts, advantages, torch.device("cpu"))
    for name in ("logprobs", "entropy", "loss_weights"):
        experience.columns[name] = torch.ones(sum(experience.lengths))
    assign(recipe, experience, 1, sums or Sums())
    return experience.rows(("token_advantages", "weights"), len(rollouts))


def policy_engine(policy):
    """A policy in a ZeRO-3 engine's place."""
    policy.device, policy.optimizer = torch.device("cpu"), None
    return policy


def _alone(lm, prompt, ids):
    """Log-probs of one stream by itself, from whole logits."""
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    task = make_task("mathapi", 0)
    texts = [m["content"] for i in range(50) for m in task.train_problem(i).messages]
    return Chat(subset_tokenizer(texts, tmp_path_factory.mktemp("tokenizer")), task.tools), task


def test_observation_is_the_template_text_between_two_turns(chat):
    chat, task = chat
    messages = task.train_problem(0).messages
    reply = chat.observation_ids([Message("tool", '{"result": 3}')])
    ids = chat.prompt_ids(messages) + chat.encode("call") + [chat.tokenizer.eos_token_id] + reply
    whole = [*messages, {"role": "assistant", "content": "call"}, {"role": "tool", "content": '{"result": 3}'}]
    assert chat.tokenizer.decode(ids) == chat.render(whole)


class Scripted:
    """A sampler that says given turns: exact text, or text cut before its end-of-turn token."""

    def __init__(self, chat, turns):
        self.chat, self.turns, self.requests = chat, turns, []

    def generate(self, requests):
        self.requests.append(requests)
        out = []
        for q in requests:
            text, ended = self.turns[len(self.requests) - 1]
            ids = self.chat.encode(text) + [self.chat.tokenizer.eos_token_id] * ended
            out.append(Completion(ids[: q.max_tokens], [-1.0] * len(ids[: q.max_tokens]), ended and len(ids) <= q.max_tokens))
        return out


def test_two_turn_rollout_masks_the_tool_reply_and_keeps_ids_verbatim(chat):
    chat, task = chat
    problem = task.train_problem(1)
    call = task.demonstrate(problem, "right", random.Random(0))
    sampler = Scripted(chat, [(call[0], True), (call[1], True)])
    rollout, other = roll_out(sampler, chat, task, [(4, problem)], Limits(2, 1.0, 60, 400), ("key",))
    assert rollout.reward == 1.0 and rollout.success and rollout.turns == 2 and rollout.calls == 1 and rollout.errors == 0
    said = [chat.encode(t) + [chat.tokenizer.eos_token_id] for t in call]
    assert [rollout.ids[i] for i in rollout.policy_positions] == said[0] + said[1]
    reply = [t for t, m in zip(rollout.ids, rollout.mask, strict=True) if not m]
    assert "<tool_response>" in chat.tokenizer.decode(reply)
    assert sampler.requests[1][0].prompt_ids == rollout.prompt_ids + said[0] + reply
    assert rollout.turn_ids[0] == 0 and rollout.turn_ids[-1] == 1
    assert len({q.seed for turn in sampler.requests for q in turn}) == 4, "each sample and turn has its own seed"


@pytest.mark.parametrize(
    "text", ["<tool_call>\nnot json\n</tool_call>", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>']
)
def test_malformed_calls_are_answered_and_counted(chat, text):
    chat, task = chat
    rollout, _ = roll_out(
        Scripted(chat, [(text, True), ("12", True)]), chat, task, [(0, task.train_problem(2))], Limits(2, 1.0, 90, 400), ()
    )
    assert rollout.errors == 1 and rollout.turns == 2 and "error" in chat.tokenizer.decode(rollout.ids)


def test_a_cut_turn_ends_the_episode_without_reward(chat):
    chat, task = chat
    problem = task.train_problem(3)
    rollout, _ = roll_out(Scripted(chat, [(problem.answer * 9, False)]), chat, task, [(0, problem)], Limits(2, 1.0, 30, 400), ())
    assert rollout.truncated and rollout.reward == 0 and rollout.turns == 0


def test_no_room_in_the_context_stops_the_turn_loop(chat):
    chat, task = chat
    problem = task.train_problem(1)
    call = task.demonstrate(problem, "right", random.Random(0))[0]
    length = len(chat.prompt_ids(problem.messages)) + len(chat.encode(call)) + 1
    rollout, _ = roll_out(Scripted(chat, [(call, True)]), chat, task, [(0, problem)], Limits(2, 1.0, 99, length), ())
    assert rollout.turns == 1 and rollout.reward == 0


def test_turns_are_rewarded_and_anchored(chat):
    """Two siblings: the tool's call and the answer; a wrong call, then a cut turn. The first turns answer the same prompt."""
    chat, task = chat
    problem = task.train_problem(1)
    good, bad = (task.demonstrate(problem, kind, random.Random(0)) for kind in ("right", "wrong_tool"))
    one, two = (Limits(1, 1.0, 60, 400) for _ in range(2))
    right = roll_out(Scripted(chat, [(good[0], True), (good[1], True)]), chat, task, [(0, problem)], one, ())[0]
    wrong = roll_out(Scripted(chat, [(bad[0], True), ("99999", False)]), chat, task, [(0, problem)], two, ())[0]
    assert right.turn_rewards == [1.0, 0.0] and wrong.turn_rewards == [0.0, 0.0] and wrong.truncated
    assert right.anchors[0] == wrong.anchors[0] and right.anchors[1] != wrong.anchors[1]
    lengths = [len(r.policy_positions) for r in (right, wrong)]
    split = [sum(r.turn_ids[p] == 0 for p in r.policy_positions) for r in (right, wrong)]
    for method, first in (("turn", 0.5), ("gigpo", 1.0)):
        own_args = {"turn": "std: false", "gigpo": "gamma: 1.0"}[method]
        credited = credit_of([f"credit={method}", f"credit_args={{{own_args}}}"], [right, wrong], [0.7, -0.7])
        for own, n, cut, sign in zip(credited["token_advantages"], lengths, split, (1, -1), strict=True):
            want = [sign * (0.7 + first)] * cut + [sign * 0.7] * (n - cut)
            assert own.tolist() == pytest.approx(want, abs=1e-6), method


def test_seeds_are_stable():
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2) != seed_of(0, 1, 3)
    assert 0 <= seed_of("x") < 2**31


def _tiny(tied, vocabulary=40):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=32
    )
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes))


@pytest.mark.parametrize("tied", [False, True])
def test_gathered_weights_have_the_state_dicts_names_and_values(tied):
    model = _tiny(tied)
    got = dict(gathered_weights(model))
    assert got.keys() == model.state_dict().keys() and ("lm_head.weight" in got)
    assert all(torch.equal(got[k], v) for k, v in model.state_dict().items())
    assert (tied_head(model) is not None) == tied


def test_buckets_are_whole_layers_in_order():
    names = [[name for name, _ in bucket] for bucket in buckets(list(_tiny(False).named_parameters()))]
    assert len(names) == 5 and names[0] == ["model.embed_tokens.weight"] and names[-1] == ["lm_head.weight"]
    assert all(n.startswith("model.layers.0.") for n in names[1]) and all(n.startswith("model.layers.1.") for n in names[2])


def test_metrics_file_is_cut_at_the_resumed_step(tmp_path):
    cfg = load_config(DEMO, [f"output_dir={tmp_path}"])
    files = RunFiles(cfg, 0)
    for step in range(1, 5):
        files.metrics({"step": step, "reward_mean": step / 10, "seconds": {"rollout": 1.0}})
        files.records(step, SCHEMA.empty_table())
    with files.metrics_path.open("a") as file:
        file.write('{"step": 5, "rew')  # a kill in mid-write
    assert [m["step"] for m in read_metrics(files.metrics_path)] == [1, 2, 3, 4]
    resumed = RunFiles(cfg, 2)
    assert [m["step"] for m in read_metrics(resumed.metrics_path)] == [1, 2]
    assert sorted(p.name for p in (cfg.run_dir / "rollouts").iterdir()) == ["step-00001.parquet", "step-00002.parquet"]


class Quiet(Scripted):
    """A sampler whose every turn is the same."""

    def __init__(self, chat, said):
        super().__init__(chat, [(said, True)] * 9)
        self.wake = self.sleep = lambda *_: None


def test_T3_records_are_a_sample_made_on_their_rank_and_timed(alone, chat, tmp_path, monkeypatch, capsys):
    """Of 160 rollouts 128 are kept, as rows that rank 0 only writes; a token's text is looked up once, not where it stands."""
    chat, task = chat
    shape = ["world_size=1", "rollout.prompts_per_step=20", "eval.every=0", "max_logprob_gap=1000", f"output_dir={tmp_path}"]
    cfg = load_config(DEMO, shape)
    policy = Policy(_tiny(False, len(chat.tokenizer)).eval())
    watch = Watch(cfg, chat, 0, RunFiles(cfg, 0), Yardsticks({"rollout": 2**30, "start": 1.0}, FORTY_TWO))
    sampler = Quiet(chat, "the answer is 12, or 12, or 12")
    trainer = Trainer(cfg, resolve(cfg), task, chat, policy_engine(policy), sampler, watch=watch)
    monkeypatch.setattr(trainer, "push", lambda: None)
    monkeypatch.setattr(trainer, "update", lambda step, experience, passes, sums: sums.mean("updates_skipped", 0, 1))
    gathered, gather, pieces, decode = [], dist.gather_object, [], chat.tokenizer.decode
    monkeypatch.setattr(dist, "gather_object", lambda mine, *more: gathered.append(mine) or gather(mine, *more))
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids, **more: pieces.append(len(ids)) or decode(ids, **more))
    values = trainer.step(1)
    rows = read_records(cfg.run_dir, 1)
    assert [(r["group"], r["sample"]) for r in rows] == [(g, k) for g in range(16) for k in range(8)], "whole groups"
    assert all("".join(r["tokens"]) == r["response"] for r in rows)
    assert [table.to_pylist() for table in gathered] == [rows], "made where the rollouts are"
    assert pieces.count(1) <= len({t for r in rows for t in r["ids"]}) < len(rows[0]["ids"])
    assert values["seconds"]["records"] > 0 and values["seconds"]["step"] >= values["seconds"]["records"]
    watched(values, capsys, watch)


def watched(values, capsys, watch):
    """The same step's numbers: each has its place on the page, and the terminal shows them."""
    assert 0 <= values["idle_share"] <= 1 and values["response_length_p50"] == values["response_length_p99"] > 0
    assert values["memory"].keys() >= {"rollout", "score", "update", "push"} and values["memory_planned"] == {"rollout": 1.0}
    assert values["mfu"]["score"] > 0 and "tokens_per_second_per_gpu" not in values, "no GPU is here"
    page = (ROOT / "docs" / "watch.md").read_text()
    assert not [name for name in values.keys() - {"step"} if f"`{name}`" not in page]
    assert not [name for name in (*MEASURED, *values["seconds"]) if f"`{name}`" not in page]
    watch.report(values | {"grad_norm": 0.1})
    text = " ".join(capsys.readouterr().out.split())
    assert "idle " in text and "MFU score" in text and "memory, GiB a rank at most of those planned: rollout " in text
    assert " of 1.00, write " in text and json.loads(watch.files.metrics_path.read_text())["memory"] == values["memory"]


class Cost:
    """A model of which a pass takes an operation, on a card that does 42 a second."""

    peak = 42.0

    def flops(self, amount, backward):
        assert amount.pairs >= amount.tokens >= amount.predicted, "some passes of a step in which all is alike are empty"
        return 1.0


FORTY_TWO = Cost()


@pytest.mark.parametrize("records, share", [(0, 0), (1, 8), (128, 16), (200, 32), (10**6, 128)])
def test_T3_a_rank_keeps_whole_groups(records, share):
    cfg = load_config("gear_trainer/configs/qwen3_8b.yaml", [f"rollout.records={records}"])
    assert Records(cfg, None).share == share, "of 128 rollouts a rank, on eight ranks"


@pytest.mark.parametrize("method", ["gear", "grpo"])
def test_a_rank_without_a_teaching_trajectory_counts_for_nothing(method):
    sums = Sums()
    credited = credit_of([f"credit={method}"], [_rollout(), _rollout(ids=(7, 8), mask=(1, 1))], [0.0, 0.0], sums)
    assert [x.tolist() for x in credited["weights"]] == [[1.0] * 3, [1.0] * 2]
    assert not any(x.any() for x in credited["token_advantages"])
    assert len(sums._means) == 9 and all(total == count == 0 for total, count in sums._means.values())


def test_weights_that_did_not_arrive_end_the_run_at_its_first_step():
    cfg = load_config(DEMO, ["max_logprob_gap=0.25"])
    for fine in (None, 0.0, 0.25):  # None: no step without a sampled token tells anything
        check_gap(cfg, 1, fine)
    for gap in (0.26, math.inf, math.nan):
        with pytest.raises(SyncError, match=rf"^step 1: .* differ by {gap:.3g} nats .*max_logprob_gap=0.25"):
            check_gap(cfg, 1, gap)


def test_D15_a_peak_of_nan_is_not_hidden(alone):
    sums = Sums()
    for value in (1.0, math.nan, 2.0):
        sums.peak("gap", value)
    assert math.isnan(sums.read(torch.device("cpu"))["gap"])


def test_an_older_run_is_moved_not_overwritten(tmp_path):
    (tmp_path / "run.1").mkdir()
    assert next_free(tmp_path / "run").name == "run.2"


def test_phases_add_up():
    phases = Phases()
    for _ in range(2):
        with phases("score"):
            pass
    assert list(phases.split()) == ["score"] and phases.split() == {}


def test_D1_a_kill_in_the_first_save_leaves_a_checkpoint_or_none(tmp_path):
    """Before `latest` was ever written, a finished folder is what a resume goes on from; of two, somebody took the pointer."""
    cfg = load_config(DEMO, [f"output_dir={tmp_path}", "name=run"])
    root = tmp_path / "run" / "checkpoints"
    (root / "step-7").mkdir(parents=True)
    assert latest_step(cfg) == 0, "its manifest was not written"
    (root / "step-7" / MANIFEST).write_text("{}")
    assert latest_step(cfg) == 7
    (root / "step-8").mkdir()
    (root / "step-8" / MANIFEST).write_text("{}")
    with pytest.raises(ConfigError, match="latest is missing: write one of step-7, step-8 into it"):
        latest_step(cfg)
