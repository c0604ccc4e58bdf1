"""Exported adapters in the loaders of ComfyUI, Forge and sd-scripts.

    anther bench export checkout=FOLDER[@COMMIT] … [out=FILE]

Each FOLDER is a checkout of one of these tools. Its own loader, with its own table of names, reads adapters of small
random networks that `anther export` writes. ComfyUI is also given diffusers' layout, which it reads for transformers
only (`supported`). Reported are the tensors that it doesn't read, and the largest difference between its change of a
weight and the adapter's product, relative to the product. Ranks differ between layers and α is half of the rank, so
that a lost α, a wrong name or a wrong row is a difference.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.interop import networks, tools
from bench.interop.networks import Place, SmallNetwork
from bench.lib.machine import versions
from common.errors import REPORTED_ERRORS, AntherError, describe_error
from models.diffusion.sites import ATTENTION, resolve_sites
from models.export.layouts import export
from models.families.known import find_base
from models.families.ldm_names import ldm_names
from models.lora.adapter import Adapter, Factors, Sites

TOOLS = {
    "comfy/lora.py": tools.ComfyUI,
    "backend/patcher/lora.py": tools.Forge,
    "networks/lora_flux.py": tools.SDScripts,
}
RANK, TOLERANCE = 3, 1e-6
OUT = Path("bench/results/export.json")


def random_adapter(sites: Sites, *, rank: int = RANK) -> Adapter:
    """Draw an adapter of ranks 1 to `rank`."""
    generator = torch.Generator().manual_seed(0)
    ranks = {name: 1 + index % rank for index, name in enumerate(sites)}
    return {
        name: Factors(
            torch.randn(ranks[name], site.inputs, generator=generator) / site.inputs**0.5,
            torch.randn(site.outputs, ranks[name], generator=generator),
        )
        for name, site in sites.items()
    }


def write(file: Path, adapter: Adapter, sites: Sites, network: SmallNetwork, layout: str) -> None:
    """Export an adapter; in kohya's layout with α of half the rank and B twice as large, which is the same product."""
    export(adapter, file, family=network.family, sites=sites, layout=layout)
    if layout == "kohya":
        factor = {".alpha": 0.5, ".lora_up.weight": 2.0, ".lora_down.weight": 1.0}
        scaled = {
            name: tensor * next(value for end, value in factor.items() if name.endswith(end))
            for name, tensor in load_file(file).items()
        }
        save_file(scaled, file)


def largest_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference of a change; infinite if one is missing."""
    worst = 0.0
    for key, change in expected.items():
        if key not in actual:
            return float("inf")
        difference = (actual[key].detach().double().reshape(change.shape) - change).norm() / change.norm()
        worst = max(worst, float(difference))
    return worst


def cases(tool: Any, utils: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the result of each network and layout.

    Args:
        tool: one of `bench.interop.tools`.
        utils: tables of names of ComfyUI or Forge.
        folder: scratch folder.
    """
    for name in networks.PIPELINES:
        network = networks.small_network(name, folder / f"{tool.name}-{name}")
        if isinstance(tool, tools.SDScripts) and name == "sdxl":
            network, where = _published_sdxl()
        elif isinstance(tool, tools.SDScripts) and network.family.network == "unet":
            where = {site: Place(f"{site}.weight") for site in network.sites}
        else:
            where = networks.places(utils, network)
        sites = {site: network.sites[site] for site in network.sites if site in where}
        adapter = random_adapter(sites)
        expected = networks.original_weights(adapter, network, where)
        for layout in tool.layouts:
            file = folder / f"{tool.name}-{name}.{layout}.safetensors"
            write(file, adapter, sites, network, layout)
            loaded = tool.load(file, network, expected)
            wanted, unread = expected, sorted(loaded.unread)
            if isinstance(tool, tools.SDScripts):
                wanted = {tools.module_name(key): change for key, change in expected.items()}
                ignored = {key.partition(".")[0] for key in unread}
                wanted = {key: change for key, change in wanted.items() if key not in ignored}
            yield {
                "tool": tool.name,
                "network": name,
                "layout": layout,
                "supported": layout == "kohya" or network.family.network == "transformer",
                "layers": len(sites),
                "layers_without_place": sorted(set(network.sites) - set(where)) if name != "sdxl" else [],
                "tensors": len(load_file(file)),
                "unread": unread,
                "compared": len(wanted),
                "largest_relative_difference": largest_difference(loaded.changes, wanted),
            }


def _published_sdxl() -> tuple[SmallNetwork, dict[str, Place]]:
    """Return SDXL's attention at its published size, which sd-scripts fixes."""
    spec = find_base("sdxl")
    layers = networks.adaptable(spec.network())
    sites = resolve_sites(layers, None, attention=ATTENTION)
    network = SmallNetwork(name="sdxl", family=spec.family, config=spec.full_config(), sites=sites)
    names = ldm_names(layers, 2)
    return network, {site: Place(f"{names[site]}.weight") for site in sites}


def commit(folder: Path) -> str:
    """Return the commit of a checkout; AntherError if it isn't known."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AntherError(f"checkout={folder}: its commit is unknown: use git clone, or write checkout=FOLDER@COMMIT")
    return done.stdout.strip()


def open_checkouts(words: Sequence[str]) -> tuple[list[tuple[Any, str]], Path]:
    """Return the tools with their commits, and the file of the results.

    Raises:
        AntherError: an argument is unknown, or a folder isn't a checkout of a known tool.
    """
    found, out = [], OUT
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("checkout", "out") or not value:
            raise AntherError(f"{word}: write anther bench export checkout=FOLDER … [out=FILE]")
        if key == "out":
            out = Path(value)
            continue
        folder, _, stated = value.partition("@")
        path = Path(folder).expanduser().absolute()
        kind = next((tool for file, tool in TOOLS.items() if (path / file).is_file()), None)
        if kind is None:
            raise AntherError(f"checkout={folder}: not a checkout of ComfyUI, Forge or sd-scripts")
        revision = stated or commit(path)
        found.append((kind(path), revision))
    if not any(hasattr(tool, "utils") for tool, _ in found):
        raise AntherError("checkout: name one of ComfyUI or Forge too, whose tables say where layers belong")
    return found, out


def main() -> int:
    """Run the benchmark; return 1 if a file is read wrongly, and 2 if it can't run."""
    words = sys.argv[1:]
    if not words or set(words) & {"-h", "--help"}:
        print(__doc__)
        return 0
    try:
        found, out = open_checkouts(words)
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    utils = next(tool.utils for tool, _ in found if hasattr(tool, "utils"))
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for tool, _ in found:
            for result in cases(tool, getattr(tool, "utils", utils), Path(scratch)):
                difference, unread = result["largest_relative_difference"], len(result["unread"])
                print(
                    f"{result['tool']:<11} "
                    f"{result['network']:<19} {result['layout']:<10} {result['compared']:>4} weights, "
                    f"difference {difference:.1e}, {unread} of {result['tensors']} tensors unread"
                )
                results.append(result)
    commits = {tool.name: revision for tool, revision in found}
    content = {"versions": versions("torch", "diffusers", "peft"), "commits": commits, "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    failed = [result for result in results if not result["largest_relative_difference"] <= TOLERANCE]
    return int(any(result["supported"] for result in failed))


if __name__ == "__main__":
    sys.exit(main())
