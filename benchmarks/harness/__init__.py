"""The ground that all benchmarks share: inputs and their float64 truth, the peers, clocks and memory, tables, the machine."""
