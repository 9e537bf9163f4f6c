"""Rank script of test_teacher.py: teacher policies and distillation under ZeRO-3 against one process's plain models.

Its `main` is called with a folder: reads FOLDER/a and FOLDER/b (untied models), writes FOLDER/result.json
"""

import faulthandler
import json
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from scripted_runs import PACKED, SHARDED, TEMPERATURE, VOCAB, WHOLE, config
from transformers import AutoModelForCausalLM

from gear_trainer.errors import ConfigError
from gear_trainer.policy import checkpoint
from gear_trainer.policy.frozen import frozen_model, shares_weights
from gear_trainer.policy.gather import whole_state_dict
from gear_trainer.policy.zero import build_engine
from gear_trainer.recipe import resolve
from gear_trainer.rollout import Rollout
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks.base import Problem
from gear_trainer.train.experience import pack_with
from gear_trainer.train.loop import Trainer
from gear_trainer.train.schedule import schedule

ADVANTAGES = [1.0, -1.0, 0.0, 0.0, 0.7, -0.7, 0.3, -0.3]  # rank 0 has a group that teaches and one that does not

GRADIENTS = {  # name: overrides; the teacher reads model b, but "rollout" is model a itself
    "opsd, own weights": ["credit=opsd", "teacher.weights=initial", PACKED, SHARDED],
    "opsd, own weights, persistent": ["credit=opsd", "teacher.weights=initial", "distill.beta=0.3", WHOLE],
    "opsd, the policy's": ["credit=opsd", PACKED, SHARDED],
    "opsd, the policy's, checkpointed": ["credit=opsd", "distill.beta=0", "model.gradient_checkpointing=true", PACKED, SHARDED],
    "opsd+grpo": ["credit=opsd+grpo", "distill.beta=1", "distill.coefficient=0.7", "teacher.weights=ema", SHARDED],
    "opsd+grpo, sampled": ["credit=grpo+opsd", "distill.variant=sampled", "teacher.weights=synced", SHARDED],
    "sdar": ["credit=sdar", "distill.coefficient=0.5", "teacher.weights=initial", SHARDED],
    "sdar, the policy's": ["credit=sdar", "distill.coefficient=0.5", PACKED, SHARDED],
    "opsd+grpo, kl": ["credit=opsd+grpo", "teacher.weights=initial", "kl.coefficient=0.7", "kl.estimator=k2", PACKED, WHOLE],
}
POLICIES = {  # name: (dtype, overrides)
    "initial": ("float32", ["teacher.weights=initial", SHARDED]),
    "ema": ("float32", ["teacher.weights=ema", "teacher.ema_rate=0.25", SHARDED]),
    "ema, persistent": ("float32", ["teacher.weights=ema", "teacher.ema_rate=0.25", WHOLE]),
    "ema, bfloat16": ("bfloat16", ["teacher.weights=ema", "teacher.ema_rate=0.002", PACKED, WHOLE]),
    "synced": ("float32", ["teacher.weights=synced", "teacher.sync_every=2", WHOLE]),
}
STEPS = 3
SCORED = ("logprobs", "teacher_logprobs", "signal", "teacher_entropy")


