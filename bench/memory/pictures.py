"""Memory and CPU time that a folder of photographs costs a device.

    anther bench pictures [--count 60] [--photos FOLDER]

Each case is a folder of photographs of 12 megapixels, read and encoded in a process of its own. Reported are the peak
memory above that of the base with its encoders, and the CPU seconds to read the folder for the first time, to read it
again, and to encode it. For comparison, the table shows the memory of all pixels together.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, memory, versions

WIDTH, HEIGHT = 4032, 3024  # camera of a phone
MAX_MIB = 300
"""Limit of the peak memory above that of the base."""
CASES = {"JPEG": ("jpg", "RGB"), "PNG": ("png", "RGB"), "transparent PNG": ("png", "RGBA")}


def photographs(folder: Path | None) -> Iterator[Image.Image]:
    """Yield photographs of 12 megapixels: a folder's pictures, enlarged, or without a folder, synthetic clouds."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")) if folder else []
    for path in paths[:4]:
        with Image.open(path) as image:
            yield image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if not paths:
        for seed in range(4):
            small = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 64, WIDTH // 64, 3), np.uint8)
            yield Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def fill(folder: Path, case: str, count: int, photos: Path | None) -> None:
    """Fill a folder with captioned photographs: a few pictures, whose files all differ by trailing bytes.

    Args:
        folder: folder to fill.
        case: key of `CASES`.
        count: number of photographs.
        photos: folder of photographs; None: synthetic clouds.
    """
    suffix, mode = CASES[case]
    contents = []
    for image in photographs(photos):
        buffer = io.BytesIO()
        kind = "JPEG" if suffix == "jpg" else "PNG"
        image.convert(mode).save(buffer, kind, **({"quality": 85} if suffix == "jpg" else {"compress_level": 1}))
        contents.append(buffer.getvalue())
    for number in range(count):
        (folder / f"{number}.{suffix}").write_bytes(contents[number % len(contents)] + f"{number}".encode())
    lines = (json.dumps({"file_name": f"{number}.{suffix}", "text": f"photo {number}"}) for number in range(count))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def measure(folder: Path, base: str) -> dict[str, float]:
    """Read and encode a folder in this process."""
    from client.data import fingerprint, load_folder
    from models.base.base import load
    from training.engine import encode
    from training.jobs import EncodeJob, Examples, Picture

    torch.set_num_threads(1)
    frozen = load(base, device="cpu")
    encode(frozen, [EncodeJob(pictures=[Picture(np.zeros((64, 64), np.uint8), "warm")])])
    base_bytes = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    seconds = {}
    for name in ("first", "again"):
        started = time.process_time()
        pictures = load_folder(folder)
        fingerprint(pictures.train)
        seconds[name] = time.process_time() - started
    started = time.process_time()
    for split in pictures:
        (examples,) = encode(frozen, [EncodeJob(pictures=split)])
        assert isinstance(examples, Examples)
    seconds["encoding"] = time.process_time() - started
    peak = (memory("VmHWM") - base_bytes) / 2**20
    return {"pictures": sum(map(len, pictures)), "resolution": frozen.resolution, "peak_mib": peak, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--photos", type=Path, help="a folder of photographs (default: synthetic clouds)")
    parser.add_argument("--base", default="glyphs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/pictures.json"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.base)))
        return
    rows = {}
    shown = Table(
        "case",
        "pictures",
        "MB on disk",
        "MiB of pixels",
        f"peak MiB over the base (≤ {MAX_MIB})",
        "s first",
        "s again",
        "s encoding",
    )
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            fill(Path(scratch), case, args.count, args.photos)
            stored = sum(file.stat().st_size for file in Path(scratch).iterdir()) / 1e6
            command = [sys.executable, "-m", "bench.memory.pictures", "--measure", scratch, "--base", args.base]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(process.stdout.strip().splitlines()[-1])
        row |= {"stored_mb": stored, "pixels_mib": args.count * WIDTH * HEIGHT * 3 / 2**20}
        rows[case] = row
        shown.add_row(
            case,
            str(row["pictures"]),
            f"{stored:.0f}",
            f"{row['pixels_mib']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['first']:.1f}",
            f"{row['again']:.1f}",
            f"{row['encoding']:.1f}",
        )
    command = ["python -m bench.memory.pictures", f"--count {args.count}", "--photos FOLDER" if args.photos else ""]
    result = {
        "command": " ".join(command).strip(),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "pillow"),
        "most_mib": MAX_MIB,
        "base": args.base,
        "cases": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=160).print(shown)
    if over := [case for case, row in rows.items() if row["peak_mib"] > MAX_MIB]:
        sys.exit(f"over {MAX_MIB} MiB: {', '.join(over)}")


if __name__ == "__main__":
    main()
