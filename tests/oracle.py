"""A training run's steps computed anew, rewards to AdamW: plain torch in float64, one process, one sequence at a time.

Written from the papers alone: Qwen3's model, GRPO's advantages (arXiv 2402.03300), GEAR's credit (2605.11853, Algorithm 1,
equations 2 to 5), PPO's clip, GSPO's sequence ratio (2507.18071, section 4.3), the k3 estimate of a KL, truncated importance
weights, AdamW (1711.05101). Of the packages it reads a configuration, nothing else; test_oracle.py holds the trainer against it.
"""

import math
from dataclasses import dataclass

import torch

LORA = "lora_{}.default.weight"
MOST = 10.0  # nats of a token's k3, as in verl: beyond it a token passes no gradient


@dataclass(frozen=True)
class Scripted:
    """A rollout as it was sampled and rewarded; `mask` is True on policy tokens, `sampler` holds the engine's log-probs."""

    group: int
    prompt: list[int]
    teacher: list[int]  # the teacher's prompt
    ids: list[int]
    mask: list[bool]
    sampler: list[float]
    reward: float

    @property
    def places(self):
        return [i for i, policy in enumerate(self.mask) if policy]

    @property
    def tokens(self):
        return torch.tensor([self.ids[i] for i in self.places])


class Model:
    """Qwen3 of float64 weights by their names in a checkpoint. sizes: its config.json. scale: of LoRA's products."""

    def __init__(self, weights, sizes, scale=0.0):
        self.weights, self.sizes, self.scale = weights, sizes, scale
        adapters = [name for name in weights if ".lora_" in name]
        self.trained = adapters or list(weights)

    def weight(self, name):
        own = self.weights[f"{name}.weight"]
        a, b = (self.weights.get(f"{name}.{LORA.format(x)}") for x in "AB")
        return own if a is None else own + self.scale * b @ a

    def norm(self, x, name):
        return x * (x.square().mean(-1, keepdim=True) + self.sizes["rms_norm_eps"]).rsqrt() * self.weight(name)

    def attend(self, x, name):
        n, d = len(x), self.sizes["head_dim"]
        angles = torch.arange(n).double()[:, None] * self.theta ** (-torch.arange(0, d, 2).double() / d)

        def turned(heads):  # rotary positions
            left, right = heads.chunk(2, -1)
            sin, cos = angles.sin(), angles.cos()
            return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

        q, k, v = ((x @ self.weight(f"{name}.{part}_proj").T).view(n, -1, d).transpose(0, 1) for part in "qkv")
        q, k = turned(self.norm(q, f"{name}.q_norm")), turned(self.norm(k, f"{name}.k_norm"))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = q @ k.mT / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1) @ self.weight(f"{name}.o_proj").T

    @property
    def theta(self):
        return self.sizes["rope_parameters"]["rope_theta"]

    def logits(self, ids):
        x = self.weight("model.embed_tokens")[torch.tensor(ids)]
        for k in range(self.sizes["num_hidden_layers"]):
            layer = f"model.layers.{k}"
            x = x + self.attend(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            gate, up = (h @ self.weight(f"{layer}.mlp.{part}_proj").T for part in ("gate", "up"))
            x = x + (gate * gate.sigmoid() * up) @ self.weight(f"{layer}.mlp.down_proj").T
        return self.norm(x, "model.norm") @ self.weight("lm_head").T

    def policy_tokens(self, prompt, r, temperature):
        """Log-probs [n] of a rollout's policy tokens behind a prompt, and the entropy [n] where each was drawn, in nats."""
        logits = self.logits(prompt + r.ids)[[len(prompt) + i - 1 for i in r.places]] / temperature
        p = logits - logits.max(-1, keepdim=True).values
        p = p - p.exp().sum(-1, keepdim=True).log()
        return p.gather(1, r.tokens[:, None])[:, 0], -(p.exp() * p).sum(-1)


# --- before the update ------------------------------------------------------------------------------------------------------


def group_advantages(rollouts, how):
    out = []
    for r in rollouts:
        rewards = [other.reward for other in rollouts if other.group == r.group]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / (len(rewards) - 1))
        if len(set(rewards)) == 1:
            out.append(0.0)
        else:
            out.append((r.reward - mean) / (std + 1e-6) if how == "grpo" else r.reward - mean)
    return out


def gear(cfg, signal, entropy, advantage, margins):
    """A trajectory's token advantages, by Algorithm 1; `margins` gets how close a comparison was."""
    args = {"kl_threshold": 0.1, "entropy_ratio": 1.5, "alpha": 0.2} | cfg.credit_args
    most = max(signal)
    silent = most <= 0 or min(signal) == most  # a signal that is the same everywhere tells no token from another
    g = [0.0 if silent else max(x, 0.0) / most for x in signal]
    c, t = list(g), 0
    margins += [abs(x - args["kl_threshold"]) for x in g]
    while t < len(g):
        if g[t] <= args["kl_threshold"]:
            t += 1
            continue
        end = t + 1
        while end < len(g):
            bound = args["entropy_ratio"] * entropy[t]
            margins.append(abs(entropy[end] - bound))
            if entropy[end] > bound:
                break
            end += 1
        end = min(end, len(g) - 1)
        c[t : end + 1] = [g[t]] * (end + 1 - t)
        t = end + 1
    sign = (advantage > 0) - (advantage < 0)
    w = [0.5 + (0.5 - x) * sign for x in c]
    return torch.tensor([(args["alpha"] * x + 1 - args["alpha"] / 2) * advantage for x in w], dtype=torch.float64)


