"""Chains of dependent tool calls with a known solution: what a policy did wrong, and where, is known exactly."""
