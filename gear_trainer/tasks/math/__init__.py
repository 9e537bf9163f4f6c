"""Word problems and competition mathematics: answers read from text, checked by math-verify."""
