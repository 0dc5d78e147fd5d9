"""LoRA files, read in every dialect, and strictly."""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sd3min.config import Refusal, Shapes
from sd3min.lora.layers import LowRank
from sd3min.lora.model import LoRA, shapes
from sd3min.lora.names import (
    LYING,
    PEFT,
    STRANGERS,
    Place,
    places,
    prefix,
    split,
)
from sd3min.parts import STORED_TYPES, TITLES, some
from sd3min.stored import AnyStored, Joined, read_header

ADAPTERS = "lora_adapter_metadata"  # in which diffusers keeps PEFT's settings of each part
Stems = dict[str, dict[str, AnyStored]]  # by a layer's name, and by what a tensor is of it


class Opened(NamedTuple):
    """What the header of a LoRA file says."""

    path: Path
    stems: Stems
    unknown: list[str]  # names that end in no known way
    settings: Mapping[str, Any]  # PEFT's


def open_lora(path: str | Path) -> Opened:
    """Read a header; refused where the file is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"the LoRA {path} is not a file: pass the path of a .safetensors file")
    stored, metadata = read_header(path)
    stems: Stems = {}
    unknown = []
    for tensor in stored:
        stem, kind = split(tensor.name)
        if not kind or kind in stems.get(stem, {}):
            unknown.append(tensor.name)
        else:
            upright = Joined.of(tensor.name, [tensor], turned) if LYING in tensor.name else tensor
            stems.setdefault(stem, {})[kind] = upright
    return Opened(path, stems, unknown, settings(path, metadata))


def turned(tensor: Tensor) -> Tensor:
    """A matrix on its other side."""
    return tensor.transpose(0, -1)


def settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings: in the metadata or in the file beside; refused where they are damaged."""
    beside = path.with_name("adapter_config.json")
    try:
        found = json.loads(metadata.get(ADAPTERS, "{}"))
        if path.name == "adapter_model.safetensors" and beside.is_file():
            own = json.loads(beside.read_text(encoding="utf-8"))
            found |= {PEFT.starts["mmdit"] + name: value for name, value in own.items()}
        return dict(found)
    except (OSError, TypeError, ValueError, RecursionError):
        raise Refusal(f"the settings of the LoRA {path} are damaged: copy it again") from None


def read(path: str | Path, parts: Mapping[str, Shapes | nn.Module]) -> LoRA:
    """The LoRA in a file for parts of a model: modules, or the official names and shapes of theirs.

    Raises Refusal where a name is unknown, half of a pair is missing, or a shape or a value cannot
    be; warns where the file has more for parts that are not given.
    """
    given = {n: shapes(part) if isinstance(part, nn.Module) else part for n, part in parts.items()}
    opened, known = open_lora(path), places(given)
    others = {stem: part for stem in opened.stems if (part := prefix(stem)[1]) in TITLES}
    absent = {stem: part for stem, part in others.items() if part not in parts}
    stems = {stem: found for stem, found in opened.stems.items() if stem not in absent}
    if faults := found_faults(opened, stems, known):
        raise Refusal(f"the LoRA {opened.path} {looks(opened)}{', '.join(faults)}: pass one for it")
    if absent:
        titles = ", ".join(TITLES[part] for part in TITLES if part in absent.values())
        said = f"the LoRA {opened.path} has layers for {titles}, which is not loaded: left out"
        warnings.warn(said, stacklevel=2)
    made = [
        (known[stem].layer, change(opened, stem, found, known[stem]))
        for stem, found in stems.items()
    ]
    odd = [stem for stem, (_, one) in zip(stems, made, strict=True) if not sound(one)]
    if odd:
        raise Refusal(f"the LoRA {opened.path} has NaN or infinity in {some(odd)}: pass another")
    return LoRA(made).requires_grad_(False)


