#!/usr/bin/env bash
# rich 15.0.0 prints output again that a KeyboardInterrupt has cut off; a Style keeps the colour
# codes of the first console that printed it.
#
# Version:   rich 15.0.0.
# Behaviour: 1. Console.print() empties its buffer only after the file's flush(). Where flush() raises
#               (Ctrl-C, while a terminal or a pipe takes no more), the program may go on, and its
#               next print() writes the whole of the interrupted text once more.
#            2. Style caches its ANSI codes without the colour system that they are for. A second
#               Console with fewer colours gets those of the first: true colour on 16 colours. Styles
#               that are given as text are shared by all consoles of a process (Style.parse is cached).
# Seen:      'table\n' + 'table\nnext\n'
#            '\x1b[38;2;195;70;67mx\x1b[0m\n' of the console of 16 colours, too
# For users: 1. after a KeyboardInterrupt that is caught, `with console.capture(): pass` drops what is
#            left. 2. Give every console colours that it has (Color.downgrade), or styles of its own.
#
# Needs Python 3 with pip, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH NO_COLOR FORCE_COLOR
export PIP_DISABLE_PIP_VERSION_CHECK=1

python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -q rich==15.0.0 2>"$work/log" || { cat "$work/log" >&2; exit 2; }

cat >"$work/again.py" <<'PYTHON'
import io

from rich.console import Console


class Terminal(io.StringIO):
    presses = 1

    def flush(self):
        if self.presses:
            self.presses -= 1
            raise KeyboardInterrupt


terminal = Terminal()
console = Console(file=terminal, color_system=None)
try:
    console.print("table")
except KeyboardInterrupt:
    pass
if __import__("sys").argv[1:]:
    with console.capture():  # what helps
        pass
console.print("next")
print(repr(terminal.getvalue()))
PYTHON

cat >"$work/style.py" <<'PYTHON'
import io

from rich.console import Console

for system in ("truecolor", "standard"):
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system=system).print("x", style="#c34643")
    print(repr(file.getvalue()))
PYTHON

expect() { # what it prints, and the program
  seen=$("$python" "${@:2}")
  echo "$seen"
  test "$seen" = "$1" || { echo "expected $1" >&2; exit 1; }
}

expect "'table\ntable\nnext\n'" "$work/again.py"
expect "'table\nnext\n'" "$work/again.py" capture
expect "'\x1b[38;2;195;70;67mx\x1b[0m\n'
'\x1b[38;2;195;70;67mx\x1b[0m\n'" "$work/style.py"
echo "as described: the interrupted text comes twice, and 16 colours get true colour"
