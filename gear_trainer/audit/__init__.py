"""The audit: what each token of sampled trajectories was worth, measured, in one file that credit methods are scored on."""
