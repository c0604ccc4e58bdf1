"""Typed storage of one device: its personal adapters, its ledger, and caches.

    ledger.jsonl, outbox/,    `privacy.ledger`; the head of its hash chain lies elsewhere
    enrolled
    seed                      seed of the device's non-private random streams
    cache/                    encoded pictures, the base's loss on them, memory of a pass; recomputed if damaged

and for each federation, in a folder of its own (`client.store.layout`):

    personal.safetensors      the personal adapter with the shared one under it, behind a format mark
    previous….safetensors     previous personal adapters, for `roll_back` (`client.store.personal_versions`)
    residual.safetensors      quantization error of the last uploaded change (error feedback)
    variate.safetensors       SCAFFOLD's control variate, before and after the last round
    own.safetensors           local factors B of a run that shares only A
    previews/                 preview pictures for the owner

On a real device these are files of one folder, beside the owner's policy.toml. Every write is atomic.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from client.store.layout import (
    CACHE,
    LOCAL_FACTORS,
    METHOD_STATE,
    PERSONAL,
    PREVIEWS,
    RESIDUAL,
    SEED,
    VARIATE,
    federation_prefix,
)
from client.store.personal_versions import AdapterVersion, AdapterVersions, metadata, plain
from client.store.round_state import ControlVariateState, LocalFactors, MethodState, Residual, RoundState
from common.errors import AntherError
from models.lora.adapter import Adapter, Sites, adapter_shapes, concatenate, from_tensors, rank, to_tensors
from models.lora.directions import without_zero_rank
from privacy.ledger.ledger import DeviceLedger
from privacy.storage import Storage
from training.jobs import Examples

IMPORTED = "import:"
"""Prefix of `PersonalAdapter.request` of an adapter that the owner imported; the file's hash follows."""


class PersonalAdapter(NamedTuple):
    """A device's personal adapter, with the shared adapter that it was trained on and that it requires."""

    adapter: Adapter
    shared: Adapter
    base: str  # content hash of the base
    request: str  # hash of the request that it answers; a repeated request needs no training

    @property
    def is_imported(self) -> bool:
        """Whether the owner imported it, so that no training followed yet."""
        return self.request.startswith(IMPORTED)

    @property
    def effective_shared(self) -> Adapter:
        """The shared adapter without rank that only a method of personalization reads, such as directions."""
        return without_zero_rank(self.shared)

    @property
    def combined(self) -> Adapter:
        """The shared and the personal adapter as one."""
        return concatenate([self.effective_shared, self.adapter])


