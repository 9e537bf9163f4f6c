"""Tasks of tau-bench: airline (tau-3) with a simulated user, `airline.py`; telecom and mock (tau-2) without one, `solo.py`."""
