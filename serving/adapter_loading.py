"""Have a running vLLM take an adapter or let go of it, and say in words that help why it does not."""

import logging

from serving.adapter_check import AdapterRefused
from serving.adapter_record import Adapter
from serving.upstream import EngineGone, EngineRefusal, Upstream

# vLLM's words of an adapter whose folder is not there, and of a name that it has already.
NOT_THERE = "No adapter found for"
ALREADY_LOADED = "has already been loaded"

log = logging.getLogger("kangaroo.adapters")


async def give(adapter: Adapter, upstream: Upstream) -> bool:
    """Whether the engine has the adapter now; it has not where it ended meanwhile.

    Raises:
        AdapterRefused: it cannot have it; the message is the engine's own where nothing better is known.
    """
    try:
        await upstream.tell("/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter.folder)})
    except EngineGone:
        return False
    except EngineRefusal as error:
        said = str(error)
        if error.status == 404 and NOT_THERE not in said:
            raise AdapterRefused(
                "the engine takes no adapters while it runs. `kangaroo serve` starts its own so that it does, for each "
                "LLaVA that is not quantised; another vLLM does with --enable-lora, and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            ) from error
        if NOT_THERE in said:
            raise AdapterRefused(
                "the engine does not see the copy of it that is here; one on another machine must have the data folder "
                "(--data-folder) at the same path, on a disk that both share"
            ) from error
        if ALREADY_LOADED not in said or not await _is_ours_there(adapter, upstream):
            raise AdapterRefused(said.replace(str(adapter.folder), "its folder").rstrip(".")) from error
    return True


async def take_away(adapter: Adapter, upstream: Upstream) -> None:
    """Have the engine answer by this name no longer; it finishes what runs."""
    try:
        await upstream.tell("/v1/unload_lora_adapter", {"lora_name": adapter.name})
    except (EngineGone, EngineRefusal) as error:
        log.warning("The engine did not let go of the adapter %s: %s", adapter.name, error)


async def _is_ours_there(adapter: Adapter, upstream: Upstream) -> bool:
    """Whether the engine has this very copy by this name: one that somebody else started outlives its gateway."""
    try:
        models = await upstream.models()
    except EngineGone:
        return False
    return any(model["id"] == adapter.name and model.get("root") == str(adapter.folder) for model in models)
