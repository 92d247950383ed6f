"""Start vLLM, watch it, and offer it to the world through a gateway."""
