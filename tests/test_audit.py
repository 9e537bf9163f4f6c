"""The audit: V against exact enumeration, cuts where V moves, replays, teachers' signals, a file that resumes byte by byte."""

import math
import random
import struct
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from forked_ranks import DEMO

from gear_trainer import cli
from gear_trainer.audit import file
from gear_trainer.audit.rows import deviation_place
from gear_trainer.audit.run import Subject, audit, problems_of
from gear_trainer.audit.signals import Scorer, signals, teachers
from gear_trainer.audit.values import CERTAIN, Estimate, Estimator, Track, estimate, states
from gear_trainer.config import make_config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.hints.siblings import Siblings
from gear_trainer.hints.writer import said
from gear_trainer.hints.wrong_answer import wrong_messages, wrongly_taught
from gear_trainer.rollout import Completion, Engine, Limits, Rollout, roll_out
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks import make_task
from gear_trainer.tasks.base import Deviation, Episode, Message, Outcome, Problem, Reply, Task
from gear_trainer.tasks.chains.deviation import deviation
from gear_trainer.tasks.common import user

WORDS = ["a", "b", "odd", "even", "say", "know", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "<end>"]
END = WORDS.index("<end>")
SPOKEN = (WORDS.index("a"), WORDS.index("b"), END)
TEMPLATE = "{% for m in messages %}{{ m['content'] }} <end> {% endfor %}"

# --- a world that can be enumerated -----------------------------------------------------------------------------------------


class Talk(Task):
    """Three turns of a and b; the tool says how many b there were, and what was said decides, by lot."""

    max_turns = 3
    forgets: ClassVar[bool] = False  # then the tool answers by lot too
    broken: ClassVar[str] = ""  # the problem whose tool is out of order

    def __init__(self, seed=0):
        pass

    def train_problem(self, index):
        return self.held_out(index + 1)[index]

    def held_out(self, count):
        return [self._problem(i) for i in range(count)]

    def _problem(self, i):
        digits = " ".join(str(i))
        return Problem(f"talk-{i}", user(f"say {digits}"), user(f"say {digits} know {i % 2}"), str(i % 2))

    def episode(self, problem):
        return Talking(problem)


class Talking(Episode):
    def __init__(self, problem):
        self.problem, self.said = problem, []

    def step(self, text):
        if self.problem.id == Talk.broken:
            raise ConnectionError("out of order")
        self.said.append(text)
        if text.startswith("b b"):
            return Reply()
        number = random.choice("ab") if Talk.forgets else ("even", "odd")[text.count("b") % 2]
        return Reply([Message("tool", number)])

    def outcome(self, end):
        success = random.Random(f"{self.problem.id}/{self.said}/{end}").random() < 0.5
        return Outcome(2.0 * success, success)


@cache
def law(ids):
    """The policy: what follows these tokens, with its probability. In one state of four it is as good as certain."""
    rng = random.Random(struct.pack(f"{len(ids)}i", *ids))
    if rng.random() < 0.25:
        sure, *others = rng.sample(SPOKEN, 3)
        return {sure: 1 - 2e-6, **dict.fromkeys(others, 1e-6)}
    weights = [rng.random() + 0.05 for _ in SPOKEN]
    return {token: w / sum(weights) for token, w in zip(SPOKEN, weights, strict=True)}


class Tabular(Engine):
    """Samples from the law, token by token, by each request's seed. It is interrupted before the batch that `until` counts to."""

    until: ClassVar[int | None] = None
    batches: ClassVar[int] = 0

    def __init__(self, cfg=None, model_path=""):
        pass

    def generate(self, requests):
        if Tabular.until is not None:
            Tabular.until -= 1
            if Tabular.until < 0:
                raise KeyboardInterrupt
        Tabular.batches += 1
        return [self.turn(q) for q in requests]

    def turn(self, q):
        rng, ids, logprobs = random.Random(q.seed), [], []
        while len(ids) < q.max_tokens and END not in ids:
            odds = law((*q.prompt_ids, *ids))
            ids += rng.choices(list(odds), list(odds.values()))
            logprobs.append(math.log(odds[ids[-1]]))
        return Completion(ids, logprobs, ids[-1] == END)

    def push(self, weights):
        raise AssertionError("an audit pushes nothing")


