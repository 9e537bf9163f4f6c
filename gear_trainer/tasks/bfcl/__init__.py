"""The Berkeley function-calling leaderboard (package bfcl-eval): one user turn, several, and generated tasks of one class."""
