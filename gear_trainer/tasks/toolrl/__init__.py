"""ToolRL's data: calls and words in one turn on a given history, with its graded reward."""
