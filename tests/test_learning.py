"""From scoring to the update: what the host may not look at, and what a recipe decides once."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gates import figures as gates
from gear_kernels import TokenStats, sparse
from gear_trainer.config import load_config
from gear_trainer.recipe import Frozen, Recipe, resolve
from gear_trainer.rollout import Rollout
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks.base import Problem
from gear_trainer.train import credit, experience, loop, score, update
from gear_trainer.train.experience import pack_with
from gear_trainer.train.schedule import schedule

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"
SIZES = ["world_size=1", "rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.max_model_len=64"]
ADVANTAGES = [1.0, -1.0, 0.0, 0.0, 0.7, -0.7, 0.3, -0.3]
META = torch.device("meta")


def rollouts():
    """Four groups of two, of uneven lengths, a tool's reply in the longer ones."""
    out = []
    for k in range(8):
        r = Rollout(Problem(str(k), [], [], ""), k // 2, k % 2, [1] * (3 + k % 3), [2] * (5 + k % 4))
        r.append([3 + k] * (4 + k), [-0.5] * (4 + k))
        r.turns = 1
        if k > 4:
            r.append([1, 1], None)
            r.append([9, 8], [-0.25, -1.0])
        r.reference, r.wrong_prompt_ids = "shown", [7] * (4 + k)
        r.success, r.turn_rewards, r.anchors = ADVANTAGES[k] > 0, [0.0, 1.0], [k // 2, k]
        out.append(r)
    return out


class Engine:
    """An engine in ZeRO-3's place whose statistics depend on one parameter; `backwards` and `steps` count its calls."""

    def __init__(self, device):
        self.device, self.weight = device, torch.ones((), device=device, requires_grad=True)
        self.backwards = self.steps = 0
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])

    def __call__(self, batch, temperature, stats, **_):
        value = self.weight * torch.linspace(-2.0, -1.0, len(batch.targets), device=self.device)
        return TokenStats(**{name: value if name in stats else None for name in TokenStats._fields})

    def backward(self, loss):
        self.backwards += 1
        loss.backward()

    def step(self):
        self.steps += 1

    def was_step_applied(self):
        return True

    def get_global_grad_norm(self):
        return torch.zeros((), device=self.device)


class Beside:
    """A frozen model of which only log-probs are asked."""

    def logprobs(self, rows, targets, temperature):
        return -0.1 * targets.float()

    def follow(self, step):
        self.followed = step


def learner(device, *overrides):
    """A trainer, a step's experience and schedule on a device; what ranks agree on is found on the CPU."""
    cfg = load_config(DEMO, [*SIZES, "train.tokens_per_micro_batch=64", *overrides])
    recipe = resolve(cfg)
    trainer = loop.Trainer(cfg, recipe, None, None, Engine(device), None, {rule.name: Beside() for rule in recipe.frozen})
    trainer.gap_checked = True  # the first step of a start looks at the gap to the sampler, once
    made = pack_with(recipe, rollouts(), ADVANTAGES, torch.device("cpu"))
    passes = schedule(cfg, recipe, made)
    moved = pack_with(recipe, made.rollouts, ADVANTAGES, device)
    moved.columns["loss_weights"] = made["loss_weights"].to(device)
    return trainer, moved, passes


def looks(*overrides):
    """Host synchronisations and launches of a whole learning step on meta tensors that are taken for a GPU's."""
    with gates.gpu_path() as launches:
        trainer, made, passes = learner(META, *overrides)
        sums = Sums()
        with gates.Counter() as counter:
            trainer.learn(1, made, passes, sums)
    assert trainer.engine.steps == trainer.cfg.train.updates_per_step and trainer.engine.backwards >= trainer.engine.steps
    return counter.synchronisations, launches.count


@pytest.mark.parametrize(
    "overrides",
    [
        ["credit=gear"],
        ["credit=gear", "train.packing=true", "teacher.sees=sibling", "teacher.wrong_hint=true"],
        ["credit=gear", "train.updates_per_step=2", "train.aggregation=token_mean"],
        ["credit=gear", "signal=reverse_kl", "train.dual_clip=3", "train.importance_cap=null"],
        ["credit=rlsd"],
        ["credit=sc_grpo"],
        ["credit=sgcd", "writer.enabled=false"],
        ["credit=turn"],
        ["credit=gigpo"],
        ["credit=opsd"],
        ["credit=opsd+gear", "distill.variant=sampled"],
        ["credit=sdar"],
        ["credit=gear", "kl.coefficient=0.1", "train.entropy_bonus=0.01", "train.importance_mode=mask"],
        ["credit=grpo", "train.policy_loss=gspo", "train.importance_mode=sequence_mask", "kl.coefficient=0.1", "kl.estimator=k2"],
        ["credit=gear", "train.policy_loss=cispo", "train.mask_truncated=true"],
        ["credit=gear", "teacher.sees=sibling", "teacher.wrong_hint=true"],
        ["credit=opsd+gear", "distill.until_step=2"],
    ],
    ids=lambda o: " ".join(o),
)
def test_nothing_between_scoring_and_update_waits_for_a_value(alone, overrides):
    assert looks(*overrides)[0] == 0


