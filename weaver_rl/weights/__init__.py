"""Versions of the weights on their way from the learner to the samplers, and the proof that they arrived."""
