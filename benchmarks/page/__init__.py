"""docs/performance.md, its pictures and the README's figures, from the JSON files of results/ alone."""