@pytest.mark.parametrize("method", ["gear", "grpo", "sgcd"])
def test_the_scan_is_launched_once(alone, method):
    """The scan, and the kernel that makes its diagnostics of the tallies."""
    assert looks(f"credit={method}", "writer.enabled=false") == (0, 2)


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool(x.any()), lambda x: x[x > 0]])
@pytest.mark.parametrize(
    ("module", "name"), [(score, "keep"), (credit, "_inputs"), (experience, "count"), (update.Updater, "_loss")]
)
def test_a_look_at_a_value_would_be_counted(alone, monkeypatch, module, name, look):
    """The counter is no ornament: `.item()`, `.cpu()` and their like are found in every phase."""
    own = getattr(module, name)

    def looking(*args, **kwargs):
        found = next(a for a in args if isinstance(a, (experience.Experience, update.Inputs)))
        look(found["sampler_logprobs"] if isinstance(found, experience.Experience) else found.old)
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, looking)
    if module is experience:
        monkeypatch.setattr(loop, name, looking)
    assert looks("credit=gear")[0] > 0


def test_what_a_step_learns_does_not_depend_on_how_it_is_cut(alone):
    """Columns are packed once: a step of one wide micro-batch and one of many have the same credit and losses."""
    found = []
    for budget in (64, 4096):
        trainer, made, passes = learner(torch.device("cpu"), f"train.tokens_per_micro_batch={budget}")
        trainer.engine.__class__ = ByToken
        sums = Sums()
        trainer.learn(1, made, passes, sums)
        rows = made.rows(("token_advantages", "weights", "teacher_logprobs"), 8)
        found.append((trainer.engine.backwards, rows, sums.read(torch.device("cpu"))))
    (many, rows, sums), (one, wide_rows, wide_sums) = found
    assert many > one == 1 and sums.keys() == wide_sums.keys()
    for name, values in rows.items():
        for narrow, wide in zip(values, wide_rows[name], strict=True):
            assert narrow is wide is None or torch.equal(narrow, wide), name
    for name in ("loss", "entropy", "mean_weight_positive", "teacher_gain_success", "policy_tokens"):
        assert sums[name] == pytest.approx(wide_sums[name], rel=1e-6), name
    assert [x is None for x in rows["teacher_logprobs"]] == [a == 0 for a in ADVANTAGES]


def test_a_sparse_head_says_what_it_kept(alone, monkeypatch):
    """The mean share over micro-batches, and the largest bound; without it there are no such names."""
    found = {}
    for backward in ("exact", "sparse"):
        trainer, made, passes = learner(torch.device("cpu"), f"train.head_backward={backward}")
        trainer.engine.__class__ = ByToken
        given = iter((0.25, 0.75) * 20)
        own = trainer.engine.backward

        def report(loss, given=given, own=own, sparse_one=backward == "sparse"):
            own(loss)
            for listening in sparse._listening if sparse_one else ():
                kept = next(given)
                listening.append(sparse.Report(bound=kept / 1000, kept=kept, tries=1))

        monkeypatch.setattr(trainer.engine, "backward", report)
        trainer.learn(1, made, passes, sums := Sums())
        found[backward] = sums.read(torch.device("cpu"))
        assert trainer.engine.backwards > 1
    assert found["sparse"].keys() - found["exact"].keys() == {"head_kept", "head_bound"}
    assert 0.25 < found["sparse"]["head_kept"] < 0.75 and found["sparse"]["head_bound"] == 0.00075


class ByToken(Engine):
    """Statistics that follow from the token alone, whatever batch it stands in."""

    def __call__(self, batch, temperature, stats, **_):
        value = -self.weight * batch.targets.float() / 10
        teacher = {"teacher_logprobs": value.detach() * 0.5}
        return TokenStats(**{n: teacher.get(n, value) if n in stats else None for n in TokenStats._fields})


