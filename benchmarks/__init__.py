"""Side-by-side measurements: gear_kernels against its peers. `python -m benchmarks.cpu_report` writes benchmarks/results/."""
