"""benchmarks/credit_truth on trajectories whose truth is planted: each measure by hand, by chance level, and at its best."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.credit_truth import evidence, synthetic
from benchmarks.credit_truth.__main__ import main, scored
from benchmarks.credit_truth.bootstrap import Draws, figure
from benchmarks.credit_truth.measures import MEASURES, Assigned, gradient
from benchmarks.credit_truth.methods import LEFT_OUT, Entry, entries, oracle, oracle_same_sign, tilt
from benchmarks.credit_truth.rollouts import CORRECTED, load
from benchmarks.credit_truth.scoring import score, teaching
from benchmarks.credit_truth.sweeps import GRIDS, sweep
from gear_kernels import Gear
from gear_kernels.methods import METHODS, Grpo
from gear_trainer.audit import file
from gear_trainer.errors import ConfigError

# --- trajectories -------------------------------------------------------------------------------------------------------


def trajectory(value, advantage, **given):
    """A row of the file by hand: V after each token; all are policy tokens of one turn unless `given` says otherwise."""
    n, success = len(value), value[-1] == 1
    said = {name: [0.0] * n for name in file.LISTS[7:]}
    row = {"problem": "p", "group": 0, "sample": 0, "step": 0, "reward": float(success), "success": success, "end": "done"}
    row |= {"advantage": advantage, "v0": 0.5, "value_samples": 1_000_000, "deviation": -1, "value": value, "ids": list(range(n))}
    row |= {"tokens": ["x"] * n, "mask": [True] * n, "turn": [0] * n, "logprobs": [-1.0] * n, "entropy": [1.0] * n}
    return row | said | given


def written(folder, rows, name="hand"):
    path = folder / f"{name}.parquet"
    file.write(path, {column: [row[column] for row in rows] for column in file.SCHEMA.names}, synthetic.ABOUT)
    return path


def value_of(name, rollouts, advantages, onsets=None):
    measure = MEASURES[name]
    return float(measure.value(measure.parts(rollouts, Assigned(np.asarray(advantages, dtype=float), onsets)).sum(0)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """96 trajectories of 80 tokens, values exact; and the same kind with values of 64 continuations each."""
    found, folder = {}, tmp_path_factory.mktemp("planted")
    for name, right, many in (("exact", 0.8, 0), ("sampled", 0.65, 64)):
        path = folder / f"{name}.parquet"
        file.write(path, synthetic.columns(problems=12, turn=20, right=right, many=many, seed=1), synthetic.ABOUT)
        found[name] = path
    return found


@pytest.fixture(scope="module")
def exact(planted):
    return teaching(load(planted["exact"])[0])


# --- the file -----------------------------------------------------------------------------------------------------------


def test_the_truth_sums_to_the_outcome_less_what_was_expected(planted):
    for path in planted.values():
        rollouts, _ = load(path)
        np.testing.assert_allclose(rollouts.sums(rollouts.truth), rollouts.rows["success"] - rollouts.rows["v0"], atol=1e-5)


def test_observation_tokens_are_left_out_and_the_deviation_is_counted_in_policy_tokens(tmp_path):
    nan = float("nan")
    row = trajectory([0.5, nan, nan, 0.0, 0.0], -1.0, mask=[True, False, False, True, True], turn=[0, -1, -1, 1, 1], deviation=3)
    rollouts, about = load(written(tmp_path, [trajectory([1.0], 1.0), row]))
    assert about["task"] == "synthetic" and rollouts.lengths.tolist() == [1, 3]
    assert rollouts.truth.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert rollouts.rows["deviation"].tolist() == [-1, 1] and rollouts.deviation.tolist() == [-1, 2]


def test_states_are_prefixes_and_anchors_are_what_a_turn_answers(tmp_path):
    split = {"mask": [True, False, True, True], "turn": [0, -1, 1, 1], "value": [0.5, float("nan"), 0.5, 1.0]}
    a, b = ({"ids": ids, **split} for ids in ([1, 9, 2, 3], [1, 9, 5, 3]))
    c, other = {"ids": [4, 9, 2, 3], **split}, {"ids": [1, 9, 2, 3], "problem": "q", **split}
    rollouts, _ = load(written(tmp_path, [trajectory([0, 0, 0, 1.0], 1.0) | row for row in (a, b, c, other)]))
    state, anchor = (rollouts.tokens[name].reshape(4, 3) for name in ("state", "anchor"))
    same = state[:, None] == state[None]  # [row, row, place]
    assert same[0, 1].tolist() == [True, True, False]  # they part at the third token, and are in other states behind it
    assert same[0, 2].tolist() == [True, False, False] and not same[0, 3].any()
    assert len(set(state.ravel().tolist())) == 4 + 3 + 2  # 9 is in every state behind it: no two places of a row are alike
    assert (anchor[:3, 0] == anchor[0, 0]).all() and anchor[3, 0] != anchor[0, 0]  # the prompt
    assert (anchor[:, 1:] == anchor[0, 1]).all() and anchor[0, 1] != anchor[0, 0]  # the reply, wherever it was given


def test_a_standard_error_is_that_of_two_shares_and_the_outcome_has_none(tmp_path):
    rollouts, _ = load(written(tmp_path, [trajectory([0.3, 1.0, 1.0], 1.0, value_samples=64)]))
    v0, v1, v2 = ((s * 64 + 1) / 66 for s in (0.5, 0.3, 1.0))
    spread = [np.sqrt(v * (1 - v) / 64) for v in (v0, v1, v2)]
    both = [np.hypot(spread[0], spread[1]), np.hypot(spread[1], spread[2]), spread[2]]
    np.testing.assert_allclose(rollouts.error, both, rtol=1e-6)
    assert rollouts.decided.tolist() == [False, True, False]  # -0.2 and 0.7 against 0.25 and 0.18
    draws = np.random.default_rng(0).binomial(64, [0.5, 0.3], size=(20_000, 2)) / 64
    assert np.isclose(np.diff(draws).std(), rollouts.error[0], rtol=0.03)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"value": [0.5, 0.5]}, "it is not its success"),
        ({"value": [float("nan"), 1.0]}, "value: NaN on a policy token of trajectory 1"),
        ({"entropy": [1.0]}, "entropy: a list of trajectory 1 is not as long as its ids"),
        ({"value_samples": 0}, "value_samples"),
        ({"deviation": 2}, "deviation: 2 of trajectory 1 is no policy token"),
        ({"reverse_kl/truth": [float("nan"), 0.0]}, "reverse_kl/truth: NaN"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(tmp_path, change, said):
    path = written(tmp_path, [trajectory([0.5, 1.0], 1.0), trajectory([0.5, 1.0], 1.0) | change])
    with pytest.raises(ConfigError, match=said):
        load(path)


class Broken:
    """A user's method that fails when it runs."""

    needs = ()

    def apply(self, tokens):
        raise ValueError("no idea")


