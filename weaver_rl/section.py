"""The base of every configuration section: frozen and strict. It knows nothing of files or overrides."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen pydantic model that refuses unknown keys, non-finite numbers and true or false for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # Not strict mode: that would also refuse 1e-4, which YAML reads as text. Not a validator of the fields: pydantic
    # allows none on the `name` that tells alternatives apart.
    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: _TruthValue(value) if isinstance(value, bool) and cls._wants_number(key) else value
            for key, value in data.items()
        }

    @classmethod
    def _wants_number(cls, key: Any) -> bool:
        kinds = _alternatives(cls.model_fields[key].annotation) if key in cls.model_fields else set()
        return bool(kinds & {int, float}) and not kinds & {bool, Any}


class _TruthValue:
    """Stands for true or false where a number is needed: pydantic takes it for no number, and shows it as it was."""

    def __init__(self, value: bool) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)


def _alternatives(annotation: Any) -> set[Any]:
    """The types that a union is made of, or the one type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _alternatives(part)}
    return {annotation if origin is None else origin}
