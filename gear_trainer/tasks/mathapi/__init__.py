"""Two-turn tool use on the executable `MathAPI` class of bfcl-eval."""
