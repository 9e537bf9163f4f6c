"""The Berkeley function-calling leaderboard, from the package bfcl-eval: one user turn, several, and generated tasks of one class."""
