"""UpIT's expansion once more, naively: whole models in memory, numpy, Python integers, no streaming.

Shares no code with the package, so that agreement means something.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tests.conftest import Family

PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def key(*parts: object) -> tuple[np.uint32, np.uint32]:
    """(odd multiplier, offset) from the first eight bytes of a SHA-256."""
    data = b""
    for part in parts:
        text = str(part).encode()
        data += len(text).to_bytes(4, "little") + text
    first, second = np.frombuffer(hashlib.sha256(data).digest()[:8], dtype="<u4")
    return first | np.uint32(1), second


def lowbias32(x: np.ndarray) -> np.ndarray:
    """The published hash in uint32 arithmetic, with its last step."""
    x = x.astype(np.uint32)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def mask(seed: int, expert: int, slot: int, name: str, count: int, density: float) -> np.ndarray:
    index = np.arange(count, dtype=np.uint32)
    mixed = lowbias32(index ^ key(seed, "element", name)[1])
    multiplier, offset = key(seed, expert, slot, name)
    # Kept where the lower 31 bits are below the density's share of their range.
    number = (mixed * multiplier + offset) & np.uint32(0x7FFFFFFF)
    return number.astype(np.int64) < min(round(density * 2**31), 2**31 - 1)


def normals(count: int, seed: int, expert: int, what: str, name: str) -> np.ndarray:
    """Sums of twelve 16-bit uniforms, centred, by whole numbers; float64, (count,)."""
    index = np.arange(count, dtype=np.uint32)
    mixed = lowbias32(index ^ key(seed, "element", name)[1])
    total = np.zeros(count, dtype=np.int64)
    for word in range(6):
        multiplier, offset = key(seed, expert, what, name, word)
        x = mixed * multiplier + offset
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        # The upper half counts from -32768, so its sign bit counts the other way.
        upper = (x >> np.uint32(16)) ^ np.uint32(0x8000)
        total += upper.astype(np.int64) + (x & np.uint32(0xFFFF)).astype(np.int64)
    return (total - 12 * 0x8000 + 6) / 65536


def drawn_anew(seed: int, expert: int, layer: int, share: float, size: int) -> list[int]:
    """The dimensions with the smallest hashes, as signed numbers."""
    index = np.arange(size, dtype=np.uint32)
    hashed = lowbias32(index ^ key(seed, "drawn anew", expert, layer)[1]).view(np.int32)
    return sorted(np.argsort(hashed)[: int(round(share * size, 6))].tolist())


def six_digits(x: float) -> float:
    return float(f"{x:.6g}")


def copies(
    models: list[dict[str, torch.Tensor]],
    count: int,
    seed: int,
    noise: float,
    share: float,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Every expert tensor of upcycled models, by canonical name."""
    output: dict[str, torch.Tensor] = {}
    for expert in range(count):
        model = models[expert % len(models)]
        for name, stored in model.items():
            if ".mlp." not in name:
                continue
            layer, projection = int(name.split(".")[2]), name.split(".")[4]
            target = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            target = f"{target}.{PROJECTIONS[projection]}.weight"
            values = stored.double().numpy()
            if projection == "down_proj":
                values = values.T
            result = values.astype(np.float32)

            def z(what: str, name: str = name, expert: int = expert, like=stored) -> np.ndarray:
                numbers = normals(like.numel(), seed, expert, what, name).reshape(like.shape)
                numbers = numbers.T if ".down_proj." in name else numbers
                return numbers.astype(np.float32)

            if noise:
                result += z("noise") * np.float32(noise * six_digits(values.std()))
            rows = drawn_anew(seed, expert, layer, share, len(values))
            if rows:
                mean, deviation = (
                    np.float32(six_digits(value))
                    for value in (values[rows].mean(), values[rows].std())
                )
                result[rows] = z("drawn anew")[rows] * deviation + mean
            if projection == "down_proj":
                result = result.T
            changed = torch.from_numpy(np.ascontiguousarray(result)).to(dtype)
            output[target] = changed if noise or rows else stored.to(dtype)
    return output


