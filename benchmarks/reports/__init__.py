"""The CPU's reports, one command each; a report measures and writes one JSON file of results/."""
