"""All that is checked before an engine starts, and what the dry run prints: the resolved run and its memory plan."""
