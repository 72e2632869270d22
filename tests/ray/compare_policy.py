"""Run as a program: loads a policy in plain vLLM and in transformers, prints the largest |Δ log-probability|.

In a process of its own, since vLLM changes the process it lives in.
"""

from __future__ import annotations

import os
import sys


def main(directory: str) -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    engine = LLM(
        directory, dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=32 << 20, max_num_seqs=8
    )
    worst = 0.0
    outputs = engine.generate(["3 + 4 =", "9 - 5 ="], SamplingParams(temperature=0.0, max_tokens=6, logprobs=0))
    for output in outputs:
        prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        assert tokenizer(output.prompt)["input_ids"] == prompt
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        for position, (token, entry) in enumerate(zip(tokens, output.outputs[0].logprobs, strict=True)):
            expected = float(logprobs[len(prompt) - 1 + position, token])
            worst = max(worst, abs(entry[token].logprob - expected))
    sys.stdout.write(f"{worst}\n")


main(sys.argv[1])
