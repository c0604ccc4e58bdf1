"""Simulate a federation from Python and plot its loss:  python examples/simulate_and_plot.py [FOLDER]

Needs matplotlib: pip install -e '.[examples]'
"""

# %% Simulate: arguments are those of the command line
from __future__ import annotations

import json
import sys
from pathlib import Path

from anther import simulate

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("matplotlib is not installed: pip install -e '.[examples]'")

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/example")
result = simulate("preset=quick rounds=4", folder)
print(f"report: {result.report}")

# %% Loss on held-out pictures, of the base and of the shared adapter after every round
rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
measured = [one for one in rounds if one["shared"] is not None]
for one in measured:
    print(f"round {one['round']}: {one['shared']:.4f}, {1 - one['shared'] / one['base']:.1%} below the base")

# %% Plot
figure, axes = plt.subplots(figsize=(6, 4))
axes.plot([one["round"] for one in measured], [one["shared"] for one in measured], marker="o", label="shared adapter")
axes.axhline(measured[0]["base"], color="gray", linestyle="--", label="base")
axes.set(xlabel="round", ylabel="loss on held-out pictures")
axes.legend()
figure.savefig(folder / "loss.svg")
print(folder / "loss.svg")
