"""Shell completion of commands, configuration keys and group options:  anther completion bash|zsh|fish

    bash:  source <(anther completion bash)            in ~/.bashrc
    zsh:   source <(anther completion zsh)             in ~/.zshrc, after compinit
    fish:  anther completion fish > ~/.config/fish/completions/anther.fish

The words are part of the script, so that completion doesn't start Python. Print it again after an update.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from anther.commands import COMMANDS, Command, benchmarks
from common.errors import AntherError

SHELLS = ("bash", "zsh", "fish")


def main() -> int:
    """Print the script of the shell named by the argument."""
    if len(sys.argv) != 2 or sys.argv[1] not in SHELLS:
        wants_help = sys.argv[1:] in (["-h"], ["--help"])
        print(
            __doc__ if wants_help else f"error: anther completion: needs one of: {', '.join(SHELLS)}",
            file=sys.stdout if wants_help else sys.stderr,
        )
        return 0 if wants_help else 2
    print(script(sys.argv[1], words()))
    return 0


def words() -> dict[str, list[str]]:
    """Return the words that may follow each command; the empty command stands for `anther` itself."""
    following: dict[str, list[str]] = {"": sorted({name.split()[0] for name in COMMANDS})}
    for name, command in COMMANDS.items():
        group, _, second = name.partition(" ")
        if second:
            following.setdefault(group, []).append(second)
        following[name] = [*following.get(name, []), *_arguments(name, command)]
    return following


def _arguments(name: str, command: Command) -> list[str]:
    if name == "completion":
        return list(SHELLS)
    if name == "keys":
        return ["init", "ticket", "list", "revoke", "rotate", "--help"]
    if name == "bench":
        try:
            return list(benchmarks())
        except AntherError:
            return []
    keys = _keys(command.schema) if command.schema else []
    return [*keys, *(_options(name) if command.groups else []), "--help"]


def _keys(schema: str) -> list[str]:
    """List the keys with values, without groups, each followed by `=`."""
    from conf.explain import known_keys

    module, _, name = schema.partition(":")
    known = known_keys(getattr(importlib.import_module(module), name))
    return [f"{key}=" for key in known if not any(other.startswith(f"{key}.") for other in known)]


def _options(name: str) -> list[str]:
    """List `group=option` of every Hydra group that a command takes."""
    import conf
    from conf.simulation_keys import refusal

    files = sorted(Path(conf.__path__[0]).glob("*/*.yaml"))
    options = [f"{file.parent.name}={file.stem}" for file in files if file.parent.name != "device"]
    return [option for option in options if name != "serve" or refusal(option) is None]


def script(shell: str, words: Mapping[str, list[str]]) -> str:
    """Return the completion script.

    Args:
        shell: bash, zsh or fish.
        words: result of `words()`.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words)


def _cases(words: Mapping[str, list[str]], indent: str) -> str:
    return "\n".join(f"{indent}'{name}') words='{' '.join(following)}' ;;" for name, following in words.items())


def _bash(words: Mapping[str, list[str]]) -> str:
    return f"""_anther() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" words cur command
    cur="${{line##* }}"
    local -a before=(${{line% *}})
    command="${{before[*]:1:2}}"
    case "$command" in
        device*) ;;
        *) command="${{before[1]:-}}" ;;
    esac
    case "$command" in
{_cases(words, "        ")}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [[ ${{COMPREPLY[0]:-}} == *= ]]; then compopt -o nospace 2>/dev/null; fi
    if [[ $cur == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${{COMPREPLY[@]#"${{cur%%=*}}="}}"); fi
}}
complete -o default -F _anther anther"""


def _zsh(words: Mapping[str, list[str]]) -> str:
    return f"""#compdef anther
_anther() {{
    local command="${{words[2]}}" following
    local -a matches
    if (( CURRENT == 2 )); then command=''; fi
    if [[ $command == device ]] && (( CURRENT > 3 )); then command="device ${{words[3]}}"; fi
    local words
    case "$command" in
{_cases(words, "        ")}
    esac
    matches=(${{=words}})
    compadd -S '' -- ${{(M)matches:#*=}}
    compadd -- ${{matches:#*=}}
    _files
}}
compdef _anther anther"""


def _fish(words: Mapping[str, list[str]]) -> str:
    lines = ["complete -c anther -e"]
    for name, following in words.items():
        if not following:
            continue
        if not name:
            condition = "__fish_use_subcommand"
        else:
            condition = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in name.split())
            if name == "device":
                seconds = " ".join(following)
                condition += f"; and not __fish_seen_subcommand_from {seconds}"
        lines.append(f"complete -c anther -f -n '{condition}' -a '{' '.join(following)}'")
    return "\n".join(lines)
