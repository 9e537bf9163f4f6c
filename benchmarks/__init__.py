"""Side-by-side measurements, gear_kernels beside its peers, and the gates on what must not grow; README.md says how to run them.

Imports run downwards: page (what is drawn and written from results/), then reports, gpu and gates (what is measured), then
harness (what these share). The bench_*.py files are `pytest benchmarks`.
"""