class Store:
    """Typed access to one device's storage.

    Args:
        storage: the files, or their encrypted view.
        federation: id of the federation whose adapters and round state are meant; None: one without an id.
    """

    def __init__(self, storage: Storage, federation: str | None = None) -> None:
        self.ledger = DeviceLedger(storage)  # one for all federations: the pictures are the same
        self._storage, self._under = storage, federation_prefix(federation)
        self._versions = AdapterVersions(storage, self._under)

    @property
    def where(self) -> str:
        """Location of this federation's files, for messages."""
        return self._storage.where(self._under)

    def _read(self, name: str) -> bytes | None:
        """Read a file of this federation."""
        return self._storage.read(self._under + name)

    def _write(self, name: str, data: bytes) -> None:
        self._storage.write(self._under + name, data)

    def _where(self, name: str) -> str:
        return self._storage.where(self._under + name)

    def save_personal(self, personal: PersonalAdapter, *, aside: bool = False) -> None:
        """Replace the personal adapter; `aside`: the current one, with its shared one, becomes a previous one."""
        tensors = _prefixed("personal", personal.adapter) | _prefixed("shared", personal.shared)
        self._versions.save(tensors, {"base": personal.base, "request": personal.request}, aside=aside)

    def personal(self, sites: Sites) -> PersonalAdapter | None:
        """Load the personal adapter and the shared one under it; None before the first training.

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
                raise ValueError("it contains other tensors")
            return PersonalAdapter(parts["personal"], parts["shared"], metadata["base"], metadata["request"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AntherError(
                f"{self._where(PERSONAL)}: not a personal adapter for this base ({error}); "
                "remove it and personalize again"
            ) from error

    def personal_sites(self) -> tuple[str, ...]:
        """List the layers at which the personal adapter has factors; empty before the first training."""
        try:
            tensors, _ = _load(self._read(PERSONAL) or save({}))
        except (SafetensorError, ValueError):
            return ()  # `personal` reports the error
        names = (name.partition("/") for name in tensors)
        return tuple(sorted({site.rpartition(".")[0] for part, _, site in names if part == "personal"}))

    def has_other_sites(self, sites: Sites) -> bool:
        """Return whether a readable personal adapter is stored that has factors at other layers than these."""
        names = self.personal_sites()
        return bool(names) and set(names) != set(sites)

    def personal_versions(self) -> list[AdapterVersion]:
        """List the stored personal adapters, newest first."""
        return self._versions.all_versions()

    def roll_back(self, to: str | None = None) -> AdapterVersion:
        """Return to a previous personal adapter with its shared one; the current one becomes a previous one.

        The next trained adapter is compared with it as with any other.

        Args:
            to: date of the adapter as in `personal_versions`; None: the newest that is older than the current one.

        Raises:
            AntherError: there is no such adapter.
        """
        return self._versions.roll_back(to)

    def save_residual(self, residual: Residual) -> None:
        """Replace the residual."""
        self._save_round_state(RESIDUAL, residual)

    def residual(self, compatibility_key: str) -> Residual | None:
        """Load the residual if its key is equal; a damaged one counts as missing, and only the correction is lost."""
        return self._load_round_state(RESIDUAL, Residual, compatibility_key)

    def save_variate(self, variate: ControlVariateState) -> None:
        """Replace the control variate."""
        self._save_round_state(VARIATE, variate)

    def variate(self, compatibility_key: str) -> ControlVariateState | None:
        """Load the control variate; same rules as `residual`."""
        return self._load_round_state(VARIATE, ControlVariateState, compatibility_key)

    def save_method_state(self, state: MethodState) -> None:
        """Replace the state of a method of personalization."""
        self._save_round_state(METHOD_STATE, state)

    def method_state(self, compatibility_key: str) -> MethodState | None:
        """Load the state of a method of personalization; same rules as `residual`."""
        return self._load_round_state(METHOD_STATE, MethodState, compatibility_key)

    def _save_round_state(self, file: str, state: Residual | ControlVariateState | MethodState) -> None:
        compatibility_key, number, *parts = state
        tensors = {
            f"{part}/{name}": tensor.clone().contiguous()  # safetensors refuses memory that both parts share
            for part, named in zip(state._fields[2:], parts, strict=True)
            for name, tensor in named.items()
        }
        self._write(file, save(tensors, {"follows": compatibility_key, "round": str(number)}))

    def _load_round_state(self, file: str, state_type: type[RoundState], compatibility_key: str) -> RoundState | None:
        try:
            tensors, metadata = _load(self._read(file) or b"")
            if metadata["follows"] != compatibility_key:
                return None
            return state_type(
                compatibility_key, int(metadata["round"]), *(_under(tensors, part) for part in state_type._fields[2:])
            )
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save_local_factors(self, local_factors: LocalFactors) -> None:
        """Replace the local factors."""
        parts = {"after": local_factors.after, "before": local_factors.before}
        # Clones: at an untrained site both are the same tensor, and safetensors refuses shared memory.
        tensors = {
            f"{part}/{name}": t.clone().contiguous() for part, named in parts.items() for name, t in named.items()
        }
        metadata = {"run": local_factors.run, "promise": local_factors.promise, "round": str(local_factors.round)}
        self._write(LOCAL_FACTORS, save(tensors, metadata))

    def local_factors(self, run: str) -> LocalFactors | None:
        """Load the local factors of a run; if they are damaged, the run continues with the received factors."""
        try:
            tensors, metadata = _load(self._read(LOCAL_FACTORS) or b"")
            if metadata["run"] != run:
                return None
            factors = (_under(tensors, part) for part in ("after", "before"))
            return LocalFactors(run, metadata["promise"], int(metadata["round"]), *factors)
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save_preview(self, name: str, pictures: np.ndarray) -> None:
        """Store pictures, `[n, H, W]` or `[n, H, W, 3]`, side by side in one PNG."""
        from PIL import Image  # slow import, so only here

        file = io.BytesIO()
        Image.fromarray(np.concatenate(list(pictures), axis=1)).save(file, "png")
        self._write(f"{PREVIEWS}/{name}.png", file.getvalue())

    def save_examples(self, split: str, key: str, examples: Examples) -> None:
        """Cache the encoded examples of a split.

        Args:
            split: `train`, `validation` or `test`.
            key: identifies base, resolution and pictures.
            examples: the encoded pictures.
        """
        tensors = {name: tensor.contiguous() for name, tensor in examples._asdict().items()}
        self._storage.write(f"{CACHE}/{split}.safetensors", save(tensors, {"key": key}))

    def examples(self, split: str, key: str) -> Examples | None:
        """Load the encoded examples of a split if they were cached under the same key (base and pictures)."""
        try:
            tensors, metadata = _load(self._storage.read(f"{CACHE}/{split}.safetensors") or b"")
            return Examples(**tensors) if metadata["key"] == key else None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None

    def save_number(self, name: str, key: str, number: float) -> None:
        """Cache a number.

        Args:
            name: file name, without suffix.
            key: identifies everything that the number depends on.
            number: the value.
        """
        self._storage.write(f"{CACHE}/{name}.json", json.dumps({"key": key, "number": number}).encode())

    def number(self, name: str, key: str) -> float | None:
        """Load a number if it was cached under the same key."""
        try:
            cached = json.loads(self._storage.read(f"{CACHE}/{name}.json") or b"")
            return float(cached["number"]) if cached["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def seed(self) -> int:
        """Return the seed of a real device's non-private streams, drawn once and never sent.

        No ε depends on its secrecy (`training.batches.BatchSampler`). It is stored so that devices differ, and so that
        others cannot recompute the random numbers behind a non-private update.
        """
        if (stored := self._storage.read(SEED)) is None:
            stored = str(secrets.randbits(63)).encode()
            self._storage.write(SEED, stored)
        try:
            return int(stored)
        except ValueError as error:
            raise AntherError(f"{self._storage.where(SEED)}: not a number; remove it for a new seed") from error


def _load(data: bytes) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Parse safetensors bytes: tensors and metadata."""
    return load(plain(data)), metadata(data)


def _prefixed(prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in to_tensors(adapter).items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a file, without the part's prefix."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _part(tensors: Mapping[str, Tensor], prefix: str, sites: Sites) -> Adapter:
    """Return one adapter of the file; ValueError unless it has exactly these sites and one rank."""
    part = _under(tensors, prefix)
    adapter = from_tensors(part)
    expected: dict[str, Any] = adapter_shapes(sites, rank(adapter))
    if {name: tuple(tensor.shape) for name, tensor in part.items()} != expected:
        raise ValueError(f"{prefix}: other sites or ranks")
    return adapter
