"""Damaged bases for `bench.robustness.fuzz_inputs`: tiny pipelines of every family, with one or two files damaged.

Damage includes configurations with removed keys, with values of other types and sizes, or with text that is not JSON;
weights that are cut or renamed, or have other keys and shapes; and removed vocabularies. Each base is planned for,
loaded, used to encode captions and a picture, run once and sampled from.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bench.lib.tiny_pipelines import PIPELINES, save
from models.base.base import Base
from models.families.known import find_base
from models.files import loading

_SIDES = {"sdxl": 64, "sana": 32}
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**6,
    10**9,
    10**30,
    0.5,
    -1e-9,
    float("nan"),
    float("inf"),
    "",
    "x",
    "8",
    [],
    [8],
    [8, 16],
    [None],
    ["x", "y"],
    {},
    {"a": 1},
    "../../x",
    "epsilon",
    "evil/kernel",
    [10**9] * 3,
    "\ud83d",
    "é" * 3000,
)
_TEXTS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"[" * 100_000,
    b"\xff\xfe{}",
    b'{"a": 1}',
    b"version https://git-lfs",
    b"\x00" * 64,
)


def damage_file(folder: Path, rng: random.Random) -> str:
    """Damage one file of a pipeline, and return a description of the damage."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors", ".model")
    )
    file = rng.choice(files)
    name = file.relative_to(folder).as_posix()
    if rng.random() < 0.06:
        file.unlink()
        return f"{name}: removed"
    if rng.random() < 0.04:
        other = rng.choice(files)
        shutil.copy(other, file) if other != file else None
        return f"{name}: is {other.relative_to(folder)}"
    change = _weights if file.suffix == ".safetensors" else _config if file.suffix == ".json" else _bytes
    return f"{name}: {change(file, rng)}"


def _config(file: Path, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return _bytes(file, rng)
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return _bytes(file, rng)
    node, depth = config, 0
    while depth < 3 and isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(min(len(node), 50)))
        key = rng.choice(keys)
        if not isinstance(node[key], dict | list) or rng.random() < 0.5:
            if rng.random() < 0.2:
                del node[key]
                description = f"without {key}"
            else:
                value = rng.choice(_VALUES)
                node[key] = value
                description = f"{key}={str(value)[:40]}"
            file.write_text(json.dumps(config))
            return description
        node, depth = node[key], depth + 1
    file.write_text(json.dumps(rng.choice(_VALUES)))
    return "another value"


def _bytes(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    way = rng.randrange(4)
    if way == 0:
        file.write_bytes(rng.choice(_TEXTS))
        return "other bytes"
    if way == 1:
        file.write_bytes(data[: rng.randrange(len(data) + 1)])
        return "cut"
    for _ in range(rng.choice((1, 4, 40)) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return "bytes changed"


def _weights(file: Path, rng: random.Random) -> str:
    way = rng.randrange(8)
    if way < 2:
        return _bytes(file, rng)
    if way == 2:
        variant = file.with_name(
            file.name.replace(".safetensors", f".{rng.choice(('fp16', 'bf16', 'x-y', 'a.b'))}.safetensors")
        )
        (file.rename if rng.random() < 0.5 else lambda to: shutil.copy(file, to))(variant)
        return f"also or only {variant.name}"
    try:
        tensors = load_file(file)
    except Exception:  # damaged by an earlier change
        return "left as it is"
    key = rng.choice(sorted(tensors))
    if way == 3:
        del tensors[key]
    elif way == 4:
        tensors[f"x.{key}"] = tensors.pop(key)
    elif way == 5:
        tensors[key] = torch.randn([side + rng.randrange(2) for side in tensors[key].shape])
    elif way == 6:
        tensors[key] = tensors[key] * rng.choice((float("nan"), float("inf"), 1e38))
    else:
        tensors[key] = tensors[key].to(rng.choice((torch.float16, torch.bfloat16, torch.float64)))
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{('lacks', 'renamed', 'other shape', 'not finite', 'other type')[way - 3]} {key}"


def base(rng: random.Random, folder: Path) -> Callable[[], None]:
    """Create a damaged pipeline in a folder, and return a function that uses it like a run."""
    name = rng.choice(sorted(PIPELINES))
    shutil.copytree(_intact_pipeline(name), folder, dirs_exist_ok=True)
    for _ in range(rng.choice((1, 1, 2))):
        damage_file(folder, rng)
    return partial(use_base, folder, _SIDES.get(name, 16))


@cache
def _intact_pipeline(name: str) -> Path:
    """Return the intact pipeline of a family, made once per process and removed at its exit."""
    folder = tempfile.TemporaryDirectory(prefix="anther-bases-")
    _FOLDERS.append(folder)
    with loading.quiet_libraries():
        return save(name, Path(folder.name))


_FOLDERS: list[Any] = []


def use_base(folder: Path, side: int) -> None:
    """Use a base once in every way that a run does.

    Raises:
        AntherError: the base can't be used.
        ValueError: two captions get the same encoding without an error.
    """
    find_base(str(folder)).network()
    base = Base(folder, resolution=side)
    captions = base.encode_captions(["a cat", "dog", None])
    latents = base.encode_images([np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)])
    with base.use_adapters([]) as denoise, torch.no_grad():
        denoise(latents, base.schedule.times[[len(base.schedule) // 2]].float(), captions[:1])
    base.decode(latents)
    if torch.equal(captions[0], captions[1]):
        raise ValueError("two captions have the same encoding")
