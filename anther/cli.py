"""Command line of Anther:  anther COMMAND [arguments]

Runs take `key=value` (Hydra); other commands take `--options`. The installed program doesn't look for modules in the
working directory, so a `server.py` or `client.py` there is never imported by mistake. Only the module of the requested
command is imported.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence

from anther.commands import COMMANDS, GROUPS, Command
from common.errors import REPORTED_ERRORS, describe_error
from common.moved_commands import MOVED
from common.terminal import discard_output, use_plain_output

TITLE = "Anther personalizes a diffusion model on people's own devices.\n\nUsage:  anther COMMAND [arguments]"
FOOTER = "Add --help to a command for its arguments. Completion of your shell: anther completion --help"
USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    use_plain_output()
    try:
        status = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # now, because at exit Python would report a closed pipe itself
    except BrokenPipeError:  # the reader of our output closed it
        discard_output()
        return USAGE
    return status


def run(words: Sequence[str]) -> int:
    """Run the command named by the first words, and return its exit status."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else USAGE
    if len(words) == 2 and words[1] in ("-h", "--help") and (names := group(words[0])):
        print(overview({words[0].capitalize(): {name: COMMANDS[name] for name in names}}))
        return 0
    command = find(words)
    if command is None:
        print(f"error: {unknown(words)}", file=sys.stderr)
        return USAGE
    name, remaining = command
    ours = sys.argv
    try:
        module = importlib.import_module(COMMANDS[name].module)
        sys.argv = [f"anther {name}", *remaining]  # as if the module was run by `python -m`
        return int(module.main() or 0)
    except BrokenPipeError:
        raise
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    finally:
        sys.argv = ours


def find(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the command at the start of the words (by its name or its module's), and the remaining words."""
    by_module = {command.module: name for name, command in reversed(list(COMMANDS.items()))}
    for length in (2, 1):
        name = " ".join(words[:length])
        if (name := by_module.get(name, name)) in COMMANDS:
            return name, list(words[length:])
    return None


def unknown(words: Sequence[str]) -> str:
    """Return the error message for an unknown command."""
    if words[0] in MOVED:
        return f"{words[0]}: moved to {MOVED[words[0]]}"
    start = " ".join(words[:2])
    if names := group(words[0]):
        near = difflib.get_close_matches(start, names, n=1) if len(words) > 1 else []
        hint = f"; did you mean anther {near[0]}?" if near else ""
        return f"anther {words[0]}: needs one of: {', '.join(name.split(' ', 1)[1] for name in names)}{hint}"
    near = difflib.get_close_matches(start, COMMANDS, n=1) or difflib.get_close_matches(words[0], COMMANDS, n=1)
    hint = f"did you mean anther {near[0]}?" if near else "anther --help lists them"
    return f"{words[0]}: no such command; {hint}"


def group(word: str) -> list[str]:
    """List the two-word commands whose first word is `word`."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def overview(groups: Mapping[str, Mapping[str, Command]] = GROUPS) -> str:
    """List commands by group, one per line."""
    width = max(len(name) for commands in groups.values() for name in commands)
    parts = [
        f"{title}\n" + "\n".join(f"  {name:<{width}}  {command.help}" for name, command in commands.items())
        for title, commands in groups.items()
    ]
    return "\n\n".join([TITLE, *parts, FOOTER])
