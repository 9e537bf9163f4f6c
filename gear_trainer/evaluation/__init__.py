"""Held-out problems on any engine: training's passes between its steps, and whole evaluations of a finished model."""

from gear_trainer.evaluation.held_out import HeldOut, check_sets, measure, sets_of

__all__ = ["HeldOut", "check_sets", "measure", "sets_of"]
