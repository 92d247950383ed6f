"""Hold the adapters that are served beside the base: check and copy each, and see that the engine has it."""

import contextlib
import logging
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from assistant.hashing import weights_hash
from serving.adapter_check import AdapterRefused, check_adapter
from serving.adapter_loading import give, take_away
from serving.adapter_record import Adapter, read_notes, remove_note, remove_unnoted, write_note
from serving.engine import Engine, Phase, RemoteEngine, state_of
from serving.errors import ApiError
from serving.upstream import Upstream

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
MOST_OF_ONE_OWNER = 200
SECONDS_BETWEEN_LOOKS = 1.0

log = logging.getLogger("kangaroo.adapters")


@dataclass(frozen=True)
class AdapterPlaces:
    """Where adapters come from, and where they stay.

    Args:
        named: folders of adapters that are loaded at the start, by the names they are to have.
        folder: adapters below it are loaded when they are asked for; None: none are.
        kept: where copies outlive the gateway; None: they go away with it.
    """

    named: Mapping[str, Path] = field(default_factory=dict)
    folder: Path | None = None
    kept: Path | None = None


class AdapterShelf:
    """The adapters of one gateway, oldest first; those that outlive it are there again when it starts.

    Args:
        engine: is to have them; it loses them whenever it starts again, and gets them again before it is asked.
        upstream: the way to it.
        base_name: what clients call the base.
        base_folder: the folder of the base.
        places: where adapters come from.
    """

    def __init__(
        self, engine: Engine, upstream: Upstream, base_name: str, base_folder: Path, places: AdapterPlaces
    ) -> None:
        self._engine = engine
        self._upstream = upstream
        self.base_name = base_name
        self._base_folder = base_folder
        self.places = places
        self._adapters: dict[str, Adapter] = {}
        self._coming: set[str] = set()  # names that are being loaded
        self._left: list[Path] = []  # copies of unloaded ones: requests that still run may make vLLM read them again
        self._temporary: Path | None = None
        self._base_hash: str | None = None
        self._checking = anyio.Lock()  # one at a time: a check takes a core
        self._giving = anyio.Lock()

    def list(self, owner: str | None) -> list[Adapter]:
        """Those that the key named `owner` may use; None where no key is asked for."""
        return [adapter for adapter in self._adapters.values() if adapter.owner in (None, owner)]

    def find(self, name: str, owner: str | None) -> Adapter | None:
        """The adapter of that name, where the key named `owner` may use it."""
        return next((adapter for adapter in self.list(owner) if adapter.name == name), None)

    async def load(self, name: str, folder: Path, owner: str | None = None) -> Adapter:
        """Serve the adapter in `folder` by `name`, for the key named `owner` alone where one is given.

        It is checked and copied, and the engine gets it at once where it is ready, else before it is first asked.
        Raises ApiError with the reason where the name is taken, or the adapter cannot be served beside this base.
        """
        return await self._load(name, folder, owner, self.places.kept)

    async def unload(self, name: str) -> None:
        """Serve it no longer; answers that run are finished with it. Raises ApiError (404) where there is none."""
        async with self._giving:
            adapter = self._adapters.pop(name, None)
            if adapter is None:
                raise ApiError(404, f"There is no adapter `{name}`.", code="model_not_found")
            remove_note(adapter)
            self._left.append(adapter.folder)
            if self.is_held(adapter):
                await take_away(adapter, self._upstream)

    def is_held(self, adapter: Adapter) -> bool:
        """Whether the engine that runs now was given it."""
        return adapter.held_by == self._engine_now()

    async def hold(self, name: str) -> None:
        """See that the engine, which is ready, has the adapter `name`; the base and unknown names are no concern here.

        Raises ApiError (503) where it cannot have it.
        """
        adapter = self._adapters.get(name)
        if adapter is None or self.is_held(adapter):
            return
        async with self._giving:
            adapter = self._adapters.get(name)
            if adapter is not None and not self.is_held(adapter):
                try:
                    self._adapters[name] = await self._given(adapter)
                except AdapterRefused as error:
                    message = f"The adapter {name} cannot be loaded into the engine: {error}."
                    raise ApiError(503, message, code="adapter_not_loaded") from error

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this is open, the engine has its adapters; afterwards nothing is left that is not kept."""
        await self._bring_back()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._run)
                yield
                group.cancel_scope.cancel()
        finally:
            await self._clear()

    async def _run(self) -> None:
        """Load what is to be there from the start, and give each new engine what it lacks."""
        for name, folder in self.places.named.items():
            if name not in self._adapters:
                try:
                    await self._load(name, folder, None, kept=None)
                except ApiError as error:
                    log.error("%s", error)
        refused: set[tuple[Path, tuple[str, int]]] = set()  # which copy, and by which engine
        while True:
            if (await state_of(self._engine)).phase is Phase.READY:
                now = self._engine_now()
                for adapter in [each for each in self._adapters.values() if (each.folder, now) not in refused]:
                    try:
                        await self.hold(adapter.name)
                    except ApiError as error:
                        refused.add((adapter.folder, now))
                        log.error("%s", error)
            await anyio.sleep(SECONDS_BETWEEN_LOOKS)

    async def _clear(self) -> None:
        """Take the adapters out of an engine that lives on, and remove the copies that nobody keeps."""
        if isinstance(self._engine, RemoteEngine):
            for adapter in self._adapters.values():
                if self.is_held(adapter):
                    await take_away(adapter, self._upstream)
        for folder in [*self._left, *filter(None, [self._temporary])]:
            shutil.rmtree(folder, ignore_errors=True)

    async def _load(self, name: str, folder: Path, owner: str | None, kept: Path | None) -> Adapter:
        self._check_name(name, owner)
        self._coming.add(name)
        with contextlib.ExitStack() as undo:
            undo.callback(self._coming.discard, name)
            undo_copy = undo.enter_context(contextlib.ExitStack())
            try:
                target = (kept or self._temporary_folder()) / uuid.uuid4().hex
                undo_copy.callback(shutil.rmtree, target, ignore_errors=True)
                async with self._checking:
                    checked = await check_adapter(folder, self._base_folder, target)
                adapter = Adapter(name, owner, int(time.time()), checked.modules, checked.rank, target)
                of_base = await self._hash_of_base() if kept is not None else None
                async with self._giving:
                    if (await state_of(self._engine)).phase is Phase.READY:
                        adapter = await self._given(adapter)
                    if of_base is not None:
                        write_note(adapter, of_base)
                    self._adapters[name] = adapter
            except AdapterRefused as error:
                reason = str(error).replace(str(folder), folder.name).replace(str(self._base_folder), self.base_name)
                message = f"The adapter {name} cannot be served: {reason}."
                raise ApiError(400, message, param="folder", code="adapter_refused") from error
            except OSError as error:
                raise ApiError(503, f"The adapter {name} cannot be kept: {error.strerror}.") from error
            undo_copy.pop_all()
        log.info("The adapter %s is loaded: rank %d on %d modules.", name, adapter.rank, adapter.modules)
        if checked.warning is not None:
            log.warning("%s", checked.warning)
        return adapter

    def _check_name(self, name: str, owner: str | None) -> None:
        if not NAME.fullmatch(name):
            message = f"name: {name!r} is no name for an adapter; use up to 128 letters, digits and . _ : / -"
            raise ApiError(400, message, param="name")
        if name == self.base_name:
            raise ApiError(409, f"name: `{name}` is the base itself; choose another name.", param="name")
        if name in self._adapters or name in self._coming:
            raise ApiError(409, f"name: `{name}` is taken; choose another, or unload that one first.", param="name")
        if sum(adapter.owner == owner for adapter in self._adapters.values()) >= MOST_OF_ONE_OWNER:
            raise ApiError(400, f"There are {MOST_OF_ONE_OWNER} adapters already; unload one first.")

    async def _given(self, adapter: Adapter) -> Adapter:
        """The adapter as the engine, which is ready, holds it now. Raises AdapterRefused in the engine's words."""
        now = self._engine_now()
        return replace(adapter, held_by=now) if await give(adapter, self._upstream) else adapter

    async def _bring_back(self) -> None:
        if self.places.kept is None:
            return
        try:
            self.places.kept.mkdir(parents=True, exist_ok=True)
            found = remove_unnoted(self.places.kept)
            for adapter in read_notes(found, await self._hash_of_base()) if found else []:
                self._adapters[adapter.name] = adapter
        except OSError as error:
            log.error("The adapters in %s cannot be brought back: %s.", self.places.kept, error.strerror)

    async def _hash_of_base(self) -> str:
        """Computed when it is first needed: gigabytes take seconds."""
        if self._base_hash is None:
            self._base_hash = await anyio.to_thread.run_sync(weights_hash, self._base_folder)
        return self._base_hash

    def _engine_now(self) -> tuple[str, int]:
        return self._engine.base_url, self._engine.restarts

    def _temporary_folder(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="kangaroo-adapters-"))
        return self._temporary
