"""Gates on what must not grow: bytes, operators, launches, synchronisations, times; registers and spills, by committed tables."""
