"""What one device keeps on its disk: its personal adapter, its ledger, and caches.

    ledger.jsonl, outbox/     privacy.ledger
    personal.safetensors      the personal adapter with the shared one that it sits on
    policy.toml               what the owner allows, written by hand
    seed                      of the device's ordinary random streams
    cache/                    pictures as latents, and the base's loss on them: rebuilt when missing or damaged

Every write is atomic.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from conf.errors import AntherError
from models.adapter import Adapter, Sites, from_tensors, rank, shapes, to_tensors
from privacy import durable
from privacy.ledger import Ledger
from training.jobs import Examples


class Personal(NamedTuple):
    """A device's own adapter, of use only on top of the shared one that it was trained on."""

    adapter: Adapter
    shared: Adapter
    base: str  # content hash of the base
    request: str  # what asked for it: asked again, it is there already


class Store:
    """The files of one device in `folder`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.ledger = Ledger(self.folder)
        self.policy_file = self.folder / "policy.toml"
        self._personal = self.folder / "personal.safetensors"
        self._cache = self.folder / "cache"

    def save_personal(self, personal: Personal) -> None:
        tensors = _prefixed("personal", personal.adapter) | _prefixed("shared", personal.shared)
        durable.write(self._personal, save(tensors, {"base": personal.base, "request": personal.request}))

    def personal(self, sites: Sites) -> Personal | None:
        """The personal adapter with what it sits on; None before the first one is trained.

        Raises:
            AntherError: the file is damaged, or made for other sites.
        """
        if not self._personal.exists():
            return None
        try:
            tensors, metadata = _load(self._personal)
            parts = {name: _part(tensors, name, sites) for name in ("personal", "shared")}
            if len(tensors) != sum(2 * len(part) for part in parts.values()):
                raise ValueError("it holds other tensors")
            return Personal(parts["personal"], parts["shared"], metadata["base"], metadata["request"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AntherError(
                f"{self._personal}: not a personal adapter for this base ({error}); remove it and personalise again"
            ) from error

    def save_examples(self, split: str, key: str, examples: Examples) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in examples._asdict().items()}
        durable.write(self._cache / f"{split}.safetensors", save(tensors, {"key": key}))

    def examples(self, split: str, key: str) -> Examples | None:
        """The cached examples of a split, if they were made under the same key (base and pictures)."""
        try:
            tensors, metadata = _load(self._cache / f"{split}.safetensors")
            return Examples(**tensors) if metadata["key"] == key else None
        except (SafetensorError, OSError, KeyError, TypeError):
            return None

    def save_loss(self, name: str, key: str, loss: float) -> None:
        durable.write(self._cache / f"{name}.json", json.dumps({"key": key, "loss": loss}).encode())

    def loss(self, name: str, key: str) -> float | None:
        """A cached loss, if it was measured under the same key."""
        try:
            found = json.loads((self._cache / f"{name}.json").read_bytes())
            return float(found["loss"]) if found["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def seed(self) -> int:
        """The seed of a real device's ordinary streams, drawn once and never told.

        Which (t, ε) a picture is trained with must be secret too: where they are known, taking one picture away
        shifts those of the others, and more than one picture's gradient changes.
        """
        file = self.folder / "seed"
        if not file.exists():
            durable.write(file, str(secrets.randbits(63)).encode())
        try:
            return int(file.read_bytes())
        except ValueError as error:
            raise AntherError(f"{file}: not a number; remove it and another seed is drawn") from error


def _load(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _prefixed(prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in to_tensors(adapter).items()}


def _part(tensors: Mapping[str, Tensor], prefix: str, sites: Sites) -> Adapter:
    """One adapter of the file, with exactly the given sites and one rank."""
    found = {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
    adapter = from_tensors(found)
    expected: dict[str, Any] = shapes(sites, rank(adapter))
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        raise ValueError(f"{prefix}: other sites or ranks")
    return adapter
