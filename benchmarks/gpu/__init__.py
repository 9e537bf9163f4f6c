"""The GPU report: all that only a GPU can tell, in three commands of under ten minutes; ../README.md says how to run it."""
