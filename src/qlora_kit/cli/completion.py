"""Completion of commands and flags in a shell, read off the parser."""

from __future__ import annotations

import argparse
from typing import Final

__all__ = ["SHELLS", "write_completion"]

SHELLS: Final = ("bash", "zsh", "fish")

_BASH: Final = """\
_qlora_kit() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="{commands}" ;;
    esac
    [[ $COMP_CWORD -eq 1 ]] && words="{commands}"
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _qlora_kit qlora-kit
"""


def write_completion(shell: str, commands: dict[str, argparse.ArgumentParser]) -> str:
    """The script that a shell reads at its start.

    Args:
        shell: One of :data:`SHELLS`.
        commands: The parser of each command.
    """
    flags = {
        name: sorted(flag for flag in parser._option_string_actions if flag.startswith("--"))
        for name, parser in commands.items()
    }
    names = " ".join(commands)
    if shell == "fish":
        lines = ["complete -c qlora-kit -n __fish_use_subcommand -f -a '" + names + "'"]
        lines += [
            f"complete -c qlora-kit -n '__fish_seen_subcommand_from {name}' -l {flag[2:]}"
            for name, given in flags.items()
            for flag in given
        ]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'    {name}) words="{" ".join(given)}" ;;' for name, given in flags.items())
    script = _BASH.format(cases=cases, commands=names)
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script
