"""What must not grow, against committed tables: bytes, operators, launches, synchronisations, times; registers and spills."""
