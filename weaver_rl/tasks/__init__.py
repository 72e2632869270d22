"""Prompts plus how they are judged: where problems come from, how they are rendered, what their own scorer says.

Nothing here knows the learner, the sampler or Ray. Start reading at `task.py`.
"""
