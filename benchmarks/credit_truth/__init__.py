"""Credit methods against the measured truth of credit: `python -m benchmarks.credit_truth FILE... --out DIR`.

`rollouts.py` reads the files that `gear-trainer audit` writes, `measures.py` says what is asked of a method, `methods.py` who is
asked, controls among them, `scoring.py` gives the answers with intervals; `sweeps.py` and `pictures.py` draw them. docs/credit_truth.md.
"""
