"""Chains of dependent calls: every solution is judged right, and where a rollout leaves the way to it is exact."""

import copy
import random
from collections import Counter

import pytest
import torch

from gear_kernels.methods import PolicyTokens
from gear_trainer.tasks import TaskError, make_task
from gear_trainer.tasks.base import Deviation, KnowsDeviation
from gear_trainer.tasks.chains.deviation import _ways, deviation
from gear_trainer.tasks.chains.world import DONE, ChainEpisode
from gear_trainer.tasks.tool_calls import call_turn, calls_turn

STEPS = range(2, 7)


def played(task, problem, turns):
    """The outcome, and every message of the environment."""
    episode = task.episode(problem)
    said = [m.content for turn in turns for m in episode.step(turn).messages]
    return episode.outcome("done"), said


def cat(name):
    return call_turn("cat", {"file_name": name})


def rm(name):
    return call_turn("rm", {"file_name": name})


@pytest.fixture
def removal():
    """A task of three steps with one spare turn, and a chain of it that ends with a removal."""
    task = make_task("chains", 0, {"steps": 3})
    problem = next(p for p in map(task.train_problem, range(99)) if p.data["chain"].gold[-1].name == "rm")
    return task, problem, problem.data["chain"]


@pytest.mark.parametrize("steps", STEPS)
def test_the_reference_solution_is_right_and_each_call_needs_the_answer_before(steps):
    task = make_task("chains", 1, {"steps": steps, "spare": 0})
    seen = Counter()
    for problem in [*map(task.train_problem, range(20)), *task.held_out(20)]:
        chain, turns = problem.data["chain"], task.demonstrate(problem, "right", random.Random(0))
        outcome, said = played(task, problem, turns)
        assert outcome.success and outcome.reward == 1 and len(turns) == steps + 1 == task.max_turns
        words = problem.messages[-1]["content"].replace(".", "").split()
        assert chain.right[0] in words and not set(chain.right[1:]) & set(words), "the user names the first note only"
        for call, before in zip(chain.gold[1:], said, strict=False):
            assert next(iter(call.arguments.values())) in before
        assert deviation(chain, turns, task.max_turns) is None
        assert problem.answer in problem.teacher_messages[-1]["content"]
        seen[chain.gold[-1].name] += 1
    assert set(seen) == {"rm", "mv"}


def test_a_problem_is_a_function_of_seed_and_index_and_held_out_names_are_not_trained_on():
    task, same, other = (make_task("chains", seed) for seed in (3, 3, 4))
    assert task.train_problem(5) == same.train_problem(5) != other.train_problem(5)
    held = task.held_out(50)
    assert held == other.held_out(50) and held[:10] == task.held_out(10)
    trained = {task.train_problem(i).data["chain"].right for i in range(300)}
    assert not trained & {p.data["chain"].right for p in held}


def walk(episode, chain, rng):
    """A state of an episode after some calls, the solution's among them."""
    ways = dict(_ways(chain))
    gold = [call_turn(*call) for call in chain.gold]
    for at in range(rng.randint(0, 5)):
        episode.step(ways[rng.choice(list(ways))] if rng.random() < 0.4 else gold[min(at, len(gold) - 1)])
    return episode


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_the_turns_that_are_needed_are_exact(steps):
    """By induction: 0 where all is won, some turn brings it one nearer, none two, and what is out of reach stays so."""
    rng, found = random.Random(steps), Counter()
    task = make_task("chains", 0, {"steps": steps})
    for index in range(12):
        chain = task.train_problem(index).data["chain"]
        episode = walk(ChainEpisode(chain, task.max_turns), chain, rng)
        needed = episode.turns_needed()
        found[needed] += 1
        if episode._done:
            assert needed == (0 if episode.outcome("done").success else None)
            continue
        after = {}
        for kind, way in _ways(chain):
            if kind not in after:
                trial = copy.deepcopy(episode)
                trial.step(way)
                after[kind] = trial.turns_needed()
        if needed is None:
            assert set(after.values()) == {None}
        else:
            assert min(n for n in after.values() if n is not None) == needed - 1
    assert len(found) > 2 and found[None], found


def test_rollouts_that_fail_have_a_deviation_and_no_others():
    rng, won = random.Random(0), 0
    task = make_task("chains", 0, {"steps": 4, "spare": 2})
    assert isinstance(task, KnowsDeviation) and not isinstance(make_task("mathapi", 0), KnowsDeviation)
    for index in range(60):
        problem = task.train_problem(index)
        turns = task.demonstrate(problem, "slips", rng)
        success = played(task, problem, turns)[0].success
        found = deviation(problem.data["chain"], turns, task.max_turns)
        assert (found is None) == success and task.deviation(problem, turns) == found
        won += success
    assert 6 <= won <= 36, "successes and failures"


