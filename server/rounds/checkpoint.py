"""A checkpoint for each round: whole or not there at all.

    round-000012/
        adapter.safetensors    the shared adapter after the round
        best.safetensors       the best so far
        memory.safetensors     what the server remembers beside them
        state.json             everything else
        manifest.json          SHA-256 of the other four

A round is written into a hidden folder, made durable and then renamed, so whenever the process or the power dies, the
newest `round-…` is the last complete round.
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
_KEPT = 2  # newest checkpoints; the best adapter is in each
_HIDDEN = ".partial-"


@dataclass(frozen=True, kw_only=True)
class _Saved:
    run: str
    private: bool
    best_round: int
    history: tuple[Round, ...]
    devices: dict[str, DeviceMetrics]
    ledger: Anchor | None
    memory: dict[str, tuple[int, ...]]
    """Names, as `<part>/<tensor>`, and shapes."""


def save(folder: Path, state: RunState) -> Path:
    """Write the state's last round; the folder of the new checkpoint.

    Raises AntherError if `folder` already holds this round or a later one: of another run.
    """
    make_folder(folder)
    path = folder / f"round-{state.round:06d}"
    if (rounds := _rounds(folder)) and rounds[-1] >= path:
        raise AntherError(f"{folder}: holds {rounds[-1].name} already: resume that run, or choose an empty folder")
    for leftover in folder.glob(f"{_HIDDEN}*"):  # of a process that was killed
        shutil.rmtree(leftover)
    memory = {f"{part}/{name}": tensor for part, of in state.memory.items() for name, tensor in of.items()}
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
        old.rename(hidden)  # at once: half a deleted checkpoint must not look like one
        shutil.rmtree(hidden)
    return path


def load(folder: Path, *, sites: Sites) -> RunState | None:
    """The last complete round, verified; None if there is none.

    Raises AntherError, naming the file and what to do, if a file is missing, cut off or edited, or the adapters do not
    fit these sites.
    """
    rounds = _rounds(folder)
    if not rounds:
        return None
    path = rounds[-1]
    mend = f"delete {path} to go back to " + (rounds[-2].name if len(rounds) > 1 else "the start")
    try:
        manifest = strict_json.from_plain(dict[str, str], strict_json.loads(_read(path / _MANIFEST)))
        files = {name: _read(path / name) for name in (_ADAPTER, _BEST, _MEMORY, _STATE)}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != manifest.get(name):
                raise AntherError(f"{path / name} is not as it was written (SHA-256 differs)")
        saved = strict_json.from_plain(_Saved, _of_today(strict_json.loads(files[_STATE])))
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
        raise AntherError(f"{error}: {mend}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # not the JSON that was written
        raise AntherError(f"{path}: {_MANIFEST} or {_STATE} is damaged ({error}): {mend}") from error


def _of_today(state: Any) -> Any:
    """A state as this release writes it, of one that an earlier one wrote: what is new since is not known of it."""
    if not isinstance(state, dict) or not isinstance(state.get("history"), list):
        return state  # `from_plain` says what is wrong
    for record in state["history"]:
        validation, train = record.get("validation") or {}, record.get("train") or {}
        validation.setdefault("improved", None)
        central = [train["central"]["guarantee"]] if train.get("central") else []
        for guarantee in [*(train.get("guarantees") or ()), *central]:
            guarantee.setdefault("strict", None)
            guarantee.setdefault("seen", None)
    return state


def _rounds(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("round-*"))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise AntherError(f"{file} can't be read ({error.strerror})") from error


def _parts(tensors: Mapping[str, Tensor]) -> StrategyState:
    """Inverse of the names that parts are written under."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        found.setdefault(part, {})[name] = tensor
    return found


def _adapter(data: bytes, sites: Sites, file: Path) -> Adapter:
    try:
        return from_tensors(decode(data, adapter_shapes(sites, -1)))
    except AntherError as error:
        raise AntherError(f"{file} does not fit this base and adapter.sites ({error})") from error
