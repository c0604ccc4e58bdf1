"""What one device keeps: its personal adapter, its ledger, and caches.

    ledger.jsonl, outbox/,    privacy.ledger.ledger; its head lies elsewhere
    enrolled
    seed                      of the device's ordinary random streams
    cache/                    pictures as latents, the base's loss on them, and what a pass takes: all found again when
                              missing or damaged

and of one federation, each in a folder of its own (`client.store.layout`):

    personal.safetensors      the personal adapter with the shared one that it sits on, behind a mark of ours
    previous….safetensors     those that it had before, for `roll_back` (`client.store.generations`)
    residual.safetensors      what rounding left of the last change that was sent
    variate.safetensors       SCAFFOLD's control variate, before the last round and after it
    own.safetensors           the factors B of a run that shares A alone
    previews/                 what its owner is shown of what was learnt

On a real device these are files of one folder, and beside them lies policy.toml, what the owner allows, written by
hand. Every write is atomic.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from client.store.generations import AdapterVersion, AdapterVersions, metadata, plain
from client.store.layout import CACHE, LOCAL_FACTORS, PERSONAL, PREVIEWS, RESIDUAL, SEED, VARIATE, federation_prefix
from common.errors import AntherError
from models.lora.adapter import Adapter, Sites, adapter_shapes, from_tensors, rank, to_tensors
from privacy.ledger.ledger import DeviceLedger
from privacy.storage import Storage
from training.jobs import Examples


class PersonalAdapter(NamedTuple):
    """A device's own adapter, of use only on top of the shared one that it was trained on."""

    adapter: Adapter
    shared: Adapter
    base: str  # content hash of the base
    request: str  # what asked for it: asked again, it is there already


class Residual(NamedTuple):
    """What rounding left of a round's change, by the names that it travels under: for the next change, once."""

    compatibility_key: str  # what a round must have in common with this one to take it
    round: int
    left: dict[str, Tensor]
    carried: dict[str, Tensor]  # what was left to this round: for this one again, if it is asked for again


class ControlVariateState(NamedTuple):
    """A device's control variate, by the names that what it corrects travels under."""

    compatibility_key: str  # as of a Residual
    round: int
    before: dict[str, Tensor]  # for this round again, if it is asked for again
    after: dict[str, Tensor]


OfRound = TypeVar("OfRound", Residual, ControlVariateState)


class LocalFactors(NamedTuple):
    """The factors B that a device trained in a run and keeps, by site."""

    run: str
    promise: str  # under which it was trained
    round: int
    after: dict[str, Tensor]
    before: dict[str, Tensor]  # for this round again, if it is asked for again