def make_rollouts():
    """Four groups of two, uneven: different prompts for student and teacher, tool replies in the middle."""
    g = torch.Generator().manual_seed(0)
    out = []
    for k, advantage in enumerate(ADVANTAGES):
        prompt, teacher, length = 3 + k % 3, 5 + k % 4, 4 + (5 * k) % 11
        draw = torch.randint(1, VOCAB, (prompt + teacher + length,), generator=g).tolist()
        r = Rollout(Problem(str(k), [], [], ""), k // 2, k % 2, draw[:prompt], draw[prompt : prompt + teacher])
        r.ids, r.mask = draw[prompt + teacher :], [not (length > 8 and 3 <= i < 6) for i in range(length)]
        r.sampler_logprobs, r.turn_ids, r.success, r.reference = [-3.0] * length, [0] * length, advantage > 0, "written"
        out.append(r)
    return out


def make_trainer(cfg, teacher_path, resharded=False):
    recipe = resolve(cfg)
    beside = tuple(r.name for r in recipe.frozen if r.follows and shares_weights(cfg, r))
    engine = build_engine(cfg, cfg.model.path, beside, resharded)
    frozen = {rule.name: frozen_model(cfg, engine, str(teacher_path), rule) for rule in recipe.frozen}
    trainer = Trainer(cfg, recipe, None, None, engine, None, frozen)
    trainer.gap_checked = True  # no engine has sampled these rollouts
    return trainer


def mine(items):
    share = len(items) // dist.get_world_size()
    return items[dist.get_rank() * share :][:share]


def train_step(trainer, step, rollouts):
    """Score, credit, update, follow; returns the scored columns by rollout and the step's numbers."""
    part, sums = mine(rollouts), Sums()
    experience = pack_with(trainer.recipe, part, mine(ADVANTAGES), trainer.device)
    trainer.learn(step, experience, schedule(trainer.cfg, trainer.recipe, experience), sums)
    return experience.rows(SCORED, len(part)), sums.read(trainer.device)


# --- the reference: plain models, whole logits, float64 statistics -----------------------------------------------------------


def log_probs(lm, prompt, r):
    """[n, V] of the policy tokens of a rollout behind a prompt."""
    logits = lm(input_ids=torch.tensor([prompt + r.ids])).logits[0]
    return (logits[[len(prompt) + p - 1 for p in r.policy_positions]].double() / TEMPERATURE).log_softmax(-1)


def plain_rows(student, teacher, r):
    p = log_probs(student, r.prompt_ids, r)
    with torch.no_grad():
        q = log_probs(teacher, r.teacher_prompt_ids, r)
    tokens = torch.tensor([[r.ids[i]] for i in r.policy_positions])
    return p, q, p.gather(1, tokens)[:, 0], q.gather(1, tokens)[:, 0]


def jsd(p, q, beta):
    if beta in (0, 1):
        return (p.exp() * (p - q)).sum(-1) if beta else (q.exp() * (q - p)).sum(-1)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


def entropy(p):
    return -(p.exp() * p).sum(-1)


def reference_kl(cfg, lp, reference, r):
    """k2 or k3 of the policy's tokens, behind the student's own prompt."""
    tokens = torch.tensor([[r.ids[i]] for i in r.policy_positions])
    with torch.no_grad():
        gap = log_probs(reference, r.prompt_ids, r).gather(1, tokens)[:, 0]
    gap = gap - lp
    return gap.square() / 2 if cfg.kl.estimator == "k2" else (gap.exp() - 1 - gap).clamp(max=10)


def plain_gradients(cfg, student, teacher, rollouts):
    """Of the mean over tokens, then over trajectories, on policy; and the mean divergence over tokens."""
    student.zero_grad()
    d, total, divergence, count = cfg.distill, 0.0, 0.0, 0
    distils = {"grpo": 0.0, "opsd": 1.0}.get(cfg.credit, 0.1)
    for r, a in zip(rollouts, ADVANTAGES, strict=True):
        p, q, lp, lt = plain_rows(student, teacher, r)
        gap = (lt - lp).detach()
        if cfg.credit == "sdar":
            distilled, value = torch.sigmoid(5 * gap) * -lp, -gap
        elif d.variant == "sampled":
            distilled, value = -gap * lp, -gap
        else:
            distilled = value = jsd(p, q, d.beta)
        policy = 0.0 if cfg.credit == "opsd" else -a * lp
        coefficient = d.coefficient or distils
        held = cfg.kl.coefficient * reference_kl(cfg, lp, teacher, r)
        total = total + (coefficient * distilled + policy + held).mean() / len(rollouts)
        divergence, count = divergence + value.detach().sum().item(), count + len(lp)
    total.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.requires_grad}, divergence / count


# --- cases -------------------------------------------------------------------------------------------------------------------


def gradient_case(cfg, folder, rollouts, want, divergence):
    trainer = make_trainer(cfg, folder / "b")
    engine, got, calls, graded = trainer.engine, {}, [], []
    step = engine.step
    engine.module.lm.base_model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def caught():
        if not got:
            got.update({n.removeprefix("lm."): safe_get_full_grad(p) for n, p in engine.module.named_parameters()})
            graded.append(sum(calls))  # forwards with gradients, recomputed ones too
        step()

    engine.step = caught
    seen = [train_step(trainer, k, rollouts)[1]["divergence"] for k in (1, 2, 3)]
    assert got.keys() == want.keys()
    heads = engine.module.lm.get_output_embeddings().weight
    return {
        "errors": {n: ((got[n] - w).norm() / w.norm()).item() for n, w in want.items()},
        "divergence": seen,
        "divergence error": abs(seen[0] - divergence),
        "forwards": graded[0],
        "head stayed whole": heads.numel() > 0 and not heads.ds_persist,
    }


def gap(a, b):
    return max((a[n].double() - b[n].double()).abs().max().item() for n in b)


def expected(cfg, e, w, step):
    """One step of the rule on whole float32 weights."""
    t = cfg.teacher
    if t.weights == "ema":
        return {n: e[n] + t.ema_rate * (w[n].float() - e[n]) for n in e}
    return dict(w) if t.weights == "synced" and step % t.sync_every == 0 else e


def shard_gap(teacher, e):
    """What the teacher keeps on this rank against the same part of the expected whole tensors."""
    worst = 0.0
    for kept, whole in zip(teacher.kept, e.values(), strict=True):
        part = whole.flatten()[dist.get_rank() * kept.numel() :][: kept.numel()].float()
        worst = max(worst, (kept[: part.numel()].float() - part).abs().max().item() if part.numel() else 0.0)
    return worst


def score_gaps(trainer, scores, rollouts, student, teacher):
    gaps = {}
    for i, (r, a) in enumerate(zip(mine(rollouts), mine(ADVANTAGES), strict=True)):
        assert (scores["signal"][i] is None) == (a == 0)
        if a == 0:
            continue
        with torch.no_grad():
            p, q, lp, lt = plain_rows(student, teacher, r)
        rows = {"logprobs": lp, "teacher_logprobs": lt, "signal": jsd(p, q, 1), "teacher_entropy": entropy(q)}
        for name, want in rows.items():
            gaps[name] = max(gaps.get(name, 0.0), (scores[name][i].double() - want).abs().max().item())
    return gaps


