#!/usr/bin/env bash
# bitsandbytes 0.50.2, when it is imported on a CPU with AVX512-BF16, asks the Hub for a compiled kernel.
#
# Version:   bitsandbytes 0.50.2, peft 0.21.2, torch 2.13.0 (CPU).
# Behaviour: `import peft` imports bitsandbytes where that is installed, and its CPU backend then calls
#            `kernels.get_kernel` for a repository on the Hub, before any model is there, 4-bit or not.
#            With the package `kernels` that is a download of native code (or, without a network, its
#            retries) at the import of anything that imports peft: mergekit, trl, trainers. Without it,
#            a warning to install it is logged at every such import. Other CPUs see neither.
# Seen:      without kernels: 1 warning
#            with kernels: asked for kernels-community/quantization-bitsandbytes
# For users: nothing is wrong with a merge that prints this. An environment that must not load code
#            from the Hub should have only one of bitsandbytes and kernels, or HF_HUB_OFFLINE=1.
#
# Needs Python 3 with venv, a package index, and Linux on a CPU with AVX512-BF16: says so and exits
# with 0 on another. Exits with 1 if it is not as described. `kernels` is a stand-in that is asked,
# and loads nothing.
set -euo pipefail

if ! grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null; then
  echo "no AVX512-BF16 here, so that there is nothing to see"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -q torch==2.13.0 peft==0.21.2 bitsandbytes==0.50.2 numpy \
  2>"$work/log" || { cat "$work/log" >&2; exit 2; }

mkdir "$work/stand-in"
cat >"$work/stand-in/kernels.py" <<'PYTHON'
def get_kernel(repository, **_):
    print("with kernels: asked for", repository, flush=True)
    raise RuntimeError("a stand-in loads nothing")
PYTHON

{
  told=$("$python" -c 'import peft' 2>&1 | grep -c 'kernels-community' || true)
  echo "without kernels: $told warning"
  PYTHONPATH=$work/stand-in "$python" -c 'import peft' 2>"$work/err"
} | tee "$work/seen"
sed -n 's/^# Seen: *//p; s/^#            \(with kernels: asked.*\)/\1/p' "$0" >"$work/expected"
diff "$work/expected" "$work/seen" || { cat "$work/err"; exit 1; }
echo "as described"
