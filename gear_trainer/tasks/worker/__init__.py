"""Environments that need a Python of their own, as ToolSandbox and AppWorld: a worker process there, JSON lines between.

`serve.py` and the files in `served/` run in that other Python and import nothing of the trainer.
"""