def test_bad_arguments_end_with_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "text.parquet").write_text("no Parquet")
    flat, empty = written(tmp_path, [trajectory([0.5, 1.0], 0.0)]), written(tmp_path, [], "empty")
    one = written(tmp_path, [trajectory([0.5, 1.0], 1.0)], "one")
    for arguments, said in (
        ([str(tmp_path / "none.parquet")], "none.parquet"),
        ([str(tmp_path / "text.parquet")], "gear-trainer audit"),
        ([str(empty)], "no trajectory with a policy token"),
        ([str(one), "--method", "test_credit_truth:Broken"], "--method test_credit_truth:Broken: ValueError: no idea"),
        ([str(flat)], "every trajectory's advantage is 0"),
        ([str(flat), "--method", "nowhere:Nothing"], "--method nowhere:Nothing"),
        ([str(flat), "--method", "json:JSONDecoder"], "--method json:JSONDecoder"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


# --- measures, by hand --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A* of the first, a success: -0.25, 0, 0.75; of the second, a failure of two turns: 0.25, -0.75, 0, 0."""
    lost = trajectory([0.75, 0.0, 0.0, 0.0], -2.0, turn=[0, 0, 1, 1], deviation=1, ids=[9, 8, 7, 6])
    return load(written(tmp_path_factory.mktemp("pair"), [trajectory([0.25, 0.25, 1.0], 1.0), lost]))[0]


def test_signs_by_hand(pair):
    assert pair.decided.tolist() == [True, False, True, True, True, False, False]
    assert value_of("sign", pair, [1, 1, 1, -2, -2, -2, -2]) == 0.5  # of -0.25, 0.75, 0.25, -0.75 two agree
    assert value_of("sign", pair, [-1, 0, 0, 0, -2, 5, 5]) == (1 + 0.5 + 0.5 + 1) / 4  # a 0 counts one half
    # means 2 and -2: the first goes down, the third up, the fourth up, the fifth nowhere
    assert value_of("sign_centred", pair, [1, 2, 3, -1, -2, -4, -1]) == (1 + 1 + 1 + 0.5) / 4


def test_weights_on_the_call_by_hand(pair):
    advantages = [1, 1, 1, -4, -8, -2, -2]  # A = -2, so weights 2 and 4 on the deviation's turn, 1 and 1 on the rest
    assert value_of("call_weight", pair, advantages) == 3 and value_of("rest_weight", pair, advantages) == 1
    assert value_of("call_contrast", pair, advantages) == 0.5


@pytest.mark.parametrize("away, found", [(0, 1.0), (2, 1.0), (-1, 1.0), (3, 0.0)])
def test_an_onset_within_two_tokens_of_the_deviation_finds_it(exact, away, found):
    onsets = np.zeros(len(exact.truth), dtype=bool)
    onsets[exact.deviation[exact.deviation >= 0] + away] = True
    assert value_of("recall", exact, exact.truth, onsets) == value_of("precision", exact, exact.truth, onsets) == found


def test_onsets_elsewhere_cost_precision_and_onsets_of_successes_do_not(exact):
    onsets = np.zeros(len(exact.truth), dtype=bool)
    lost = exact.deviation[exact.deviation >= 0]
    onsets[lost], onsets[lost - 5], onsets[exact.over_tokens(exact.rows["success"]) > 0] = True, True, True
    assert value_of("recall", exact, exact.truth, onsets) == 1 and value_of("precision", exact, exact.truth, onsets) == 0.5


def test_rank_correlation_is_scipys_with_ties(exact):
    x = np.random.default_rng(0).integers(5, size=len(exact.truth)).astype(float)
    own = [spearmanr(x[a:b], exact.truth[a:b]).statistic for a, b in zip(exact.bounds, exact.bounds[1:], strict=False)]
    np.testing.assert_allclose(value_of("spearman", exact, x), np.mean(own), atol=1e-9)


def test_the_gradient_is_autograds_of_a_table_policy(tmp_path):
    """6 samples of a policy over 3 tokens with a row of logits for each prefix; x are any token advantages."""
    torch.manual_seed(0)
    logits, rows = {}, []
    for _ in range(6):
        prefix, logprobs = (), []
        for _ in range(3):
            row = logits.setdefault(prefix, torch.randn(3, dtype=torch.float64, requires_grad=True)).detach().log_softmax(0)
            token = int(torch.multinomial(row.exp(), 1))
            logprobs.append(float(row[token]))
            prefix += (token,)
        rows.append(trajectory([0.5, 0.5, 1.0], 1.0, ids=list(prefix), logprobs=logprobs))
    rollouts, _ = load(written(tmp_path, rows))
    x = np.random.default_rng(0).normal(size=18)
    terms, sampled = [], set()
    for i, row in enumerate(rows):
        for t, token in enumerate(row["ids"]):
            prefix = tuple(row["ids"][:t])
            terms.append(x[3 * i + t] * logits[prefix].log_softmax(0)[token])
            sampled.add((prefix, token))
    sum(terms).backward()
    truth = sorted(float(logits[prefix].grad[token]) for prefix, token in sampled)
    assert len(truth) < 18  # prefixes are shared
    np.testing.assert_allclose(sorted(gradient(rollouts, x)), truth, atol=1e-6)


def test_alignment_and_gain_by_hand(tmp_path):
    """Two problems of one token each, p = e^-1, so g = x (1 - p): x = (1, -1) against A* = (0.5, -0.5) and then (0.5, 0.5)."""
    won, lost = trajectory([1.0], 1.0), trajectory([0.0], -1.0)
    rollouts, _ = load(written(tmp_path, [won | {"problem": "a"}, lost | {"problem": "b"}]))
    scale = (1 - np.exp(-1)) ** 2
    assert value_of("alignment", rollouts, [1, -1]) == pytest.approx(1)
    assert value_of("alignment", rollouts, [1, 1]) == pytest.approx(0)
    gains = np.array([1.0, 3.0]) * 0.5 * scale  # x = (1, -3)
    assert value_of("snr", rollouts, [1, -3]) == pytest.approx(gains.mean() / gains.std())
    assert np.isnan(value_of("snr", rollouts, [1, -1]))  # no spread


# --- best and chance ----------------------------------------------------------------------------------------------------

AT_BEST = ("sign", "sign_centred", "spearman", "precision", "recall", "call_contrast", "alignment")


@pytest.mark.parametrize("name", AT_BEST)
def test_the_truth_itself_gets_1_everywhere(exact, name):
    truth = oracle(exact)
    assert value_of(name, exact, truth.advantages, truth.onsets) == pytest.approx(1)


def test_what_knows_nothing_is_at_chance(exact):
    """Limits of 4 standard deviations, by hand."""
    rng = np.random.default_rng(2)
    many, b, n = int(exact.decided.sum()), len(exact), len(exact.truth)
    assert abs(value_of("sign_centred", exact, rng.normal(size=n)) - 0.5) < 4 * np.sqrt(0.25 / many)
    assert abs(value_of("spearman", exact, rng.normal(size=n))) < 4 * np.sqrt(1 / 79 / b)  # each has variance 1 / (80 - 1)
    lost, share = int((exact.deviation >= 0).sum()), 0.1
    onsets = rng.random(n) < share
    near, found = 5 / 80, 1 - (1 - share) ** 5  # 5 of a trajectory's 80 tokens are near; one of them is drawn
    assert abs(value_of("precision", exact, exact.truth, onsets) - near) < 4 * np.sqrt(near / (lost * 80 * share))
    assert abs(value_of("recall", exact, exact.truth, onsets) - found) < 4 * np.sqrt(found * (1 - found) / lost)


def test_weights_cannot_move_a_sign_and_the_best_of_them_is_known(exact):
    """The blind spot: every method that multiplies the trajectory's advantage by a positive weight has the signs of GRPO."""
    plain = exact.over_tokens(exact.rows["advantage"])
    weighted = plain * np.random.default_rng(0).uniform(0.1, 3, size=len(plain))
    against = (np.sign(exact.truth) != np.sign(plain))[exact.decided].mean()
    assert 0 < against < 1
    assert value_of("sign", exact, weighted) == value_of("sign", exact, plain) == pytest.approx(1 - against)
    best = oracle_same_sign(exact)
    assert value_of("sign", exact, best.advantages) == pytest.approx(1 - against / 2)  # 0 where it would be wrong
    assert (best.advantages * plain >= 0).all()


def test_the_tilt_keeps_a_trajectorys_sum_and_no_choice_between_tokens(exact):
    assigned = Entry("gear", Gear()).assign(exact, "truth")
    flat = tilt(exact, assigned)
    np.testing.assert_allclose(exact.sums(flat.advantages), exact.sums(assigned.advantages), rtol=1e-9)
    assert value_of("sign_centred", exact, flat.advantages) == 0.5 and value_of("spearman", exact, flat.advantages) == 0


def test_intervals_cover():
    """400 samples of 60 units with mean 0.3: 95 % of the intervals hold it, within 4 standard deviations and the skew."""
    rng, measure, inside = np.random.default_rng(0), MEASURES["sign"], 0
    draws = Draws(60, 400, 0)
    for _ in range(400):
        x = rng.exponential(0.3, size=60)
        found = figure(draws.values(measure, np.stack([x, np.ones(60)], axis=1)))
        inside += found.low <= 0.3 <= found.high
    assert 0.89 < inside / 400 < 0.99
    same = figure(Draws(60, 400, 0).values(measure, np.ones((60, 2))))
    assert same == (1, 1, 1)


# --- methods, teachers --------------------------------------------------------------------------------------------------


def test_every_method_of_the_package_is_scored_or_left_out_with_a_reason(exact):
    names = {entry.name for entry in entries([])}
    assert names >= set(METHODS) - set(LEFT_OUT) and not names & set(LEFT_OUT)
    for entry in entries([]):
        for teacher in entry.teachers(exact)[:1]:
            kept = exact if teacher is None else exact.take(exact.shown[teacher])
            advantages = entry.assign(kept, teacher).advantages
            assert advantages.shape == kept.truth.shape and np.isfinite(advantages).all()


@pytest.fixture(scope="module")
def rows(planted):
    chosen = [Entry("grpo", Grpo()), Entry("token", METHODS["token"]), Entry("gear", Gear())]
    rollouts = teaching(load(planted["sampled"])[0])
    return rollouts, {(row.method, row.teacher): row for row in score(rollouts, chosen, resamples=200)}


def test_teachers_that_know_beat_grpo_and_those_that_do_not_are_it(rows):
    rollouts, found = rows
    assert set(rollouts.teachers) == {*file.TEACHERS, CORRECTED}
    for teacher in ("truth", "sibling", CORRECTED):
        assert found["token", teacher].over_grpo["sign_centred"].low > 0.1
    wrong, nothing = (found["token", teacher].over_grpo["sign_centred"] for teacher in ("wrong", "nothing"))
    assert wrong.low < 0 < wrong.high and nothing == (0, 0, 0)
    assert found["grpo", "-"].over_grpo["alignment"] == (0, 0, 0)
    assert found["oracle", "-"].figures["alignment"].value == pytest.approx(1) and ("tilt of gear", "truth") in found


def test_trajectories_without_a_teacher_are_left_out_of_its_rows(rows):
    rollouts, found = rows
    groups, success = rollouts.rows["group"], rollouts.rows["success"]
    helped = [success[groups == g].sum() - own > 0 for g, own in zip(groups, success, strict=True)]
    assert found["token", "sibling"].trajectories == sum(helped) < found["token", "truth"].trajectories == len(rollouts)


def test_gigpo_gets_the_outcome_in_the_last_turn_and_the_replies_as_anchors(tmp_path):
    """Two samples of one problem, two turns each, the same reply: returns 0.95 R and R, less their means over the pair."""
    split = {"mask": [True, False, True], "turn": [0, -1, 1], "ids": [5, 9, 6]}
    won, lost = (trajectory([0.5, float("nan"), end], 2 * end - 1, **split) for end in (1.0, 0.0))
    rollouts, _ = load(written(tmp_path, [won, lost]))
    advantages = Entry("gigpo", METHODS["gigpo"]).assign(rollouts, None).advantages
    np.testing.assert_allclose(advantages, [1 + 0.475, 1 + 0.5, -1 - 0.475, -1 - 0.5], rtol=1e-6)


def test_the_corrected_teacher_is_the_difference_of_two_signals(exact):
    truth, wrong, corrected = (exact.teachers[name]["k1"] for name in ("truth", "wrong", CORRECTED))
    np.testing.assert_allclose(corrected, truth - wrong)


def test_a_sweeps_cell_is_the_method_with_these_options(exact):
    found, grid = sweep(exact, "truth"), GRIDS["threshold_ratio"]
    assigned = Entry("gear", Gear(kl_threshold=grid.row_values[4], entropy_ratio=grid.column_values[1])).assign(exact, "truth")
    for name in grid.measures:
        assert found["threshold_ratio"][name][4][1] == pytest.approx(
            value_of(name, exact, assigned.advantages, assigned.onsets), abs=1e-6
        )
    shape = np.array(found["normalizer_alpha"]["alignment"], dtype=float).shape
    assert shape == (len(GRIDS["normalizer_alpha"].row_values), len(GRIDS["normalizer_alpha"].column_values))


OWN = '''
from dataclasses import dataclass

import torch

from gear_kernels.methods import Method, PolicyCredit, PolicyTokens


@dataclass(frozen=True)
class Blame(Method):
    """W = 1 + clip(signal, 0, 1) in failures, 1 in successes: more blame where the teacher would not have gone."""

    needs = ("signal",)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        blame = torch.where(tokens.advantages < 0, tokens.signal.clamp(0, 1), 0)
        none = torch.zeros_like(tokens.sequence, dtype=torch.bool)
        ids = torch.full_like(tokens.sequence, -1, dtype=torch.int32)
        return PolicyCredit(1 + blame, blame, blame, ids, none, none, 0)
'''


def test_a_users_own_method_is_scored_by_its_name(planted, tmp_path, monkeypatch, capsys):
    assert len(OWN.splitlines()) < 40
    (tmp_path / "blame_for_credit_truth.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    spec = "blame_for_credit_truth:Blame"
    assert main([str(planted["sampled"]), "--method", spec, "--out", "out", "--resamples", "50"]) == 0
    found = json.loads((tmp_path / "out" / "sampled.json").read_text())
    own = {row["teacher"]: row for row in found["rows"] if row["method"] == spec}
    assert own["truth"]["over_grpo"]["call_contrast"][1] > 0 and own["nothing"]["over_grpo"]["call_contrast"] == [0, 0, 0]
    assert f"tilt of {spec}" in {row["method"] for row in found["rows"]}
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {f"sampled.{name}.png" for name in ("figures", *GRIDS)}
    printed = capsys.readouterr().out
    assert spec in printed and "turn: not scored" in printed and "…" not in printed


# --- committed figures --------------------------------------------------------------------------------------------------


def test_the_committed_figures_are_those_of_the_committed_files(tmp_path, capsys):
    assert evidence.check(evidence.FOLDER, evidence.figures(evidence.FOLDER, tmp_path)) == 0, capsys.readouterr().out


def test_a_figure_that_moved_is_named(planted, tmp_path, capsys):
    now = scored(planted["exact"], [Entry("grpo", Grpo())], resamples=10)
    then = json.loads(json.dumps(now))
    path = tmp_path / "exact.json"
    assert evidence.check(tmp_path, iter([(path, now)])) == 1 and "--write" in capsys.readouterr().out
    then["rows"][0]["figures"]["sign"][0] += 2e-4
    path.write_text(json.dumps(then))
    assert evidence.check(tmp_path, iter([(path, now)])) == 1
    assert "exact.json/rows/grpo, -/figures/sign/0: " in capsys.readouterr().out
    then["rows"][0]["figures"]["sign"][0] = now["rows"][0]["figures"]["sign"][0] + 1e-5
    path.write_text(json.dumps(then))
    assert evidence.check(tmp_path, iter([(path, now)])) == 0