LIMITS = Limits(group_size=24, temperature=1.0, max_new_tokens=3, max_model_len=64, max_failed_share=0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer of these words, and a Qwen3 of one layer that nobody trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16, "initializer_range": 0.5}
    config = Qwen3Config(vocab_size=len(WORDS), num_attention_heads=2, num_key_value_heads=1, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(model):
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(model))


@pytest.fixture(autouse=True)
def fresh():
    Tabular.until, Tabular.batches, Talk.forgets, Talk.broken = None, 0, False, ""


def exact(chat, problem):
    """V after every beginning of a response, by enumeration of all that may follow; keys are tuples of response ids."""
    prompt, found = tuple(chat.prompt_ids(problem.messages)), {}

    def earned(said, end):
        return random.Random(f"{problem.id}/{said}/{end}").random() < 0.5

    def value(ids, said, turn):
        if (*ids, said, turn) in found:
            return found[*ids, said, turn]
        if turn and turn[-1] == END:
            text = chat.tokenizer.decode(turn[:-1])
            after = [*said, text]
            if text.startswith("b b"):
                v = earned(after, "done")
            elif len(after) == Talk.max_turns:
                v = earned(after, "turns")
            else:
                reply = chat.observation_ids([Message("tool", "odd" if text.count("b") % 2 else "even")])
                v = value((*ids, *reply), tuple(after), ())
        elif len(turn) == LIMITS.max_new_tokens:
            v = earned(list(said), "length")
        else:
            v = sum(p * value((*ids, token), said, (*turn, token)) for token, p in law((*prompt, *ids)).items())
        found[*ids, said, turn] = float(v)
        return found[*ids, said, turn]

    value((), (), ())
    return {key[:-2]: v for key, v in found.items() if key[-1] or not key[:-2]}


def sampled(chat, task, problems, limits=LIMITS):
    return roll_out(Tabular(), chat, task, list(enumerate(task.held_out(problems))), limits, ("test",))


def estimator(chat, task, continuations, limits=LIMITS):
    return Estimator(Tabular(), chat, task, limits, ("audit", "continued"), continuations, at_once=256)


# --- values ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(chat):
    """Trajectories of 14 problems with V behind each token that was not certain; M, and the exact values by problem."""
    task, problems, many = Talk(), 50, 16
    rollouts = sampled(chat, task, problems, replace(LIMITS, group_size=8))
    truth = [exact(chat, problem) for problem in task.held_out(problems)]
    return rollouts, estimate(rollouts, estimator(chat, task, many), stride=1), many, truth


def test_values_are_those_of_exact_enumeration(measured):
    """Behind 500 different beginnings and more: within 3 standard errors as often as a binomial is, and without bias."""
    rollouts, values, many, truth = measured
    found = {}
    for r, v in zip(rollouts, values, strict=True):
        found[r.group, ()] = v.v0
        for own in states(r)[1:]:
            if own[-1] != r.policy_positions[-1]:  # whose V is the success itself
                found[r.group, tuple(r.ids[: own[-1] + 1])] = v.value[own[-1]]
    assert len(found) >= 500 and not any(v.lost for v in values)
    outside, expected, scores = 0, 0.0, []
    for (group, ids), value in found.items():
        v = truth[group][ids]
        error = math.sqrt(v * (1 - v) / many)
        if error < 1e-2:  # a certain token's other outcomes are all that is left of doubt
            assert value == round(v)
            continue
        chances = [math.comb(many, k) * v**k * (1 - v) ** (many - k) for k in range(many + 1)]
        expected += sum(p for k, p in enumerate(chances) if abs(k / many - v) > 3 * error)
        outside += abs(value - v) > 3 * error
        assert abs(value - v) < 5 * error
        scores.append((value - v) / error)
    assert len(scores) > 400 and outside <= expected + 2 * math.sqrt(expected), (outside, expected)
    assert abs(sum(scores)) < 3 * math.sqrt(len(scores)), "no bias"
    assert sum(z * z for z in scores) / len(scores) == pytest.approx(1, abs=0.2), "the spread of a binomial"