class Learns(Engine):
    """Statistics of the token and of one weight, which a step moves down its gradient."""

    def __call__(self, batch, temperature, stats, **_):
        scale = self.weight * batch.targets.float()
        values = {"logprobs": -scale / 10, "entropy": scale.square() / 50, "jsd": scale.tanh()}
        return TokenStats(**{name: values.get(name) if name in stats else None for name in TokenStats._fields})

    def step(self):
        super().step()
        with torch.no_grad():
            self.weight -= 0.3 * self.weight.grad
        self.weight.grad = None


@pytest.mark.parametrize(
    "overrides",
    [
        ["credit=grpo"],
        ["credit=grpo", "train.policy_loss=gspo", "train.importance_mode=sequence_mask", "train.entropy_bonus=0.1"],
        ["credit=turn", "train.policy_loss=cispo", "train.importance_mode=mask", "train.packing=true"],
        ["credit=opsd"],
    ],
    ids=lambda o: " ".join(o),
)
def test_the_update_scores_what_nothing_reads_before_it(alone, monkeypatch, overrides):
    """Three steps come to the parameters, numbers and records of those whose rollouts are all scored first."""
    found = []
    for first in (False, True):
        with monkeypatch.context() as patch:
            if first:
                patch.setattr(Recipe, "scores_first", True)
            trainer, made, passes = learner(torch.device("cpu"), *overrides)
            trainer.engine.__class__ = Learns
            values = []
            for step in (1, 2, 3):
                made = pack_with(trainer.recipe, made.rollouts, ADVANTAGES, torch.device("cpu"))
                passes = schedule(trainer.cfg, trainer.recipe, made)
                trainer.learn(step, made, passes, sums := Sums())
                read = sums.read(torch.device("cpu"))
                rows = made.rows(("logprobs", "entropy", "token_advantages", "weights"), 8)
                values.append((read, {name: torch.cat(parts) for name, parts in rows.items()}))
            scored = sorted(i for part in passes.score for rows in part.split for i in rows)
            found.append((trainer.engine.weight.item(), values, scored))
    (weight, values, scored), (weight_of_scored, values_of_scored, all_of_them) = found
    learn = trainer.recipe.moves_all or trainer.recipe.by_turn
    assert all_of_them == list(range(8)) and scored == ([] if learn else [2, 3])
    assert weight == pytest.approx(weight_of_scored, rel=1e-6) and weight != 1
    for (read, rows), (read_of_scored, rows_of_scored) in zip(values, values_of_scored, strict=True):
        torch.testing.assert_close(rows, rows_of_scored, rtol=1e-5, atol=1e-6)
        assert read.pop("padding_share") >= 0 and read_of_scored.pop("padding_share") >= 0
        none, none_of_scored = ({name for name, x in sums.items() if x is None} for sums in (read, read_of_scored))
        assert read.keys() == read_of_scored.keys() and none == none_of_scored
        for name in read.keys() - none:
            assert read[name] == pytest.approx(read_of_scored[name], rel=1e-5, abs=1e-6), name


