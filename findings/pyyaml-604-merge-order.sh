#!/usr/bin/env bash
# PyYAML 6.0.4 turned round which source of a YAML merge key wins.
#
# Version:   PyYAML 6.0.4, against 6.0.3. The pure Python loaders and the C loaders alike: both
#            flatten merge keys in constructor.py.
# Behaviour: `<<: [*first, *second]` takes over the keys of several mappings. Where two of them
#            hold the same key, YAML's merge key draft (https://yaml.org/type/merge.html) lets the
#            earlier one win, and so did PyYAML up to 6.0.3. In 6.0.4 the later one wins, without
#            an error or a warning.
# Except:    keys of one letter (of Latin-1), where the earlier one still wins. 6.0.4 leaves a pair
#            out if its key has been merged before, but compares keys by the id() of their texts,
#            and CPython keeps one object per such letter. Longer texts are new objects each time
#            they are parsed, so nothing is left out; and the order of the sources is no longer
#            reversed, so the last of equal keys stays.
# Seen:      6.0.3: {'name': 1} {'n': 1}
#            6.0.4: {'name': 2} {'n': 1}
# For users: the same valid file gives other settings after a patch release, silently, if it merges
#            several anchors with a key in common. Keys of the mapping itself still override merged
#            ones, and `<<: *one` is as it was. Until this is settled: give such keys a single
#            source, or pin pyyaml!=6.0.4.
#
# Needs Python 3 with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1

python3 -m venv "$work/venv"
python=$work/venv/bin/python
for version in 6.0.3 6.0.4; do
  "$python" -m pip install -q --target "$work/$version" "pyyaml==$version" 2>"$work/log" ||
    { cat "$work/log" >&2; exit 2; }
done

cat >"$work/merge.py" <<'PYTHON'
import yaml

TEXT = """
first: &first {KEY: 1}
second: &second {KEY: 2}
both:
  <<: [*first, *second]
"""
print(f"{yaml.__version__}:", *(yaml.safe_load(TEXT.replace("KEY", k))["both"] for k in ("name", "n")))
PYTHON

expect() { # version, what it prints
  seen=$(PYTHONPATH="$work/$1" "$python" "$work/merge.py")
  echo "$seen"
  test "$seen" = "$1: $2" || { echo "expected $1: $2" >&2; exit 1; }
}

expect 6.0.3 "{'name': 1} {'n': 1}"
expect 6.0.4 "{'name': 2} {'n': 1}"
echo "as described: of several merged mappings the first wins in 6.0.3, the last in 6.0.4"
