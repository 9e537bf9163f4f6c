"""A sandbox for Python that a model wrote: no network, no files but the interpreter's, limits on time, memory and output."""

from gear_trainer.sandbox.choice import cores, open_sandbox, shared_sandbox
from gear_trainer.sandbox.interpreter import End, Limits, Result, Sandbox, SandboxError
from gear_trainer.sandbox.means import MEANS

__all__ = ["MEANS", "End", "Limits", "Result", "Sandbox", "SandboxError", "cores", "open_sandbox", "shared_sandbox"]
