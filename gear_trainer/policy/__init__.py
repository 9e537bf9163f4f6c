"""The policy: a Hugging Face model under ZeRO-3 whose forward returns statistics, its batches, weights and checkpoints."""
