"""Inference engines: the only place that imports vLLM. Nothing here knows Ray, rewards or training."""
