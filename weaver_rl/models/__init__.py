"""Where the policy's first weights and its tokenizer come from: always, in the end, a Hugging Face directory.

Nothing here trains, samples or knows Ray. Start reading at `resolve.py`.
"""
