"""An engine of one's own, whole: it decodes made-up turns, one token a step for as many requests as it has slots.

`rollout.engine=scripted_engine:Scripted` names it in a configuration, `rollout.engine_options.slots=8` sets it up.
"""

from __future__ import annotations

import random

from gear_trainer.rollout import Completion, Engine


class Scripted(Engine):
    """Turns of 1 to `longest` tokens, drawn by the request's seed alone, each closed by `eos`.

    `steps` counts decoding steps, `busy` the slots that had something to decode in them.
    """

    def __init__(self, cfg, model_path, slots=4, longest=32, eos=1):
        self.slots, self.longest, self.eos = slots, longest, eos
        self.running = {}  # ticket: the completion, and how many of its tokens are decoded
        self.steps = self.busy = 0

    def generate(self, requests):
        for ticket, request in enumerate(requests):
            self.submit(ticket, request)
        done = {}
        while self.running:
            done |= dict(self.collect())
        return [done[ticket] for ticket in range(len(requests))]

    def submit(self, ticket, request):
        self.running[ticket] = [self._turn(request), 0]

    def collect(self):
        """One step: the first requests in line have a token decoded each."""
        at_work = list(self.running)[: self.slots]
        self.steps, self.busy = self.steps + 1, self.busy + len(at_work)
        for ticket in at_work:
            self.running[ticket][1] += 1
        ended = [ticket for ticket in at_work if self.running[ticket][1] == len(self.running[ticket][0].ids)]
        return [(ticket, self.running.pop(ticket)[0]) for ticket in ended]

    def push(self, weights):
        for _ in weights:
            pass  # it has none of its own
        self.version += 1

    @property
    def idle_share(self):
        """Of all slots in all steps, those with nothing to decode."""
        return 1 - self.busy / (self.steps * self.slots)

    def _turn(self, request):
        rng = random.Random(request.seed)
        ids = [rng.randrange(2, 100) for _ in range(rng.randrange(self.longest))] + [self.eos]
        cut = ids[: request.max_tokens]
        return Completion(cut, [-1.0] * len(cut), len(cut) == len(ids), self.version)
