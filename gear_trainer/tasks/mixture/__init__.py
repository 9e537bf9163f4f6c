"""A mixture of tasks in one run."""