def dropped(delta: np.ndarray, keep: np.ndarray, density: float, weight: float) -> np.ndarray:
    scaled = delta * np.float32(weight / density)
    return scaled if density >= 1 else np.where(keep, scaled, np.float32(0))


def experts_of(lineage: dict, name: str) -> list[dict]:
    """The experts' parts of one dense tensor, from a report's lineage."""
    for unit in lineage.get("units", []):
        if name.startswith(unit["name"] + "."):
            return unit["experts"]
    return lineage["experts"]


def grow(
    base: dict[str, torch.Tensor],
    checkpoints: list[dict[str, torch.Tensor]],
    lineage: dict,
    density: float,
    seed: int,
    mutation: str,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Every expert tensor of the output, by canonical name, from the lineage in a report."""
    layers = 1 + max(int(name.split(".")[2]) for name in base if name.startswith("model.layers."))
    output: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for projection, short in PROJECTIONS.items():
            name = f"model.layers.{layer}.mlp.{projection}.weight"
            origin = base[name].float().numpy().ravel()
            deltas = [c[name].float().numpy().ravel() - origin for c in checkpoints]
            grown: list[np.ndarray] = []
            for index, expert in enumerate(experts_of(lineage, name)):
                target = f"model.layers.{layer}.block_sparse_moe.experts.{index}.{short}.weight"
                if expert["checkpoint"] is not None:
                    grown.append(deltas[expert["checkpoint"]])
                    output[target] = checkpoints[expert["checkpoint"]][name].to(dtype)
                    continue
                if mutation == "once" or expert["parents"] is None:
                    parts = [(i, deltas[i], w) for i, w in enumerate(expert["weights"]) if w]
                else:
                    shares = (expert["alpha"], 1 - expert["alpha"])
                    parts = [
                        (slot, grown[parent], shares[slot])
                        for slot, parent in enumerate(expert["parents"])
                    ]
                child = None
                share = 1.0 if expert["parents"] is None else density  # of an average all
                for slot, delta, weight in parts:
                    keep = mask(seed, index, slot, name, origin.size, share)
                    part = dropped(delta, keep, share, weight)
                    child = part if child is None else child + part
                grown.append(child)
                values = torch.from_numpy(child + origin).view(base[name].shape)
                output[target] = values.to(dtype)
    return output


# ---- a folder that a run wrote -------------------------------------------------------------


def unlike(written: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one of the two has, or whose tensors are not the same bits."""

    def same(name: str) -> bool:
        ours, theirs = written[name], expected[name].contiguous()
        return ours.dtype == theirs.dtype and torch.equal(
            ours.view(torch.uint8), theirs.view(torch.uint8)
        )

    shared = written.keys() & expected.keys()
    return sorted((written.keys() ^ expected.keys()) | {n for n in shared if not same(n)})


def unlike_grown(family: Family, out: Path, density: float, mutation: str) -> list[str]:
    """Names of the expert tensors that are not, bit for bit, the naive ones."""
    report = json.loads((out / "upit_report.json").read_text())
    expected = grow(
        load_model(family.base),
        [load_model(path) for path in family.checkpoints],
        report["lineage"],
        density,
        report["seed"],
        mutation,
        getattr(torch, report["dtype"]),
    )
    return unlike({n: t for n, t in load_model(out).items() if ".experts." in n}, expected)


def unlike_copies(family: Family, out: Path, models: list[int]) -> list[str]:
    """Names of all tensors but the gates that are not, bit for bit, those of naive copies."""
    report = json.loads((out / "upit_report.json").read_text())
    sources = [load_model(family.checkpoints[index]) for index in models]
    dtype, settings = getattr(torch, report["dtype"]), report["parameters"]
    expected = copies(
        sources,
        len(report["lineage"]["experts"]),
        report["seed"],
        settings["noise"],
        settings["reinitialise"],
        dtype,
    )
    expected |= {n: t.to(dtype) for n, t in sources[-1].items() if ".mlp." not in n}
    written = {n: t for n, t in load_model(out).items() if not n.endswith("gate.weight")}
    return unlike(written, expected)
