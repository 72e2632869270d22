"""The base of every configuration section: frozen and strict. It knows nothing of files or overrides."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen pydantic model that refuses unknown keys, non-finite numbers and silent type changes of defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
