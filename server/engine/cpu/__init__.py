"""The LoRA op on CPU, and how vLLM's layers come to use it."""
