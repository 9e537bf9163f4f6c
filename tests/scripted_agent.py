"""A policy that says what is written down: episodes and whole runs of agent tasks, without a model that could solve them."""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque

from gear_trainer.rollout import Completion, Engine
from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.vllm_colocated import ColocatedVllm
from gear_trainer.tasks import make_task
from gear_trainer.tasks.acebench.agent import FINISH
from gear_trainer.tasks.tool_calls import call_turn


def lines(problem):
    """What the samples of a problem's group say in turn: the ground truth first, then what falls short of it."""
    data = problem.data
    if "part" in data:
        return lines(data["problem"])
    if "observed" in data:  # TRL's class Guessing
        number = data["row"]["number"]
        return [[call_turn("guess", {"number": n}), "I have it."] for n in (number, (number + 1) % 10)]
    if "item" in data:  # ACEBench's agents, in the official text
        stones = data["item"].milestones
        stones = stones[0] if isinstance(stones[0], list) else stones
        return [[*stones, FINISH], ["Nothing to be done.", FINISH]]
    if "row" in data:  # tau's tickets
        criteria = data["row"].evaluation_criteria
        calls = [call_turn(action.name, action.arguments) for action in criteria.actions or []]
        return [[*calls, "Done. " + " ".join(criteria.communicate_info or [])], ["Done."]]
    asked = call_turn("python", {"code": f"print({problem.answer})"})  # mathematics with the tool
    return [[asked, f"It is \\boxed{{{problem.answer}}}."], [call_turn("python", {"code": "1 / 0"}), "It is \\boxed{-77}."]]


class Script:
    """Finds what is to be said next by the tokens that are there, for requests in the order of their rollouts.

    Problems may share a prompt, as tickets of one symptom do: the lines of the first come first.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.told = defaultdict(list)  # a prompt: the lines of all samples that may follow it, which begin anew after the last
        self.begun = Counter()
        self.left = {}  # a prompt and what was said behind it: the lines that are left of each rollout that got there

    def next(self, ids):
        """The tokens of the turn behind these."""
        ids = tuple(ids)
        if ids in self.told:
            rest = self.told[ids][self.begun[ids] % len(self.told[ids])]
            self.begun[ids] += 1
        else:
            rest = self.left[max((said for said in self.left if ids[: len(said)] == said), key=len)].popleft()
        turn = [*self.tokenizer.encode(rest[0], add_special_tokens=False), self.tokenizer.eos_token_id]
        self.left.setdefault(ids + tuple(turn), deque()).append(rest[1:])
        return turn

    @classmethod
    def of(cls, chat, problems):
        """The script of some problems by `lines`."""
        script = cls(chat.tokenizer)
        for p in problems:
            script.told[tuple(chat.prompt_ids(p.messages, p.tools, p.tags))] += lines(p)
        return script


class Speaker(Engine):
    """Says a script; its log-probs are made up."""

    def __init__(self, script):
        self.script = script

    def generate(self, requests):
        turns = [self.script.next(request.prompt_ids) for request in requests]
        return [Completion(turn, [-1.0] * len(turn), True) for turn in turns]

    def push(self, weights):
        for _ in weights:
            pass


class SpeakingVllm(ColocatedVllm):
    """vLLM, which samples nothing but gives its own log-probs of what the script says: a run's check of both models holds."""

    def __init__(self, cfg, model_path):
        from transformers import AutoTokenizer

        super().__init__(cfg, model_path)
        task = make_task(cfg.task, cfg.seed, cfg.task_args)
        chat = Chat(AutoTokenizer.from_pretrained(model_path), task.tools, cfg.chat_template_args)
        own = cfg.prompts_per_rank, int(os.environ["RANK"])  # of a step's problems: how many are this rank's, and which
        indices = [i for i in range(cfg.rollout.prompts_per_step * cfg.train.steps) if i // own[0] % cfg.world_size == own[1]]
        trained = [task.train_problem(i) for i in indices]
        self.script = Script.of(chat, [*trained, *task.held_out(cfg.eval.prompts)])

    submit, collect = Engine.submit, Engine.collect  # whatever the schedule, all that waits at once

    def generate(self, requests):
        from vllm import SamplingParams

        turns = [self.script.next(request.prompt_ids) for request in requests]
        prompts = [{"prompt_token_ids": [*q.prompt_ids, *turn]} for q, turn in zip(requests, turns, strict=True)]
        scored = self.llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
        return [self._said(turn, out.prompt_logprobs[-len(turn) :]) for turn, out in zip(turns, scored, strict=True)]

    def _said(self, turn, logprobs):
        return Completion(turn, [step[token].logprob for token, step in zip(turn, logprobs, strict=True)], True, self.version)
