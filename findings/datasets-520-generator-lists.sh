#!/usr/bin/env bash
# datasets 5.2.0: a generator's arguments that are lists multiply its rows.
#
# Version:   datasets 5.2.0, against 4.0.0.
# Behaviour: `Dataset.from_generator(generator, gen_kwargs=…)` without `num_proc` calls the
#            generator once for each element of a list among `gen_kwargs`, with a list of that one
#            element. The documentation speaks of lists as shards for `num_proc` greater than 1
#            only. In 4.0.0 the generator is called once, with all that it was given.
# Seen:      4.0.0: [0, 1], with two lists [0, 1]
#            5.2.0: [0, 1, 0, 1, 0, 1], with two lists DatasetGenerationError
# For users: a generator that takes a list for anything but its shards (columns, labels, stop words)
#            gives every row as many times as the list is long, without an error or a warning; with
#            lists of unlike lengths it fails. Give tuples instead of lists: they are left alone.
#
# Needs Python 3 with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1

cat >"$work/rows.py" <<'PYTHON'
import sys
import tempfile

import datasets


def count(number, names, others=()):
    for index in range(number):
        yield {"index": index}


def rows(**arguments):
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.Dataset.from_generator(count, cache_dir=cache, gen_kwargs=arguments)
        except Exception as error:
            return type(error).__name__
        return table["index"][:]


one = rows(number=2, names=["a", "b", "c"])
two = rows(number=2, names=["a", "b", "c"], others=["d"])
assert rows(number=2, names=("a", "b", "c")) == [0, 1]
print(f"{datasets.__version__}: {one}, with two lists {two}")
PYTHON

expect() { # version, what it prints
  python3 -m venv "$work/$1"
  "$work/$1/bin/python" -m pip install -q "datasets==$1" 2>"$work/log" ||
    { cat "$work/log" >&2; exit 2; }
  seen=$("$work/$1/bin/python" "$work/rows.py" 2>"$work/log") || { cat "$work/log" >&2; exit 1; }
  echo "$seen"
  test "$seen" = "$1: $2" || { echo "expected $1: $2" >&2; exit 1; }
}

expect 4.0.0 "[0, 1], with two lists [0, 1]"
expect 5.2.0 "[0, 1, 0, 1, 0, 1], with two lists DatasetGenerationError"
echo "as described: lists among the arguments multiply the rows in 5.2.0, and did not in 4.0.0"
