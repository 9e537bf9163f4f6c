"""ACEBench: calls and diagnoses in one turn (`single.py`), and agents in simulated phones and airlines (`agent.py`)."""