class Store:
    """What one device keeps in its storage.

    Args:
        federation: the id of the one whose adapters, and what its rounds left, this is about; None: of one without.
    """

    def __init__(self, storage: Storage, federation: str | None = None) -> None:
        self.ledger = DeviceLedger(storage)  # one, whoever got what it counts: the pictures are the same
        self._storage, self._under = storage, federation_prefix(federation)
        self._generations = AdapterVersions(storage, self._under)

    @property
    def where(self) -> str:
        """Where a person finds all of it."""
        return self._storage.where(self._under)

    def _read(self, name: str) -> bytes | None:
        """Of this federation."""
        return self._storage.read(self._under + name)

    def _write(self, name: str, data: bytes) -> None:
        self._storage.write(self._under + name, data)

    def _where(self, name: str) -> str:
        return self._storage.where(self._under + name)

    def save_personal(self, personal: PersonalAdapter, *, aside: bool = False) -> None:
        """Replace the personal adapter; `aside`: the one there, with its shared one, becomes a previous one."""
        tensors = _prefixed("personal", personal.adapter) | _prefixed("shared", personal.shared)
        self._generations.save(tensors, {"base": personal.base, "request": personal.request}, aside=aside)

    def personal(self, sites: Sites) -> PersonalAdapter | None:
        """The personal adapter with what it sits on; None before the first one is trained.

        Raises:
            AntherError: it is damaged, or made for other sites.
        """
        try:
            data = self._read(PERSONAL)
            if data is None:
                return None
            tensors, metadata = _load(data)
            parts = {name: _part(tensors, name, sites) for name in ("personal", "shared")}
            if len(tensors) != sum(2 * len(part) for part in parts.values()):
                raise ValueError("it holds other tensors")
            return PersonalAdapter(parts["personal"], parts["shared"], metadata["base"], metadata["request"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AntherError(
                f"{self._where(PERSONAL)}: not a personal adapter for this base ({error}); "
                "remove it and personalise again"
            ) from error

    def personal_sites(self) -> tuple[str, ...]:
        """Where the personal adapter has its factors: the names of the base's layers; none before the first one."""
        try:
            tensors, _ = _load(self._read(PERSONAL) or save({}))
        except (SafetensorError, ValueError):
            return ()  # `personal` says what is wrong with it
        names = (name.partition("/") for name in tensors)
        return tuple(sorted({site.rpartition(".")[0] for part, _, site in names if part == "personal"}))

    def personal_versions(self) -> list[AdapterVersion]:
        """The personal adapters that are kept, the newest first."""
        return self._generations.listed()

    def roll_back(self, to: str | None = None) -> AdapterVersion:
        """Return to a previous personal adapter, with the shared one under it; the present one is kept in its place.

        The next one that is trained is measured against it, as against any other.

        Args:
            to: as `personal_versions` names it; None: the newest that is older than the present one.

        Raises:
            AntherError: there is none.
        """
        return self._generations.roll_back(to)

    def save_residual(self, residual: Residual) -> None:
        self._save_of_round(RESIDUAL, residual)

    def residual(self, compatibility_key: str) -> Residual | None:
        """The last one, if it is for rounds such as this; a damaged one is none: it would have been lost, no more."""
        return self._of_round(RESIDUAL, Residual, compatibility_key)

    def save_variate(self, variate: ControlVariateState) -> None:
        self._save_of_round(VARIATE, variate)

    def variate(self, compatibility_key: str) -> ControlVariateState | None:
        """As `residual`."""
        return self._of_round(VARIATE, ControlVariateState, compatibility_key)

    def _save_of_round(self, file: str, kept: Residual | ControlVariateState) -> None:
        compatibility_key, number, *parts = kept
        tensors = {
            f"{part}/{name}": tensor
            for part, named in zip(kept._fields[2:], parts, strict=True)
            for name, tensor in named.items()
        }
        self._write(file, save(tensors, {"follows": compatibility_key, "round": str(number)}))

    def _of_round(self, file: str, kind: type[OfRound], compatibility_key: str) -> OfRound | None:
        try:
            tensors, metadata = _load(self._read(file) or b"")
            if metadata["follows"] != compatibility_key:
                return None
            return kind(
                compatibility_key, int(metadata["round"]), *(_under(tensors, part) for part in kind._fields[2:])
            )
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save_local_factors(self, own: LocalFactors) -> None:
        parts = {"after": own.after, "before": own.before}
        # Clones: of a site that was not trained both are one tensor, which the format doesn't hold twice.
        tensors = {
            f"{part}/{name}": t.clone().contiguous() for part, named in parts.items() for name, t in named.items()
        }
        told = {"run": own.run, "promise": own.promise, "round": str(own.round)}
        self._write(LOCAL_FACTORS, save(tensors, told))

    def own(self, run: str) -> LocalFactors | None:
        """What was kept of this run; a damaged one is none: the run goes on with what is sent."""
        try:
            tensors, told = _load(self._read(LOCAL_FACTORS) or b"")
            if told["run"] != run:
                return None
            found = (_under(tensors, part) for part in ("after", "before"))
            return LocalFactors(run, told["promise"], int(told["round"]), *found)
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save_preview(self, name: str, pictures: np.ndarray) -> None:
        """Keep pictures [n, H, W] or [n, H, W, 3], side by side, as a PNG."""
        from PIL import Image  # slow import, so only here

        file = io.BytesIO()
        Image.fromarray(np.concatenate(list(pictures), axis=1)).save(file, "png")
        self._write(f"{PREVIEWS}/{name}.png", file.getvalue())

    def save_examples(self, split: str, key: str, examples: Examples) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in examples._asdict().items()}
        self._storage.write(f"{CACHE}/{split}.safetensors", save(tensors, {"key": key}))

    def examples(self, split: str, key: str) -> Examples | None:
        """The cached examples of a split, if they were made under the same key (base and pictures)."""
        try:
            tensors, metadata = _load(self._storage.read(f"{CACHE}/{split}.safetensors") or b"")
            return Examples(**tensors) if metadata["key"] == key else None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None

    def save_number(self, name: str, key: str, number: float) -> None:
        self._storage.write(f"{CACHE}/{name}.json", json.dumps({"key": key, "number": number}).encode())

    def number(self, name: str, key: str) -> float | None:
        """A cached number, if it was found under the same key."""
        try:
            found = json.loads(self._storage.read(f"{CACHE}/{name}.json") or b"")
            return float(found["number"]) if found["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def seed(self) -> int:
        """The seed of a real device's ordinary streams, drawn once and never told.

        No ε rests on its secrecy (`training.batches.Batches`): it is kept so that devices differ, and that nobody can
        redraw what an open update was trained with.
        """
        if (found := self._storage.read(SEED)) is None:
            found = str(secrets.randbits(63)).encode()
            self._storage.write(SEED, found)
        try:
            return int(found)
        except ValueError as error:
            raise AntherError(
                f"{self._storage.where(SEED)}: not a number; remove it and another seed is drawn"
            ) from error


def _load(data: bytes) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of safetensors bytes, and what is written beside them."""
    return load(plain(data)), metadata(data)


def _prefixed(prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in to_tensors(adapter).items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part of a file, by their own names."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _part(tensors: Mapping[str, Tensor], prefix: str, sites: Sites) -> Adapter:
    """One adapter of the file, with exactly the given sites and one rank."""
    found = _under(tensors, prefix)
    adapter = from_tensors(found)
    expected: dict[str, Any] = adapter_shapes(sites, rank(adapter))
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        raise ValueError(f"{prefix}: other sites or ranks")
    return adapter
