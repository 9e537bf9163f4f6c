"""Credit methods against the measured truth of credit: `python -m benchmarks.credit_truth FILE... --out DIR`.

`rollouts.py` reads what `gear-trainer audit` writes, `measures.py` says what is asked of a method, `methods.py` who is asked,
controls among them, `scoring.py` gives the answers with intervals; `sweeps.py` varies GEAR's options, `pictures.py` draws,
`evidence.py` tells whether committed figures moved, `synthetic.py` makes trajectories with a planted truth.
"""
