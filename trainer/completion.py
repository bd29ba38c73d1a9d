"""Tab completion of `reflux`, as a script for bash, zsh or fish, from the table of sub-commands.

    eval "$(reflux completion bash)"          # zsh likewise
    reflux completion fish | source

Recipes are listed when the script is made: make it again after an update.
"""

import argparse

from .cli import COMMANDS, SubCommand
from .config.recipes import names

SHELLS = ("bash", "zsh", "fish")
BASH = """_reflux() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words="" files=""
  local recipes="{recipes}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands} --help --version"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    words="$words --help"
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$word") )
  case "$files" in
    files) COMPREPLY+=( $(compgen -f -- "$word") );;
    folders) COMPREPLY+=( $(compgen -d -- "$word") );;
  esac
}}
complete -o filenames -F _reflux reflux
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str) -> str:
    """The text of the completion script. zsh reads bash's through its own bashcompinit."""
    if shell == "fish":
        return _fish()
    cases = "\n".join(f"      {name}) {_words(c)};;" for name, c in COMMANDS.items())
    return ZSH * (shell == "zsh") + BASH.format(
        commands=" ".join(COMMANDS), cases=cases, recipes=" ".join(names())
    )


def _words(c: SubCommand) -> str:
    offered = ["$recipes" if c.takes == "recipe" else " ".join(_offered(c)), *c.options]
    files = {"recipe": "files", "file": "files", "folder": "folders", "shell": ""}[c.takes]
    return f'words="{" ".join(filter(None, offered))}"; files="{files}"'


def _offered(c: SubCommand) -> list[str]:
    return names() if c.takes == "recipe" else list(SHELLS) if c.takes == "shell" else []


def _fish() -> str:
    lines = ["complete -c reflux -n __fish_use_subcommand -f"]  # no files in place of a command
    for name, c in COMMANDS.items():
        purpose = c.purpose.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c reflux -n __fish_use_subcommand -a {name} -d '{purpose}'")
        here = f"complete -c reflux -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{here} -a '{' '.join(words)}'" for words in [_offered(c)] if words]
        lines += [f"{here} -l {option.removeprefix('--')}" for option in c.options]
    return "\n".join(lines) + "\n"


def main(words: list[str], prog: str) -> int:
    """Prints the script of a shell."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(words).shell), end="")
    return 0
