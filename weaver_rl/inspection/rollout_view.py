"""Why a rollout got its importance weights, in the terminal. It prints what was found and computes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from weaver_rl.inspection.explanation import Check, Explanation, GroupFigures, TokenFactors
from weaver_rl.inspection.terminal_text import clipped, plain
from weaver_rl.token_texts import TokenTexts

MAX_TOKENS_PRINTED = 120
"""Rows of the table of tokens; `--json` has all."""
MAX_MEMBERS_PRINTED = 16
_BLUE, _RED, _PINK = (47, 116, 224), (221, 90, 42), (217, 79, 106)
_LOWEST_LOGPROB = -5.0
_COLORS = {True: "", None: "yellow", False: "red"}
"""Of a stored number: came out again, was not computed again, differs."""


def print_rollout(console: Console, found: Explanation, tokens: TokenTexts) -> None:
    """Prints prompt, completion, and every factor from the rewards to the weights."""
    console.print(Group(*_parts(found, tokens)), highlight=False)


def _parts(found: Explanation, tokens: TokenTexts) -> Iterator[RenderableType]:
    record = found.record
    rollout = record.scored.rollout
    yield Text.assemble((f"rollout {plain(rollout.rollout_id, one_line=True)}", "bold"), "  ", _about(found))
    yield _rule("prompt")
    yield Text(plain(rollout.prompt.text))
    yield _rule("completion", _coloured_by(found))
    yield _completion(found, tokens)
    if rollout.prompt.answer is not None:
        yield _rule("answer")
        yield Text(plain(rollout.prompt.answer))
    yield _rule("1  reward", "Σ weight · value")
    yield from _reward(found)
    if record.phase == "train":
        formula = "" if found.group is None else f"{found.group.estimator}: {found.group.formula}"
        yield _rule("2  advantage", formula)
        if found.group is not None:
            yield from _group(found, found.group)
        yield from _advantage(found)
    if record.phase == "train":
        yield _rule("3  importance weights", "advantage · correction, clipped by the loss")
        yield from _weights(found, tokens)
    for note in found.notes:
        yield Text(f"note: {plain(note)}", "yellow")
    yield _verdict(found)


def _about(found: Explanation) -> str:
    record = found.record
    completion = record.scored.rollout.completion
    return (
        f"step {record.step} · {record.phase} · {plain(record.sampler, one_line=True)} · "
        f"{len(completion.token_ids_L)} tokens, {completion.stop_reason}"
    )


def _rule(title: str, more: str = "") -> Rule:
    return Rule(Text.assemble((title, "bold"), (f"  {more}" if more else "", "dim")), align="left", style="dim")


def _coloured_by(found: Explanation) -> str:
    if found.record.importance_weights_L is not None:
        return "coloured by importance weight: blue up, red down"
    return "coloured by log-probability: the stronger, the less likely"


def _completion(found: Explanation, tokens: TokenTexts) -> Text:
    text = Text()
    strongest = max((abs(token.weight.stored or 0.0) for token in found.tokens), default=0.0)
    for index, token in enumerate(found.tokens):
        label = tokens.labels.get(index)
        shown = f"⟨{plain(label, one_line=True)}⟩" if label is not None else plain(tokens.texts[index])
        text.append(shown, _style(token, strongest))
    return text


def _style(token: TokenFactors, strongest: float) -> Style:
    weight = token.weight.stored
    if weight is None:
        return _tint(_PINK, min(1.0, token.sampler_logprob / _LOWEST_LOGPROB))
    return _tint(_BLUE if weight > 0 else _RED, abs(weight) / strongest if strongest else 0.0)


def _tint(color: tuple[int, int, int], share: float) -> Style:
    """Towards the colour from a dark ground, with white letters: readable in dark and light terminals."""
    if share < 0.02:
        return Style()
    red, green, blue = (round(40 + (channel - 40) * share) for channel in color)
    return Style(color="white", bgcolor=f"rgb({red},{green},{blue})")


def _reward(found: Explanation) -> Iterator[RenderableType]:
    table = _table("component", "weight", "value", "weight · value", "seconds")
    for part in found.parts:
        product = None if part.weight is None or part.value is None else part.weight * part.value
        value = Text(_number(part.value)) if part.missing is None else Text(f"missing: {plain(part.missing)}", "red")
        table.add_row(
            Text(plain(part.name, one_line=True)),
            _number(part.weight),
            value,
            "not counted" if part.weight == 0 else _number(product),
            f"{part.seconds:.3g}",
        )
    yield table
    yield Text.assemble("reward = ", (_number(found.reward.again), "bold"), "  ", _compared(found.reward))


def _group(found: Explanation, group: GroupFigures) -> Iterator[RenderableType]:
    num_scored = sum(reward is not None for reward in group.rewards)
    facts = [f"group {plain(group.group_id, one_line=True)}: {num_scored} of {len(group.rewards)} scored"]
    facts += [f"mean {_number(group.mean)}"] if group.mean is not None else []
    facts += [f"std {_number(group.std)}"] if group.std is not None else []
    facts += [f"eps {group.eps:g}"] if group.eps is not None else []
    if group.estimator == "reinforce":
        facts.append("no running baseline" if group.baseline is None else f"baseline {_number(group.baseline)}")
    yield Text("   ".join(facts))
    table = _table("rollout", "reward", "advantage")
    own = found.record.scored.rollout.rollout_id
    for rollout_id, reward, advantage in list(zip(group.rollout_ids, group.rewards, group.advantages, strict=True))[
        :MAX_MEMBERS_PRINTED
    ]:
        mark = " ← this one" if rollout_id == own else ""
        table.add_row(
            Text(plain(rollout_id, one_line=True) + mark, "bold" if mark else ""), _number(reward), _number(advantage)
        )
    yield table
    if len(group.rollout_ids) > MAX_MEMBERS_PRINTED:
        yield Text(f"… and {len(group.rollout_ids) - MAX_MEMBERS_PRINTED} more", "dim")


def _advantage(found: Explanation) -> Iterator[RenderableType]:
    if found.record.dropped is not None:
        yield Text(f"not trained on: {plain(found.record.dropped)}", "red")
    yield Text.assemble("advantage = ", (_number(found.advantage.again), "bold"), "  ", _compared(found.advantage))


def _weights(found: Explanation, tokens: TokenTexts) -> Iterator[RenderableType]:
    yield Text(f"correction {found.correction}   loss {found.loss}   normaliser Σ w = {_number(found.sum_weights)}")
    table = _table("token", "v", "sampler", "learner", "ratio", "factor", "weight", "in loss", "stored")
    for index, token in enumerate(found.tokens[:MAX_TOKENS_PRINTED]):
        label = tokens.labels.get(index)
        table.add_row(
            Text(clipped(repr(tokens.texts[index]), 18) if label is None else f"⟨{clipped(label, 16)}⟩"),
            f"v{token.version}",
            _number(token.sampler_logprob),
            _number(token.learner_logprob),
            _number(token.ratio),
            Text(_number(token.correction), "red" if token.correction == 0 else ""),
            _number(token.weight.again),
            Text(_number(token.loss_weight) + (" clipped" if token.is_clipped else ""), "yellow" * token.is_clipped),
            Text("equal" if token.weight.equal else _number(token.weight.stored), _COLORS[token.weight.equal]),
        )
    yield table
    if len(found.tokens) > MAX_TOKENS_PRINTED:
        yield Text(f"… and {len(found.tokens) - MAX_TOKENS_PRINTED} more tokens; --json has all", "dim")


def _verdict(found: Explanation) -> Text:
    if found.equal:
        return Text("Everything came out again as it is stored, bit for bit.", "green")
    checks = [("reward", found.reward.equal), ("advantage", found.advantage.equal)]
    different = [name for name, equal in checks if equal is False]
    missing = [name for name, equal in checks if equal is None]
    difference = found.largest_weight_difference
    if difference is None:
        missing.append("importance weights")
    elif math.isinf(difference):
        different.append("importance weights (only one side has them)")
    elif difference:
        different.append(f"importance weights (by at most {difference:.3g})")
    parts = [Text(f"Different from what is stored: {', '.join(different)}.", "red")] if different else []
    parts += [Text(f"Not computed again: {', '.join(missing)}.", "yellow")] if missing else []
    return Text(" ").join(parts)


def _compared(check: Check) -> Text:
    if check.equal:
        return Text("as stored" if check.stored is not None else "none, as stored", "dim")
    if check.equal is None:
        return Text(f"stored {_number(check.stored)}, not computed again", "yellow")
    by = ""
    if check.stored is not None and check.again is not None:
        by = f", different by {check.again - check.stored:.3g}"
    return Text(f"stored {_number(check.stored)}{by}", "red")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        words = index == 0 or column in ("token", "value")
        table.add_column(
            column, justify="left" if words else "right", no_wrap=not words, min_width=10 * words, overflow="fold"
        )
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