def found_faults(opened: Opened, stems: Stems, known: Mapping[str, Place]) -> list[str]:
    """What keeps a file from being a LoRA of the model, in words."""
    strange = [stem for stem in stems if stem not in known]
    unknown = [tensor.name for stem in strange for tensor in stems[stem].values()]
    there = {stem: found for stem, found in stems.items() if stem in known}
    half = [stem for stem, found in there.items() if not found.keys() >= {"down", "up"}]
    misshapen = [
        fault
        for stem, found in there.items()
        if stem not in half
        for fault in misfits(found, known[stem])
    ]
    untyped = [
        f"{tensor.name} as {tensor.dtype}"
        for found in there.values()
        for tensor in found.values()
        if tensor.dtype not in STORED_TYPES
    ]
    rows = {
        stem: (known[stem].layer, known[stem].rows.start, known[stem].rows.stop) for stem in there
    }
    counts = Counter(rows.values())
    twice = [stem for stem in there if counts[rows[stem]] > 1]
    unknown += opened.unknown
    found = {
        f"has {some(unknown)}, which the model has no layer for": unknown,
        f"has but half of {some(half)}": half,
        f"has {some(twice)} for the same place": twice,
        f"has {some(misshapen)}": misshapen,
        f"has {some(untyped)}, no plain floating-point type": untyped,
        "holds no layers": () if opened.stems or unknown else (opened.path,),
    }
    return [words for words, faults in found.items() if faults]


def misfits(found: Mapping[str, AnyStored], place: Place) -> list[str]:
    """The tensors of a layer that have another shape than they should."""
    height, width = place.rows.stop - place.rows.start, place.layer.width
    rank = (found["down"].shape or [0])[0]
    values = {kind: math.prod(tensor.shape) for kind, tensor in found.items()}
    fits = {
        "down": rank > 0 and values["down"] == rank * width,
        "up": found["up"].shape[:2] == [height, rank] and values["up"] == height * rank,
        "alpha": values.get("alpha") == 1,
        "magnitude": found.get("magnitude", found["up"]).shape
        in ([height], [height, 1], [1, width], [1, height, 1, 1], [height, 1, 1, 1])
        and not (place.layer.table and "magnitude" in found),
    }
    words = f"for a layer of {width} to {height} values"
    return [f"{t.name} of shape {t.shape} {words}" for kind, t in found.items() if not fits[kind]]


def looks(opened: Opened) -> str:
    """What a file seems to be, in words that a fault follows."""
    named = " ".join(f"{name}." for name in (*opened.stems, *opened.unknown))
    kind = next((kind for mark, kind in STRANGERS.items() if mark in named), "")
    dialect = next((found for stem in opened.stems if (found := prefix(stem)[0])), None)
    if kind:
        return f"looks like {kind}, and "
    return f"looks like one of {dialect.title}, and " if dialect else ""


def change(opened: Opened, stem: str, found: Mapping[str, AnyStored], place: Place) -> LowRank:
    """The change that a file has for a layer."""
    values = {kind: tensor.read() for kind, tensor in found.items()}
    down, up = values["down"].flatten(1), values["up"].flatten(1)
    lengths, layer = values.get("magnitude"), place.layer
    if lengths is not None:
        lengths = lengths if lengths.dim() == 2 else lengths.reshape(-1, 1)
    if not place.dialect.official:
        up = layer.back(up)
        lengths = layer.back(lengths) if lengths is not None and len(lengths) > 1 else lengths
    rows = place.rows
    if layer.table:  # whose rows are zeros but for some words'
        told = up.any(dim=1).nonzero().flatten().tolist() or [0]
        rows = slice(told[0], told[-1] + 1)
        up = up[rows]
    return LowRank(down, up, alpha_of(opened, stem, found), rows, lengths)


def alpha_of(opened: Opened, stem: str, found: Mapping[str, AnyStored]) -> float:
    """A layer's alpha: its own, or that of PEFT's settings."""
    if "alpha" in found:
        return found["alpha"].read().item()
    return peft_alpha(opened, stem, found["down"].shape[0])


def peft_alpha(opened: Opened, stem: str, rank: int) -> float:
    """The alpha that PEFT's settings give a layer; the rank where there are none.

    A rank-stabilised LoRA (Kalajdzievski 2023) is divided by √r in place of r.
    """
    dialect, part = prefix(stem)
    start = dialect.starts[part] if dialect else ""
    own = {n.removeprefix(start): v for n, v in opened.settings.items() if n.startswith(start)}
    try:
        patterns, name = own.get("alpha_pattern") or {}, stem.removeprefix(start)
        given = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), None)
        alpha = float(own.get("lora_alpha", rank) if given is None else given)
    except (AttributeError, TypeError, ValueError, re.error):
        raise Refusal(
            f"the settings of the LoRA {opened.path} are damaged: copy it again"
        ) from None
    return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha


def sound(low_rank: LowRank) -> bool:
    """Whether all values are numbers."""
    tensors = all(tensor.float().isfinite().all() for tensor in low_rank.parameters())
    return tensors and math.isfinite(low_rank.alpha)
