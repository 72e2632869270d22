"""What an inspection found, as JSON for machines: the same figures as in the terminal, all of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from weaver_rl.inspection.explanation import Check, Explanation, TokenFactors
from weaver_rl.inspection.step_figures import StepFigures


def step_json(figures: StepFigures) -> str:
    """One object: metrics, groups, what was dropped and missing, the ledger of the step."""
    return _dump(asdict(figures))


def rollout_json(found: Explanation, token_texts: tuple[str, ...] | None) -> str:
    """One object: prompt, completion, and every factor of its importance weights. `token_texts`: one per token.

    `equal` is null for what was not computed again; of the whole, where nothing differs and not all was computed.
    """
    record = found.record
    rollout = record.scored.rollout
    return _dump(
        {
            "rollout_id": rollout.rollout_id,
            "step": record.step,
            "phase": record.phase,
            "sampler": record.sampler,
            "prompt": rollout.prompt.text,
            "answer": rollout.prompt.answer,
            "completion": rollout.text,
            "stop_reason": rollout.completion.stop_reason,
            "dropped": record.dropped,
            "parts": [asdict(part) for part in found.parts],
            "reward": _check(found.reward),
            "group": None if found.group is None else asdict(found.group),
            "advantage": _check(found.advantage),
            "correction": found.correction,
            "loss": found.loss,
            "sum_weights": found.sum_weights,
            "tokens": [
                _token(token, None if token_texts is None else token_texts[i]) for i, token in enumerate(found.tokens)
            ],
            "largest_weight_difference": found.largest_weight_difference,
            "equal": found.equal,
            "notes": found.notes,
        }
    )


def _token(token: TokenFactors, text: str | None) -> dict[str, Any]:
    figures = asdict(token) | {"weight": _check(token.weight)}
    return figures | {"text": text, "ratio": token.ratio, "clipped": token.is_clipped}


def _check(check: Check) -> dict[str, Any]:
    return {"stored": check.stored, "again": check.again, "equal": check.equal}


def _dump(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, ensure_ascii=True, allow_nan=False)


def _finite(value: Any) -> Any:
    """null for what JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
