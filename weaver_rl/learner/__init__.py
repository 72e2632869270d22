"""One rank of the learner: gradients, updates, state and weights of a policy. It knows neither Ray nor vLLM."""