def test_credit_sums_to_the_outcome_less_the_prompts_value(measured):
    rollouts, values, _, _ = measured
    certain = 0
    for r, v in zip(rollouts, values, strict=True):
        along = [v.v0, *(v.value[place] for place in r.policy_positions)]
        assert sum(b - a for a, b in pairwise(along)) == pytest.approx(float(r.success) - v.v0) and along[-1] == r.success
        assert all(math.isnan(x) != own for x, own in zip(v.value, r.mask, strict=True))
        for place, (before, after) in zip(r.policy_positions[:-1], pairwise(along), strict=False):
            if r.sampler_logprobs[place] > CERTAIN:
                certain += 1
                assert before == after, "a certain token shares its predecessor's V"
    assert certain > 100
    ends = Counter(r.status.value for r in rollouts)
    assert all(ends[end] > 10 for end in ("done", "turns", "length")), ends


def test_equal_beginnings_are_continued_once_and_seeds_do_not_depend_on_company(chat):
    task = Talk()
    rollouts = sampled(chat, task, 2, replace(LIMITS, group_size=4))
    whole = estimate(rollouts, together := estimator(chat, task, 8), stride=1)
    alone = [estimate(rollouts[at : at + 4], estimator(chat, task, 8), stride=1) for at in (0, 4)]
    assert repr(whole) == repr([*alone[0], *alone[1]])
    asked = {(r.group, tuple(r.ids[: own[-1] + 1])) for r in rollouts for own in states(r)[1:-1]} | {(0, ()), (1, ())}
    assert together.made == len(asked) < sum(len(states(r)) - 1 for r in rollouts)
    lockstep = replace(LIMITS, schedule="continuous")
    assert repr(estimate(rollouts, estimator(chat, task, 8, lockstep), stride=1)) == repr(whole)


class Planted:
    """Knows V of each state; `lost`: that it cannot continue. Counts what it is asked for."""

    def __init__(self, v, lost=()):
        self.v, self.lost, self.made = v, lost, 0

    def __call__(self, cuts):
        self.made += len(cuts)
        return [None if cut in self.lost else Estimate.of(round(64 * self.v[cut]), 64) for _, cut in cuts]

    def check(self):
        pass


def straight(length, success, logprob=-1.0):
    """A trajectory of one turn, no token of which was certain: state i is what stands behind i tokens."""
    ids = list(range(length))
    return Rollout(None, 0, 0, [1], [1], ids, [True] * length, [logprob] * length, [0] * length, 1, success=success)


@pytest.mark.parametrize("drop", (1, 2, 37, 99, 100))
def test_cuts_gather_where_the_value_moves(drop):
    truth = [0.875] * drop + [0.0] * (101 - drop)
    (found,) = estimate([straight(100, False)], planted := Planted(truth), stride=20)
    before = [found.v0, *found.value]
    assert max(range(100), key=lambda i: before[i] - before[i + 1]) == drop - 1, "at that very token"
    assert before == pytest.approx(truth[:100] + [0.0]) and planted.made <= 5 + 5, "first cuts, then halves of 20"