def test_rewards_of_turns_sum_to_what_became_of_the_chance():
    rng, task = random.Random(1), make_task("chains", 0, {"steps": 4, "spare": 1})
    signs = Counter()
    for index in range(60):
        problem = task.train_problem(index)
        turns, episode = task.demonstrate(problem, "slips", rng), task.episode(problem)
        first = episode.chance()
        assert first == pytest.approx(0.8**6 + 6 * 0.8**5 * 0.2), "at most one turn of six may be wrong"
        rewards = [episode.step(turn).reward for turn in turns]
        over = task.max_turns == len(turns) or episode.outcome("done").success
        assert not over or sum(rewards) == pytest.approx(episode.outcome("done").success - first)
        lost = deviation(problem.data["chain"], turns, task.max_turns)
        if lost is not None:
            assert rewards[lost.turn] < 0 and not any(rewards[lost.turn + 1 :]), "what is lost cannot be lost again"
        signs.update(reward > 0 for reward in rewards)
    assert signs[True] > 60 and signs[False] > 60


def test_deviations_stand_where_the_solution_is_lost(removal):
    task, _, chain = removal
    first, second, target = chain.right
    wrong = chain.wrong[-1]

    def at(*turns):
        return deviation(chain, turns, task.max_turns)

    def inside(found, turn, text, word):
        return found.turn == turn and text.index(word) <= found.characters < text.index(word) + len(word)

    assert inside(at(cat(first), cat(second), rm(wrong), DONE), 2, rm(wrong), wrong)
    assert inside(at(cat(first), rm(second)), 1, rm(second), second), "another removal would have been an error, no more"
    assert at(cat(first), cat(wrong), cat(second), rm(target), DONE) is None, "one spare turn"
    assert inside(at(cat(first), cat(wrong), cat(wrong)), 2, cat(wrong), wrong), "no turn is left for another detour"
    made = call_turn("touch", {"file_name": "new"})
    assert inside(at(cat(first), made), 1, made, "new"), "to make it and to remove it are two"
    assert at(cat(first), DONE) == Deviation(1, 0), "an end where a call was due"
    assert at("<tool_call>\nnonsense\n</tool_call>", cat(first), cat(second), rm(target), DONE) is None
    assert at("<tool_call>\nnonsense\n</tool_call>", "<tool_call>\n{") == Deviation(1, len("<tool_call>\n{")), "a cut turn"
    assert at(rm(target), cat(first), cat(second), DONE) is None, "in whatever order"


def test_what_the_tools_refuse(removal):
    task, problem, chain = removal
    calls = [
        call_turn("mkdir", {"dir_name": "x"}), call_turn("rm", {"name": "x"}), call_turn("cat", {"file_name": 3}),
        call_turn("mv", {"source": chain.right[-1], "destination": "elsewhere"}),
    ]  # fmt: skip
    episode = task.episode(problem)
    for call in calls:
        reply = episode.step(call)
        assert reply.errors == 1 and "error" in reply.messages[0].content
    assert episode.turns_needed() == 4, "nothing has changed"
    two = calls_turn([("cat", {"file_name": chain.right[0]}), ("rm", {"file_name": chain.right[-1]})])
    reply = episode.step(two)
    assert [reply.calls, reply.errors, len(reply.messages)] == [2, 1, 2] and episode.turns_needed() == 3
    assert "one call a turn" in reply.messages[1].content


@pytest.mark.parametrize(
    "arguments, message",
    [({"steps": 1}, "between 2 and 6"), ({"steps": 7}, "between 2 and 6"), ({"spare": -1}, "between 0 and 16"),
     ({"slip": 1.5}, "between 0 and 1"), ({"slipping": -0.5}, "between 0 and 1")],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(TaskError, match=message):
        make_task("chains", 0, arguments)


def test_the_oracle_of_the_credit_study_is_the_true_advantage():
    """Over a batch: R - V_0 in each rollout in all, 0 on average at the start, no gain where the solution is lost."""
    from examples.credit_study.oracle import Oracle

    task, rng = make_task("chains", 0, {"steps": 4, "spare": 2}), random.Random(0)
    rewards, won, lost = [], [], []
    for index in range(80):
        problem = task.train_problem(index)
        episode, turns = task.episode(problem), task.demonstrate(problem, "slips", rng)
        rewards.append([episode.step(turn).reward for turn in turns])
        won.append(episode.outcome("done").success)
        lost.append(task.deviation(problem, turns))
    turn_ids = [turn for own in rewards for turn in range(len(own)) for _ in range(2)]  # two tokens a turn
    flat = torch.tensor([reward for own in rewards for reward in own for _ in range(2)])
    lengths = torch.tensor([2 * len(own) for own in rewards])
    sequence = torch.arange(len(rewards)).repeat_interleave(lengths)
    none = torch.zeros_like(flat)
    given = PolicyTokens(none, none, none, torch.tensor(turn_ids), sequence, lengths, turn_rewards=flat)
    worth = [own[::2] for own in Oracle().apply(given).token_advantages.split(lengths.tolist())]
    share = sum(won) / len(won)
    assert 0.1 < share < 0.5
    for own, success, where in zip(worth, won, lost, strict=True):
        assert float(own.sum()) == pytest.approx(success - share, abs=1e-5)
        assert where is None or (own[where.turn] <= 0 and not own[where.turn + 1 :].any())
    assert float(torch.stack([own[0] for own in worth]).mean()) == pytest.approx(0, abs=1e-6)
