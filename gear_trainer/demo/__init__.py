"""The demonstration's models: a tiny Qwen3 warmed up on its task, and SmolLM2. Nothing imports it but what builds a run."""
