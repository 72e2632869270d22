"""The adapters that an engine has in memory, and which of them are in use. It knows no groups and no sampling.

vLLM would read an adapter inside an engine step, whenever it is needed and not in its cache; a file that is gone by
then ends every request. Here it is read before its first request is added, and stays while one needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weaver_rl.engines.adapter_files import check_adapter
from weaver_rl.engines.config import LoraLimits
from weaver_rl.engines.weight_files import Shapes
from weaver_rl.errors import EngineError
from weaver_rl.types import Adapter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

VLLM_CACHE = 1 << 20
"""Adapters that vLLM may hold: more than there will be, so that it never lets one go by itself."""


@dataclass(slots=True)
class LoadedAdapter:
    """An adapter in memory."""

    adapter: Adapter
    request: LoRARequest
    num_users: int = 0
    """Groups and scores in flight that need it."""


class LoadedAdapters:
    """Loads, counts and lets go.

    Args:
        base: shapes of the model's weights, by their Hugging Face names.
    """

    def __init__(self, engine: LLMEngine, limits: LoraLimits, base: Shapes) -> None:
        self._engine = engine
        self._limits = limits
        self._base = base
        self._by_name: dict[str, LoadedAdapter] = {}
        """Least recently used first."""
        self._next_id = 1

    def use(self, adapter: Adapter) -> LoadedAdapter:
        """The adapter, in memory until it is released as often as it was used.

        Raises EngineError for a directory that is no adapter of this model, and for a known name with another one.
        """
        loaded = self._by_name.pop(adapter.name, None)
        if loaded is not None and loaded.adapter != adapter:
            self._by_name[adapter.name] = loaded
            raise EngineError(
                f"adapter {adapter.name} was loaded from {loaded.adapter.directory}, now {adapter.directory} is asked "
                "for: another content needs another name"
            )
        loaded = loaded or self._load(adapter)
        self._by_name[adapter.name] = loaded
        loaded.num_users += 1
        return loaded

    def release(self, loaded: LoadedAdapter) -> None:
        """One user less."""
        loaded.num_users -= 1
        if self._by_name.get(loaded.adapter.name) is not loaded:
            if not loaded.num_users:
                self._engine.remove_lora(loaded.request.lora_int_id)
            return
        idle = [name for name, other in self._by_name.items() if not other.num_users]
        for name in idle[: max(0, len(idle) - self._limits.max_idle)]:
            self.forget(name)

    def forget(self, name: str) -> None:
        """The next use of this name reads its directory again; whoever uses it now keeps what there is."""
        loaded = self._by_name.pop(name, None)
        if loaded is not None and not loaded.num_users:
            self._engine.remove_lora(loaded.request.lora_int_id)

    def _load(self, adapter: Adapter) -> LoadedAdapter:
        from vllm.lora.request import LoRARequest

        check_adapter(adapter.directory, max_rank=self._limits.max_rank, base=self._base)
        number, self._next_id = self._next_id, self._next_id + 1
        # Cached prefixes go by name and path: with the number no later adapter can meet those of an earlier one.
        request = LoRARequest(f"{number}:{adapter.name}", number, str(adapter.directory.absolute()))
        try:
            self._engine.add_lora(request)
        except Exception as error:  # boundary: whatever vLLM says
            self._engine.remove_lora(number)
            raise EngineError(f"adapter {adapter.name} in {adapter.directory} cannot be loaded: {error}") from error
        return LoadedAdapter(adapter, request)
