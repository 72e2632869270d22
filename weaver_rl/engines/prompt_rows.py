"""Log-probabilities of prompts at any temperature and under any adapter: what vLLM 0.32 leaves out.

Its first model runner computes the logits of prompts with the adapters of the rows that are sampled (which fails, or
is wrong), and always at temperature 1. It knows no tokens and no weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

TEMPERATURE = "prompt_temperature"
"""Key of `SamplingParams.extra_args`."""


def install(worker: Any) -> bool:
    """Makes the worker's model runner compute the log-probabilities of prompts one request at a time.

    Returns False, with nothing changed, for vLLM's second model runner, which does it another way.
    """
    runner = worker.model_runner
    if not hasattr(runner, "_get_prompt_logprobs_dict"):
        return False
    compute = runner._get_prompt_logprobs_dict

    def one_by_one(hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        asked: dict[str, int] = runner.num_prompt_logprobs
        found: dict[str, Any] = {}
        for request_id in [request_id for request_id in asked if request_id in num_scheduled_tokens]:
            request = runner.requests[request_id]
            alone = {request_id: asked[request_id]}
            runner.num_prompt_logprobs = alone
            try:
                _use_adapter(runner, request, num_scheduled_tokens[request_id])
                with _divided_logits(runner.model, (request.sampling_params.extra_args or {}).get(TEMPERATURE, 1.0)):
                    found |= compute(hidden_states, num_scheduled_tokens)
            finally:
                runner.num_prompt_logprobs = asked
            if not alone:  # the last piece of the prompt
                del asked[request_id]
        return found

    runner._get_prompt_logprobs_dict = one_by_one
    return True


def _use_adapter(runner: Any, request: Any, num_tokens: int) -> None:
    """Every row of logits from now on is this request's; the next step says anew whose its rows are."""
    if not runner.lora_config:
        return
    from vllm.lora.layers import LoRAMapping

    num_rows = min(num_tokens, len(request.prompt_token_ids) - 1 - request.num_computed_tokens)
    if num_rows > 0:
        rows = (request.lora_request.lora_int_id if request.lora_request else 0,) * num_rows
        runner.lora_manager.set_active_adapters(set(), LoRAMapping(rows, rows, is_prefill=True))


@contextlib.contextmanager
def _divided_logits(model: Any, temperature: float) -> Iterator[None]:
    if temperature == 1.0:
        yield
        return
    compute = model.compute_logits
    model.compute_logits = lambda *args, **kwargs: compute(*args, **kwargs) / temperature
    try:
        yield
    finally:
        del model.compute_logits
