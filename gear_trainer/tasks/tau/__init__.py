"""Tasks of tau-bench: airline of tau-3 with a simulated user (`airline.py`), telecom and mock of tau-2 without one (`solo.py`)."""
