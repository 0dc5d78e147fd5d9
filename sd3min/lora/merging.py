"""LoRAs that are merged into weights as these are read from their files.

So they work with every way to keep a model in memory: nothing but the tensors is different.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sd3min.checkpoint import AnyPath, Checkpoint, fingerprint
from sd3min.config import Refusal
from sd3min.lora.layers import LowRank, changed
from sd3min.lora.reading import read
from sd3min.parts import LoRAOrigin
from sd3min.stored import Changed

LoRAs = AnyPath | Sequence[AnyPath | tuple[AnyPath, float]]


def listed(loras: LoRAs | None) -> list[tuple[Path, float]]:
    """Paths with their scales, 1 where none is given; refused where a path is there twice."""
    given = [loras] if isinstance(loras, str | Path) else loras or []
    pairs = [(each, 1.0) if isinstance(each, str | Path) else each for each in given]
    found = [(Path(path), float(scale)) for path, scale in pairs]
    if twice := [path for i, (path, _) in enumerate(found) if path in [p for p, _ in found[:i]]]:
        raise Refusal(
            f"the LoRA {twice[0]} is given twice: give it once, with the sum as its scale"
        )
    return found


def merged(opened: Checkpoint, loras: LoRAs | None, names: Sequence[str]) -> Checkpoint:
    """Opened files in whose parts of these names LoRAs are merged; the parts have to be sound.

    Several are added up, each made for the weights as they are stored. Raises Refusal where a file
    is no LoRA of this model; see `reading.read`.
    """
    shapes = {name: opened.parts[name].shapes for name in names if name in opened.parts}
    changes: dict[str, dict[str, list[LowRank]]] = {}
    origins: dict[str, list[LoRAOrigin]] = {}
    for path, scale in listed(loras):
        lora = read(path, shapes).set_scale(scale)
        origin = LoRAOrigin(path.name, fingerprint(path), scale)
        for layer, change in lora:
            weights = changes.setdefault(layer.part, {})
            weights.setdefault(f"{layer.name}.weight", []).append(change)
            if origin not in origins.setdefault(layer.part, []):
                origins[layer.part].append(origin)
    parts = {}
    for name, weights in changes.items():
        part = opened.parts[name]
        tensors = {
            weight: Changed(part.tensors[weight], partial(changed, changes=own))
            for weight, own in weights.items()
        }
        parts[name] = replace(part, tensors=part.tensors | tensors, loras=tuple(origins[name]))
    return replace(opened, parts=opened.parts | parts)
