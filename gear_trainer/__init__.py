"""A thin DeepSpeed ZeRO-3 + vLLM trainer for LLM agents with adaptive-granularity credit (GEAR)."""
