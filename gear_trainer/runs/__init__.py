"""A run as files and processes: its folder and lock, its numbers, who ends it, and which rank was lost."""