class ByHint(ByToken):
    """The teacher's log-probs follow from its prompt's first token."""

    def __call__(self, batch, temperature, stats, **_):
        out = super().__call__(batch, temperature, stats)
        if batch.teacher is None:
            return out
        rows = batch.teacher.input_ids
        return out._replace(teacher_logprobs=-0.1 * rows[batch.teacher.index // rows.shape[1], 0].float())


@pytest.mark.parametrize("budget", [64, 4096])
def test_the_signal_is_less_what_a_wrong_hint_makes_of_it(alone, budget):
    """lpS - lpT less lpS - lpW; a rollout that was shown no wrong hint keeps its own, as the student's prompt stands there."""
    hint = ["credit=gear", "teacher.sees=sibling", "teacher.wrong_hint=true", f"train.tokens_per_micro_batch={budget}"]
    trainer, made, passes = learner(torch.device("cpu"), *hint)
    made.rollouts[4].wrong_prompt_ids = []
    trainer.engine.__class__ = ByHint
    trainer.learn(1, made, passes, sums := Sums())
    signals, control = made.rows(("signal", "wrong_hint"), 8).values()
    for r, signal, wrong, taught in zip(made.rollouts, signals, control, made.taught, strict=True):
        if not taught:
            assert signal is None
            continue
        against = 0.7 if r.wrong_prompt_ids else 0.1  # of its first token, 7, or the student's prompt's, 1
        assert torch.allclose(signal, torch.full_like(signal, 0.2 - against), atol=1e-6)
        assert torch.allclose(
            wrong - signal, -0.1 * torch.tensor([r.ids[p] for p in r.policy_positions]).float() + 2 * against - 0.2
        )
    assert sums.read(torch.device("cpu"))["wrong_hint_signal"] is not None


def test_first_the_distillation_alone_then_the_method_alone(alone):
    found = []
    for step in (1, 2):
        trainer, made, passes = learner(torch.device("cpu"), "credit=sdar+gear", "distill.until_step=1")
        recipe = trainer.recipe.at(step)
        made = pack_with(recipe, made.rollouts, ADVANTAGES, torch.device("cpu"))
        passes = schedule(trainer.cfg, recipe, made)
        trainer.engine.__class__ = ByToken
        trainer.learn(step, made, passes, sums := Sums())
        values = sums.read(torch.device("cpu"))
        found.append((values["divergence"], values["clip_fraction"], sum(made.taught), sum(map(len, passes.update[0].split))))
    assert found[0][0] is not None and found[0][1] is None and found[0][2:] == (8, 8), "every rollout, no surrogate"
    assert found[1][0] is None and found[1][1] == 0 and found[1][2:] == (6, 6), "those with an advantage"


def test_a_rollout_that_every_token_weighs_by_nothing_counts_for_nothing(alone):
    """high_entropy gives the tokens below its level W = 0; a whole rollout below it moves nothing, and no mean counts it."""
    trainer, made, passes = learner(torch.device("cpu"), "credit=high_entropy", "credit_args={share: 0.1}")
    trainer.engine.__class__ = ByToken
    trainer.learn(1, made, passes, Sums())
    moves = made.rows(("moves", "token_advantages", "loss_weights"), 8)
    for moved, advantages, weights in zip(*moves.values(), strict=True):
        assert bool(moved.all()) == bool(moved.any()) == bool(advantages.any()) == bool(weights.any())
    assert {bool(m.any()) for m in moves["moves"]} == {True, False}


# --- the recipe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["credit=gear"], dict(needs_teacher=True, references=None, gen_batches=1, signal="k1", by_turn=False)),
        (["credit=grpo"], dict(needs_teacher=False, teaches_all=False, teacher_columns=(), teacher=None)),
        (
            ["credit=sgcd"],
            dict(references="writer", gen_batches=3, signal="reverse_kl", teacher_columns=("signal", "teacher_entropy")),
        ),
        (["credit=sc_grpo"], dict(references="siblings", teacher_columns=("forward_kl",), needs_teacher=True)),
        (["credit=opsd"], dict(needs_teacher=False, stats_to_update=("logprobs", "entropy", "jsd"), jsd_beta=0.5)),
        (["credit=opsd"], dict(teaches_all=False, scores_first=False)),
        (
            ["credit=sdar", "teacher.weights=ema", "teacher.sync_every=1"],
            dict(teaches_all=True, teacher=Frozen("teacher", "teacher.weights", "ema", 0.01), stats_to_update=("logprobs",)),
        ),
        (["credit=gigpo"], dict(by_turn=True, needs_teacher=False, scores_first=False)),
        (["credit=grpo", "train.updates_per_step=2"], dict(scores_first=True, stats_to_update=("logprobs",))),
        (["credit=grpo", "kl.coefficient=0.1"], dict(scores_first=True)),
        (["credit=high_entropy"], dict(scores_first=True)),
        (["credit=gear"], dict(scores_first=True)),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_a_configuration_means(overrides, wanted):
    recipe = resolve(load_config(DEMO, overrides))
    assert {name: getattr(recipe, name) for name in wanted} == wanted


def test_what_is_asked_of_a_scoring_pass():
    def stats(teacher, *overrides):
        return set(resolve(load_config(DEMO, list(overrides))).stats_to_score(teacher))

    assert stats(False, "credit=sgcd") == {"logprobs", "entropy"}
    assert stats(True) == {"logprobs", "entropy", "teacher_logprobs"}
    assert stats(True, "credit=sgcd") == {"logprobs", "entropy", "teacher_logprobs", "reverse_kl", "teacher_entropy"}
    assert stats(True, "credit=sc_grpo") == {"logprobs", "entropy", "teacher_logprobs", "forward_kl"}


def test_a_schedule_of_a_method():
    """rlsd fades by its steps: the recipe gives the method of a step."""
    recipe = resolve(load_config(DEMO, ["credit=rlsd"]))
    assert recipe.method_at(1) == recipe.method.at(1)
    assert (gear := resolve(load_config(DEMO))).method_at(7) is gear.method