def score(cfg, policy, start, rollouts, margins):
    """Columns of each rollout: advantages, log-probs before the update, under the sampler, of the reference model."""
    out = []
    t = cfg.rollout.temperature
    for r, advantage in zip(rollouts, group_advantages(rollouts, cfg.train.advantages), strict=True):
        old, entropy = policy.policy_tokens(r.prompt, r, t)
        advantages = torch.full_like(old, advantage)
        if cfg.credit == "gear" and advantage:
            taught, _ = policy.policy_tokens(r.teacher, r, t)
            advantages = gear(cfg, (old - taught).tolist(), entropy.tolist(), advantage, margins)
        reference = start.policy_tokens(r.prompt, r, t)[0] if cfg.kl.coefficient else old
        sampler = torch.tensor([r.sampler[i] for i in r.places], dtype=torch.float64)
        out.append((advantages, old, sampler, reference))
    return out


# --- the update -------------------------------------------------------------------------------------------------------------


def loss_of(cfg, policy, rollouts, columns, margins):
    """The loss of an optimizer step's rollouts, all ranks' together; tokens that a clip holds, and tokens that move."""
    t, total, held, moving = cfg.train, 0.0, 0, 0
    tokens = sum(len(r.places) for r in rollouts)
    for r, (advantages, old, sampler, reference) in zip(rollouts, columns, strict=True):
        lp, entropy = policy.policy_tokens(r.prompt, r, cfg.rollout.temperature)
        ratio = (lp - old).exp()
        if t.policy_loss == "gspo":  # the sequence's in value, each token's own in gradient
            ratio = (lp - old).mean().detach().exp() * (lp - lp.detach()).exp()
        bounded = ratio.clamp(1 - t.clip_low, 1 + t.clip_high)
        term = torch.minimum(ratio * advantages, bounded * advantages)
        term = term if t.importance_cap is None else term * (old - sampler).exp().clamp(max=t.importance_cap)
        gap = reference - lp
        k3 = gap.exp() - 1 - gap
        kl = gap.square() / 2 if cfg.kl.estimator == "k2" else k3.clamp(max=MOST)
        term = term - cfg.kl.coefficient * kl + t.entropy_bonus * entropy
        total = total - (term.sum() / tokens if t.aggregation == "token_mean" else term.mean() / len(rollouts))
        if (advantages != 0).any() or cfg.kl.coefficient or t.entropy_bonus:
            moving += len(lp)
            held += int((bounded * advantages < ratio * advantages).sum())
        if (advantages != 0).any():
            margins += [(ratio - bound).abs().min().item() for bound in (1 - t.clip_low, 1 + t.clip_high)]
        if cfg.kl.coefficient:
            margins.append((k3 - MOST).abs().min().item())
    return total, held, moving


class AdamW:
    def __init__(self, cfg):
        self.cfg, self.eps, self.moments, self.count = cfg.train, cfg.deepspeed["optimizer"]["params"]["eps"], {}, 0

    def step(self, weights, grads, rate):
        self.count += 1
        a, b = self.cfg.betas
        for name, g in grads.items():
            m, v = self.moments.get(name, (0.0, 0.0))
            m, v = self.moments[name] = a * m + (1 - a) * g, b * v + (1 - b) * g * g
            m, v = m / (1 - a**self.count), v / (1 - b**self.count)
            own = weights[name].detach() * (1 - rate * self.cfg.weight_decay)
            weights[name] = (own - rate * m / (v.sqrt() + self.eps)).requires_grad_()


def clipped(grads, limit):
    """The gradients with their global norm at most the limit, and that norm before."""
    norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
    factor = limit / (norm + 1e-6) if limit and norm > limit else 1.0
    return {name: g * factor for name, g in grads.items()}, norm


def parts(cfg, count):
    """The rollouts of each optimizer step: of every rank's share an equal part, in order."""
    share = count // cfg.world_size
    own = share // cfg.train.updates_per_step
    return [
        [rank * share + i for rank in range(cfg.world_size) for i in range(k * own, (k + 1) * own)]
        for k in range(cfg.train.updates_per_step)
    ]


@dataclass(frozen=True)
class Truth:
    """What a run comes to: the weights that it trains, before and after; each step's numbers; the closest comparison."""

    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    steps: list[dict[str, float]]
    margin: float  # a token nearer to a threshold than rounding moves it would make float32 and float64 two runs


def train(cfg, weights, sizes, steps):
    """Steps over scripted rollouts, from the given weights."""
    start = {name: w.double() for name, w in weights.items()}
    scale = cfg.lora.alpha / max(1, cfg.lora.rank)
    before, policy = Model(start, sizes, scale), Model(dict(start), sizes, scale)
    for name in policy.trained:
        policy.weights[name] = start[name].clone().requires_grad_()
    optimizer, margins, out = AdamW(cfg), [math.inf], []
    for number, rollouts in enumerate(steps, 1):
        rate = cfg.train.lr * min(1.0, number / max(1, cfg.train.lr_warmup_steps))
        with torch.no_grad():
            columns = score(cfg, policy, before, rollouts, margins)
        losses, norms, held, moving = [], [], 0, 0
        for part in parts(cfg, len(rollouts)):
            loss, *counts = loss_of(cfg, policy, [rollouts[i] for i in part], [columns[i] for i in part], margins)
            grads = torch.autograd.grad(loss, [policy.weights[name] for name in policy.trained])
            grads, norm = clipped(dict(zip(policy.trained, grads, strict=True)), cfg.train.gradient_clipping)
            optimizer.step(policy.weights, grads, rate)
            losses, norms, held, moving = [*losses, loss.item()], [*norms, norm], held + counts[0], moving + counts[1]
        mean = {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms), "clip_fraction": held / moving}
        out.append(mean)
    trained = {name: policy.weights[name].detach() for name in policy.trained}
    return Truth({name: start[name] for name in trained}, trained, out, min(margins))
