"""One program for all commands:  anther COMMAND [words]

The installed program doesn't look for modules in the working directory, so a `server.py` or `client.py` there is never
imported by mistake. Only the module of the requested command is imported.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Collection, Sequence

from common.errors import REPORTED_ERRORS, told
from common.terminal import use_plain_output

COMMANDS = {
    "simulate": ("simulations.run", "a whole federation on this machine, with a report"),
    "audit": ("simulations.audit.run", "does the privacy hold that is claimed?"),
    "serve": ("server.supervisor.run", "a federation's server"),
    "keys": ("server.gateway.keys", "tickets and devices of a server: ticket, list, revoke"),
    "results": ("server.report.results", "the report of a server's run, again"),
    "pack": ("models.quantization.pack", "a base in fewer bits, once for everyone"),
    "assets": ("models.base.assets", "where the shipped base and data lie; copies them there once"),
    "device enroll": ("client.cli.enroll", "join a federation with a ticket"),
    "device run": ("client.runtime.supervisor", "take part, until you stop it"),
    "device plan": ("client.cli.plan", "what a device can train, before it tries"),
    "device benchmark": ("client.cli.benchmark", "how fast this device trains"),
    "device ledger": ("client.cli.ledger", "what was shared from here, and what privacy that left"),
    "device draw": ("client.cli.draw", "draw with what was learned here"),
    "device roll-back": ("client.cli.roll_back", "the personal adapter of before"),
    "device leave": ("client.cli.leave", "leave the federation"),
    "device forget": ("client.cli.forget", "delete what was learned here"),
}
TITLE = "Anther personalizes a diffusion model on people's own devices.  anther COMMAND [words]"
USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first words name, and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    use_plain_output()
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else USAGE
    if len(words) == 2 and words[1] in ("-h", "--help") and group(words[0]):
        print(overview(group(words[0])))
        return 0
    found = find(words)
    if found is None:
        print(f"error: {unknown(words)}", file=sys.stderr)
        return USAGE
    name, rest = found
    try:
        command = importlib.import_module(COMMANDS[name][0])
        sys.argv = [f"anther {name}", *rest]  # as the module's own `python -m` would have it
        return int(command.main() or 0)
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE


def find(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Find the command that the words begin with (by its name or its module's), and the remaining words."""
    by_module = {module: name for name, (module, _) in COMMANDS.items()}
    for length in (2, 1):
        name = " ".join(words[:length])
        if (name := by_module.get(name, name)) in COMMANDS:
            return name, list(words[length:])
    return None


def unknown(words: Sequence[str]) -> str:
    """Return the error message for words that name no command."""
    asked = " ".join(words[:2])
    if names := group(words[0]):
        near = difflib.get_close_matches(asked, names, n=1) if len(words) > 1 else []
        hint = f"; did you mean anther {near[0]}?" if near else ""
        return f"anther {words[0]}: needs one of: {', '.join(name.split(' ', 1)[1] for name in names)}{hint}"
    near = difflib.get_close_matches(asked, COMMANDS, n=1) or difflib.get_close_matches(words[0], COMMANDS, n=1)
    hint = f"did you mean anther {near[0]}?" if near else "anther --help lists them"
    return f"{words[0]}: no such command; {hint}"


def group(word: str) -> list[str]:
    """List the two-word commands whose first word is `word`."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def overview(names: Collection[str] = COMMANDS) -> str:
    """List these commands, one per line."""
    width = max(map(len, names))
    listed = "\n".join(f"  anther {name:<{width}}  {COMMANDS[name][1]}" for name in names)
    return f"{TITLE}\n\n{listed}\n\n--help after a command says more of it."
