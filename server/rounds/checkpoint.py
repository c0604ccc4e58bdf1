"""Checkpoints, one folder per round: complete or absent.

    round-000012/
        adapter.safetensors    the shared adapter after the round
        best.safetensors       the best adapter so far
        memory.safetensors     strategy state (e.g. moments of the server optimizer)
        state.json             everything else
        manifest.json          SHA-256 of the other four

A round is written to a hidden folder, synced, and then renamed. Whenever the process or the power fails, the newest
`round-…` folder is the last completed round.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common import strict_json
from common.atomic_files import make_folder, sync_folder, write
from common.errors import AntherError
from models.lora.adapter import Adapter, Sites, adapter_shapes, from_tensors, to_tensors
from protocol.tensor_codec import decode, encode
from server.rounds.state import Round, RunState
from strategies.central_dp import Anchor
from strategies.round.metrics import DeviceMetrics
from strategies.server_optimizers import StrategyState

_ADAPTER, _BEST, _MEMORY = "adapter.safetensors", "best.safetensors", "memory.safetensors"
_STATE, _MANIFEST = "state.json", "manifest.json"
_KEPT = 2  # number of newest checkpoints that are kept; each contains the best adapter
_HIDDEN = ".partial-"


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """Contents of state.json; the field names are the stored format."""

    run: str
    private: bool
    best_round: int
    history: tuple[Round, ...]
    devices: dict[str, DeviceMetrics]
    ledger: Anchor | None
    memory: dict[str, tuple[int, ...]]
    """Shapes of the tensors in memory.safetensors, by name `<part>/<tensor>`."""


def save(folder: Path, state: RunState) -> Path:
    """Write the state's last round, and return the folder of the new checkpoint.

    Raises:
        AntherError: `folder` already contains this round or a later one, of another run.
    """
    make_folder(folder)
    path = folder / f"round-{state.round:06d}"
    if (rounds := _rounds(folder)) and rounds[-1] >= path:
        raise AntherError(f"{folder}: contains {rounds[-1].name} already: resume that run, or choose an empty folder")
    for leftover in folder.glob(f"{_HIDDEN}*"):  # from a process that was killed
        shutil.rmtree(leftover)
    memory = {f"{part}/{name}": tensor for part, named in state.memory.items() for name, tensor in named.items()}
    saved = _Saved(
        run=state.run,
        private=state.private,
        best_round=state.best_round,
        history=state.history,
        devices=dict(state.devices),
        ledger=state.ledger,
        memory={name: tuple(tensor.shape) for name, tensor in memory.items()},
    )
    files = {
        _ADAPTER: encode(to_tensors(state.adapter)),
        _BEST: encode(to_tensors(state.best_adapter)),
        _MEMORY: encode(memory),
        _STATE: strict_json.dumps(saved).encode(),
    }
    files[_MANIFEST] = strict_json.dumps(
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    ).encode()
    partial = folder / f"{_HIDDEN}{path.name}"
    for name, data in files.items():
        write(partial / name, data)
    partial.rename(path)
    sync_folder(folder)
    for old in _rounds(folder)[:-_KEPT]:
        hidden = folder / f"{_HIDDEN}old-{old.name}"
        old.rename(hidden)  # atomic: a partly deleted checkpoint must not look like a complete one
        shutil.rmtree(hidden)
    return path


def load(folder: Path, *, sites: Sites) -> RunState | None:
    """Load and verify the last completed round; None if there is none.

    Raises:
        AntherError: a file is missing, cut off or edited, or the adapters don't fit these sites. The message names the
            file and the fix.
    """
    rounds = _rounds(folder)
    if not rounds:
        return None
    path = rounds[-1]
    fix = f"delete {path} to go back to " + (rounds[-2].name if len(rounds) > 1 else "the start")
    try:
        manifest = strict_json.from_plain(dict[str, str], strict_json.loads(_read(path / _MANIFEST)))
        files = {name: _read(path / name) for name in (_ADAPTER, _BEST, _MEMORY, _STATE)}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != manifest.get(name):
                raise AntherError(f"{path / name} was changed after it was written (SHA-256 differs)")
        saved = strict_json.from_plain(_Saved, _upgrade_state(strict_json.loads(files[_STATE])))
        return RunState(
            run=saved.run,
            private=saved.private,
            adapter=_adapter(files[_ADAPTER], sites, path / _ADAPTER),
            history=saved.history,
            devices=saved.devices,
            ledger=saved.ledger,
            best_round=saved.best_round,
            best_adapter=_adapter(files[_BEST], sites, path / _BEST),
            memory=_parts(decode(files[_MEMORY], saved.memory)),
        )
    except AntherError as error:
        raise AntherError(f"{error}: {fix}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # not the JSON that was written
        raise AntherError(f"{path}: {_MANIFEST} or {_STATE} is damaged ({error}): {fix}") from error


def _upgrade_state(state: Any) -> Any:
    """Add the fields that a checkpoint of an earlier release doesn't have, as unknown."""
    if not isinstance(state, dict) or not isinstance(state.get("history"), list):
        return state  # `from_plain` reports the error
    for record in state["history"]:
        validation, train = record.get("validation") or {}, record.get("train") or {}
        validation.setdefault("improved", None)
        central = [train["central"]["guarantee"]] if train.get("central") else []
        for guarantee in [*(train.get("guarantees") or ()), *central]:
            guarantee.setdefault("strict", None)
            guarantee.setdefault("seen", None)
    return state


def _rounds(folder: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    return sorted(folder.glob("round-*"))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise AntherError(f"{file} can't be read ({error.strerror})") from error


def _parts(tensors: Mapping[str, Tensor]) -> StrategyState:
    """Group tensors by the part in their name `<part>/<tensor>`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts


def _adapter(data: bytes, sites: Sites, file: Path) -> Adapter:
    try:
        return from_tensors(decode(data, adapter_shapes(sites, -1)))
    except AntherError as error:
        raise AntherError(f"{file} does not fit this base and adapter.sites ({error})") from error
