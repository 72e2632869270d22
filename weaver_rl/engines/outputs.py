"""vLLM's outputs as records of ours. It knows neither the engine nor its state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from weaver_rl.errors import EngineError
from weaver_rl.types import Completion, Float32Array, PromptLogprobs, StopReason

if TYPE_CHECKING:
    from vllm import RequestOutput


def completion_of(output: RequestOutput, version: int) -> Completion:
    """The one completion of a request; `version` is that of tokens of which vLLM tells none."""
    result = output.outputs[0]
    if result.logprobs is None:
        raise EngineError(f"vLLM returned no log-probabilities for {output.request_id}")
    token_ids = np.asarray(result.token_ids, dtype=np.int32)
    logprobs = np.fromiter(_chosen(result.logprobs, result.token_ids), dtype=np.float32, count=len(token_ids))
    versions = np.full(len(token_ids), version, dtype=np.int32)
    for span in result.weight_versions or []:
        versions[span.start : span.end] = int(span.version)
    reason = result.finish_reason
    if reason not in ("stop", "length", "abort"):
        raise EngineError(f"vLLM ended {output.request_id} with reason {reason!r}")
    return Completion(
        token_ids_L=token_ids, logprobs_L=logprobs, versions_L=versions, stop_reason=cast("StopReason", reason)
    )


def prompt_logprobs_of(output: RequestOutput, num_top: int) -> PromptLogprobs | None:
    """What was asked for with `prompt_logprobs`; None where the prompt was not gone through yet."""
    tokens = output.prompt_token_ids or []
    entries = output.prompt_logprobs or []
    if len(entries) != len(tokens):
        return None
    top = tuple(_likeliest(entry, num_top) for entry in entries) if num_top else ()
    return PromptLogprobs(logprobs_P=prompt_scores(entries, tokens), top_P=top)


def prompt_scores(entries: Any, tokens: Sequence[int]) -> Float32Array:
    """Log-probability of each token of a prompt, NaN for the first."""
    return np.fromiter((np.nan, *_chosen(entries[1:], tokens[1:])), dtype=np.float32, count=len(tokens))


def score_of(output: RequestOutput, token_ids: Sequence[int]) -> Float32Array:
    """Log-probabilities (N,) of a sequence that was scored, NaN for the first.

    Its last token is the last of the prompt or, where there was no room, the one that the sampled one stands for.
    """
    prompt = output.prompt_token_ids or []
    scores = prompt_scores(output.prompt_logprobs or [], prompt)
    if len(prompt) == len(token_ids):
        return scores
    last = _chosen(output.outputs[0].logprobs or [], token_ids[-1:])
    return np.append(scores, np.fromiter(last, dtype=np.float32))


def _chosen(entries: Any, tokens: Sequence[int]) -> Iterator[float]:
    """The log-probability of each token out of vLLM's per-position dictionaries."""
    for entry, token in zip(entries, tokens, strict=True):
        if entry is None:
            raise EngineError(f"vLLM returned no log-probability for token {token}")
        yield entry[token].logprob


def _likeliest(entry: Any, num_top: int) -> tuple[tuple[int, float], ...]:
    """The `num_top` likeliest tokens; the token of the prompt is in the dictionary whatever its rank."""
    found = [(value.rank, token, value.logprob) for token, value in (entry or {}).items() if value.rank <= num_top]
    return tuple((token, logprob) for _, token, logprob in sorted(found))