def policy_case(name, dtype, cfg, rollouts, plain):
    """STEPS steps against the rule on whole weights; a checkpoint; one more step; a fresh start from it, and the same step."""
    trainer = make_trainer(cfg, cfg.model.path)
    lm, teacher = trainer.engine.module.lm, trainer.frozen["teacher"]
    e = {n: p.float() for n, p in whole_state_dict(lm).items()}
    start, out = e, {"weights": 0.0, "kept": 0.0, "scores": {}}
    for step in range(1, STEPS + 1):
        w = whole_state_dict(lm)
        plain[0].load_state_dict(w), plain[1].load_state_dict({n: t.to(w[n].dtype) for n, t in e.items()})
        scores, _ = train_step(trainer, step, rollouts)
        for key, value in score_gaps(trainer, scores, rollouts, *plain).items():
            out["scores"][key] = max(out["scores"].get(key, 0.0), value)
        e = expected(cfg, e, whole_state_dict(lm), step)
        published = {n: t.to(getattr(torch, dtype)) for n, t in e.items()}
        out["weights"] = max(out["weights"], gap(whole_state_dict(teacher.engine.module.lm), published))
        out["kept"] = max(out["kept"], shard_gap(teacher, e))
    out["moved"], out["behind"] = gap(e, start), gap(whole_state_dict(lm), e)
    checkpoint.save(trainer.engine, cfg, STEPS, [teacher])
    out |= resume(cfg, trainer, rollouts)
    if name == "synced":
        out["message"] = missing_teacher(cfg, trainer)
    return out


def resume(cfg, trainer, rollouts):
    teacher = trainer.frozen["teacher"]
    kept = [t.clone() for t in teacher.kept]
    fresh = make_trainer(cfg, cfg.model.path)
    again = fresh.frozen["teacher"]
    checkpoint.load(fresh.engine, cfg, STEPS, [again])
    numels = [p.ds_numel - dist.get_rank() * t.numel() for p, t in zip(teacher.params, kept, strict=True)]
    same = all(torch.equal(a[: max(0, n)], b[: max(0, n)]) for a, b, n in zip(kept, again.kept, numels, strict=True))
    scores = [train_step(t, STEPS + 1, rollouts)[0] for t in (trainer, fresh)]
    for name in SCORED:
        same &= all(a is b is None or torch.equal(a, b) for a, b in zip(*(s[name] for s in scores), strict=True))
    for model in (lambda t: t.engine.module.lm, lambda t: t.frozen["teacher"].engine.module.lm):
        same &= gap(whole_state_dict(model(trainer)), whole_state_dict(model(fresh))) == 0
    return {"resumed bitwise": bool(same), "teacher file": len(list(cfg.run_dir.glob("checkpoints/*/teacher_rank*.pt")))}


def missing_teacher(cfg, trainer):
    checkpoint.save(trainer.engine, cfg, 9)
    try:
        checkpoint.load(trainer.engine, cfg, 9, list(trainer.frozen.values()))
    except ConfigError as error:
        return str(error)
    return "no error"


def worst(values):
    """The larger of both ranks' numbers, entry by entry; flags and texts are rank 0's unless one rank's flag is false."""
    both = [None, None]
    dist.all_gather_object(both, values)
    if isinstance(values, dict):
        return {k: worst(v) for k, v in values.items()} if all(both) else both[0] or both[1]
    return all(both) if isinstance(values, bool) else max(both) if isinstance(values, float) else both[0]


def main(argv):
    (folder,) = map(Path, argv)
    faulthandler.dump_traceback_later(1000, exit=True)  # a hang prints nothing by itself
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pure gloo; else a C++ op is compiled at the first use
    rollouts = make_rollouts()
    load = AutoModelForCausalLM.from_pretrained
    a, b = (load(folder / name, dtype=torch.float32) for name in "ab")  # before DeepSpeed replaces F.linear
    half = [load(folder / "a", dtype=torch.bfloat16) for _ in "ab"]
    configs = {name: config(folder, f"name=g{i}", "model.dtype=float32", *o) for i, (name, o) in enumerate(GRADIENTS.items())}
    want = {n: plain_gradients(c, a, b if resolve(c).frozen else a, rollouts) for n, c in configs.items()}
    deepspeed.init_distributed("gloo")
    result = {"gradients": {}, "policies": {}}
    for name, cfg in configs.items():
        result["gradients"][name] = gradient_case(cfg, folder, rollouts, *want[name])
    for i, (name, (dtype, overrides)) in enumerate(POLICIES.items()):
        cfg = config(folder, f"name=p{i}", "credit=sgcd", f"model.dtype={dtype}", *overrides)
        result["policies"][name] = worst(policy_case(name, dtype, cfg, rollouts, half if dtype == "bfloat16" else (a, b)))
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