def test_between_cuts_that_agree_the_value_is_even_and_a_lost_cut_is_left_out():
    truth = [0.5 + 0.01 * (i // 10) for i in range(31)]
    (even,) = estimate([straight(31, True)], Planted(truth), stride=10)
    assert even.value[4] == pytest.approx((even.v0 + even.value[9]) / 2)
    truth = [1.0] * 9 + [0.0] * 8
    (found,) = estimate([straight(16, False)], Planted(truth, lost=(8, 12)), stride=4)
    assert found.lost == 2 and found.value[7] == pytest.approx((found.value[6] + found.value[8]) / 2)
    assert estimate([straight(16, False)], Planted(truth, lost=(0,)), stride=4) == [None], "without V_0 there is no credit"


def test_a_trajectory_without_doubt_and_one_without_tokens():
    (found,) = estimate([straight(3, True, logprob=0.0)], Planted([0.75]), stride=4)
    assert found.v0 == 0.75 and found.value == [0.75, 0.75, 1.0]
    (found,) = estimate([straight(0, False)], Planted([0.0]), stride=4)
    assert found == (0.0, [], 1, 0)


def test_the_first_cuts_are_the_prompt_the_ends_of_turns_and_every_so_many_th():
    r = straight(10, True)
    r.turn_ids = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    r.sampler_logprobs[3] = 0.0  # the second turn's first token is certain: it belongs to the first turn's last state
    track = Track(r, 4)
    assert [own[-1] for own in track.states[1:]] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert track.wanted() == [0, 3, 4, 6, 8] and [track.cut(s) for s in (0, 3, 6)] == [0, 4, 7]


def test_an_environment_that_answers_otherwise_ends_the_audit(chat):
    task = Talk()
    rollouts = sampled(chat, task, 3)
    Talk.forgets = True
    with pytest.raises(RunError, match=r"of \d+ cuts could not be continued.*replay: the environment answered otherwise"):
        estimate(rollouts, estimator(chat, task, 4), stride=1)
    tolerant = estimate(rollouts, estimator(chat, task, 4, replace(LIMITS, max_failed_share=1.0)), stride=1)
    assert sum(v.lost for v in tolerant) > 20
    for r, v in zip(rollouts, tolerant, strict=True):
        assert all(math.isnan(x) != own for x, own in zip(v.value, r.mask, strict=True))


# --- signals --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(configuration(model), str(model))


def group_of(chat, index=3, **limits):
    return sampled(chat, Talk(), index + 1, replace(LIMITS, **limits))[-(limits.get("group_size", 24)) :]


def test_each_teacher_sees_what_it_should(chat):
    group = group_of(chat, group_size=6)
    problem, text = group[0].problem, chat.tokenizer.decode
    found = teachers(chat, Talk(), group, Talk().held_out(6))
    assert {text(ids) for ids in found["truth"]} == {"say 3 know 1 <end>"}
    assert {text(ids) for ids in found["wrong"]} == {"say 3 know 0 <end>"}, "the first problem's answer, this one's question"
    assert found["nothing"] == [r.prompt_ids for r in group]
    successes = [r for r in group if r.success]
    assert 0 < len(successes) < len(group)
    for i, prompt in enumerate(found["sibling"]):
        others = [r for r in group[i + 1 :] + group[:i] if r.success]
        assert prompt == (Siblings(chat).prompt(problem, said(chat, others[0])) if others else None)
    blind = Talk()
    blind.shows_truth = False
    assert set(teachers(chat, blind, group, [])["truth"]) == {None} == set(teachers(chat, Talk(), group, [problem])["wrong"])


def test_a_wrong_hint_is_what_the_task_shows_for_another_problem():
    chains = make_task("chains", 0)
    first, second = chains.held_out(2)
    (told,) = wrong_messages(first, [second])
    assert first.messages[0]["content"] in told["content"] and second.answer in told["content"]
    assert told["content"].replace(second.answer, first.answer) == first.teacher_messages[0]["content"]
    assert wrong_messages(first, [first, second]) == [told] and wrong_messages(first, [first]) is None
    assert wrong_messages(first, [replace(second, teacher_messages=user("a hint without the question"))]) is None
    third, fourth = map(chains.train_problem, (3, 4))
    shown = wrongly_taught(chains, 3)
    assert fourth.answer in shown.teacher_messages[0]["content"] and third.answer not in shown.teacher_messages[0]["content"]
    assert replace(shown, teacher_messages=third.teacher_messages) == third


def test_signals_are_those_of_the_models_own_logits(chat, model, scorer):
    """Against transformers' logits and log_softmax in float64."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    group = group_of(chat, group_size=4)
    found = signals(scorer, chat, Talk(), group, Talk().held_out(6))
    assert set(found) == {"logprobs", "entropy"} | {f"{name}/{t}" for name in file.TEACHER_COLUMNS for t in file.TEACHERS}
    prompts = teachers(chat, Talk(), group, Talk().held_out(6))

    def rows(prompt, r):
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[torch.tensor(r.mask)], torch.tensor(r.ids)[torch.tensor(r.mask)]

    close = {"rtol": 1e-4, "atol": 2e-5}
    for i, r in enumerate(group):
        (p, ids) = rows(r.prompt_ids, r)
        torch.testing.assert_close(found["logprobs"][i].double(), p.gather(1, ids[:, None])[:, 0], **close)
        torch.testing.assert_close(found["entropy"][i].double(), -(p.exp() * p).sum(1), **close)
        for teacher in file.TEACHERS:
            if prompts[teacher][i] is None:
                assert all(found[f"{name}/{teacher}"][i] is None for name in file.TEACHER_COLUMNS)
                continue
            q, _ = rows(prompts[teacher][i], r)
            want = {
                "teacher_logprobs": q.gather(1, ids[:, None])[:, 0], "teacher_entropy": -(q.exp() * q).sum(1),
                "reverse_kl": (p.exp() * (p - q)).sum(1), "forward_kl": (q.exp() * (q - p)).sum(1),
            }  # fmt: skip
            for name, values in want.items():
                torch.testing.assert_close(found[f"{name}/{teacher}"][i].double(), values, **close)
        assert found["reverse_kl/nothing"][i].abs().max() < 1e-6 < found["reverse_kl/truth"][i].max()


# --- the deviation --------------------------------------------------------------------------------------------------------


def test_the_deviation_is_the_token_that_holds_its_character():
    """Tokens of three characters, and one that ends a turn; a deviation behind the text is that token."""
    task = make_task("chains", 0, {"steps": 3})
    problem = next(p for p in map(task.train_problem, range(99)) if p.data["chain"].gold[-1].name == "rm")
    chain, right = problem.data["chain"], task.demonstrate(problem, "right", random.Random(0))
    pieces = ["", "<end>"]

    def trajectory(turns, last_is_cut=False):
        r = Rollout(problem, 0, 0, [1], [1])
        for at, text in enumerate(turns):
            parts = [text[i : i + 3] for i in range(0, len(text), 3)]
            first = len(pieces)
            pieces.extend(parts)
            ids = list(range(first, len(pieces)))
            was_cut = last_is_cut and at == len(turns) - 1
            ids += [] if was_cut else [1]
            r.append(ids, [-1.0] * len(ids))
            r.turns += not was_cut
            if at < len(turns) - 1:
                r.append([0, 0], None)
        return r

    chat = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids)))
    assert deviation_place(chat, task, trajectory(right)) == file.NO_DEVIATION
    assert deviation_place(chat, make_task("mathapi", 0), trajectory(right)) == file.UNKNOWN_DEVIATION
    wrong = right[-2].replace(chain.right[-1], chain.wrong[-1])
    turns = [*right[:-2], wrong, right[-1]]
    r = trajectory(turns)
    place = deviation_place(chat, task, r)
    turn, characters = deviation(chain, turns, task.max_turns)
    own = [p for p in r.policy_positions if r.turn_ids[p] == turn]
    at = sum(len(pieces[r.ids[p]]) for p in own if p < place)
    assert turn == len(right) - 2 and at <= characters < at + len(pieces[r.ids[place]])
    short = trajectory([right[0], right[-1]])  # an end where a call was due: its first token
    assert deviation_place(chat, task, short) == [p for p in short.policy_positions if short.turn_ids[p] == 1][0]
    empty = trajectory([right[0], ""])  # the end of a turn that says nothing
    assert pieces[empty.ids[deviation_place(chat, task, empty)]] == "<end>"
    cut = trajectory([right[0], wrong], last_is_cut=True)
    assert deviation(chain, [right[0], wrong], task.max_turns) != Deviation(1, 0)
    assert r.mask[place] and cut.ids[-1] != 1 and deviation_place(chat, task, cut) in cut.policy_positions


# --- the file, and the command --------------------------------------------------------------------------------------------


def configuration(model, *overrides):
    given = {
        "name": "a", "world_size": 1, "model": {"path": str(model), "dtype": "float32"}, "task": "test_audit:Talk",
        "rollout": {"engine": "test_audit:Tabular", "max_new_tokens": 3, "max_model_len": 64, "turn_timeout": None},
        "audit": {"problems": 3, "samples": 4, "continuations": 8, "stride": 2}, "max_logprob_gap": 100.0,
    }  # fmt: skip
    return make_config(given, list(overrides))


def run(cfg, chat, scorer, out, step=7):
    made = Counter()

    def make(name, what):
        made[name] += 1
        return what

    subject = Subject(cfg.model.path, step, lambda: make("engine", Tabular()), lambda: make("scorer", scorer))
    return audit(cfg, problems_of(cfg, Talk(), chat), subject, out), made


@pytest.fixture(scope="module")
def whole(model, chat, scorer, tmp_path_factory):
    """The file of an audit that nothing interrupted, what it made, and the batches that it sampled."""
    Tabular.batches = 0
    path, made = run(configuration(model), chat, scorer, tmp_path_factory.mktemp("whole") / "audit")
    return path, made, Tabular.batches


def test_the_file_holds_what_was_measured(whole):
    path, made, _ = whole
    assert path.name == "audit.parquet" and made == {"engine": 1, "scorer": 1} and not (path.parent / "parts").exists()
    table, about = file.read(path)
    rows = table.to_pylist()
    assert [(row["group"], row["sample"]) for row in rows] == [(g, s) for g in range(3) for s in range(4)]
    assert {(row["step"], row["value_samples"], row["deviation"]) for row in rows} == {(7, 8, file.UNKNOWN_DEVIATION)}
    known = {"task": "test_audit:Talk", "step": 7, "M": 8, "seed": 0, "temperature": 1.0, "cuts_lost": 0, "problems_left_out": 0}
    assert known.items() <= about.items() and about["versions"]["torch"] and about["date"] and about["cuts"] > 16
    for row in rows:
        r = SimpleNamespace(**row)
        assert r.tokens == [WORDS[i] for i in r.ids] and len(r.ids) == len(r.mask) == len(r.turn) == len(r.value)
        assert all((turn >= 0) == own for turn, own in zip(r.turn, r.mask, strict=True)) and r.reward == 2 * r.success
        along = [r.v0, *(v for v, own in zip(r.value, r.mask, strict=True) if own)]
        assert sum(b - a for a, b in pairwise(along)) == pytest.approx(r.success - r.v0, abs=1e-6)
        for name in ("logprobs", "entropy", "reverse_kl/truth", "teacher_entropy/wrong", "forward_kl/nothing"):
            assert all(math.isnan(x) != own for x, own in zip(row[name], r.mask, strict=True)), name
    by_group = [rows[i : i + 4] for i in range(0, 12, 4)]
    for group in by_group:
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-5)
        assert len({row["v0"] for row in group}) == 1
        for row in group:
            others = sum(row["success"] for row in group) - row["success"]
            assert (row["reverse_kl/sibling"] is None) == (others == 0)


@pytest.mark.parametrize("share", (0.0, 0.1, 0.7))
def test_an_interrupted_audit_goes_on_to_the_same_bytes(model, chat, scorer, whole, tmp_path, share, capsys):
    cfg, (path, _, batches), out = configuration(model), whole, tmp_path / "audit"
    Tabular.until = int(share * batches)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, chat, scorer, out)
    assert not (out / path.name).exists()
    Tabular.until, Tabular.batches = None, 0
    again, _ = run(cfg, chat, scorer, out)
    assert again.read_bytes() == path.read_bytes()
    assert ("going on after" in capsys.readouterr().out) == (Tabular.batches < batches) == (share == 0.7)
    Tabular.batches = 0
    _, made = run(cfg, chat, scorer, out)
    assert not Tabular.batches and not made, "nothing is left to do, and no engine is needed"


def test_other_settings_are_refused_by_name(model, chat, scorer, tmp_path):
    run(configuration(model, "audit.problems=1"), chat, scorer, tmp_path / "audit")
    with pytest.raises(ConfigError, match=r"holds an audit of other settings \(M: 8 -> 4\): give another --out"):
        run(configuration(model, "audit.problems=1", "audit.continuations=4"), chat, scorer, tmp_path / "audit")


def test_an_engine_of_other_weights_ends_the_audit(model, chat, scorer, tmp_path):
    with pytest.raises(RunError, match="log-probs differ from the trainer's by .* nats a token"):
        run(configuration(model, "max_logprob_gap=0.5"), chat, scorer, tmp_path / "audit")


def test_a_broken_environment_is_counted_or_ends_the_audit(model, chat, scorer, tmp_path):
    Talk.broken = "talk-1"
    with pytest.raises(RunError, match="rollouts failed twice.* then the same command goes on"):
        run(configuration(model), chat, scorer, tmp_path / "audit")
    path, _ = run(configuration(model, "rollout.max_failed_share=1"), chat, scorer, tmp_path / "audit")
    table, about = file.read(path)
    assert set(table["problem"].to_pylist()) == {"talk-0", "talk-2"} and about["problems_left_out"] == 1


def test_a_file_of_something_else_is_refused(tmp_path):
    (path := tmp_path / "x.parquet").write_text("no such file")
    with pytest.raises(ConfigError, match="give a file that `gear-trainer audit` wrote"):
        file.read(path)


def test_the_command_wants_a_run_or_a_configuration(capsys, tmp_path):
    for given in (["audit"], ["audit", "--run", "x", "--config", DEMO], ["audit", "--config", DEMO, "--step", "3"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(given)
        assert ended.value.code == 2
    assert cli.main(["audit", "--run", str(tmp_path)]) == 2
    assert cli.main(["audit", "--config", DEMO, "audit.sample=3"]) == 2
    said = capsys.readouterr().err
    assert "no such config file" in said and "unknown key audit.sample: did you mean 'samples'?" in said


def test_the_command_audits_a_configurations_model(model, tmp_path, capsys):
    config = configuration(model, f"output_dir={tmp_path}", "audit.problems=2").model_dump(mode="json", exclude_unset=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["audit", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert f"written: {tmp_path}/out/audit.parquet" in capsys.readouterr().out
    table, about = file.read(tmp_path / "out" / "audit.parquet")
    assert table.num_rows == 8 and about["step"] == 0 and about["model"] == model.name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_warm_start_is_audited_with_vllm(server, tmp_path):
    """The demonstration's model and mathapi, as a user would: the engine's log-probs are the scorer's, and the truth helps."""
    given = ["--config", DEMO, "--out", str(tmp_path / "out"), "audit.problems=2", "audit.samples=4", "audit.continuations=8"]
    ranks = server.call(tmp_path / "log", "drill_patches:audits", *given, ranks=1)
    assert ranks.wait(3200) == [0], ranks.text()[-6000:]
    table, about = file.read(tmp_path / "out" / "audit.parquet")
    rows = table.to_pylist()
    assert len(rows) == 8 and about["cuts_lost"] == 0 and about["problems_left_out"] == 0
    for row in rows:
        assert all(0 <= v <= 1 for v, own in zip(row["value"], row["mask"], strict=True) if own)
        assert [v for v, own in zip(row["value"], row["mask"], strict=True) if own][-1] == row["success"]
    assert any(-1 in row["turn"] for row in rows), "a reply is no turn of the policy"
    teacher = [sum(x for x, own in zip(row["teacher_logprobs/truth"], row["mask"], strict=True) if own) for row in rows]
    student = [sum(x for x, own in zip(row["logprobs"], row["mask"], strict=True) if own) for row in rows]
    right = [t - s for t, s, row in zip(teacher, student, rows, strict=True) if row["success"]]
    assert right and sum(right) > 0, "who sees the truth finds right answers likelier"
