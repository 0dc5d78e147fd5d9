"""What a LoRA file is, told by its header and its alphas, without a model."""

import re
from collections import Counter
from pathlib import Path

from sd3min.config import PRESETS, Refusal
from sd3min.lora.names import prefix
from sd3min.lora.reading import Opened, Stems, alpha_of, open_lora
from sd3min.parts import TITLES, some


def is_lora(path: Path) -> bool:
    """Whether a file can be read and holds a pair of narrow matrices."""
    try:
        stems = open_lora(path).stems if path.is_file() else {}
    except Refusal:
        return False
    return any(found.keys() >= {"down", "up"} for found in stems.values())


def summary(path: Path) -> str:
    """A line for each part that a LoRA changes, with ranks, alphas and layers."""
    opened, lines = open_lora(path), []
    for part, title in TITLES.items():
        stems = {stem: found for stem, found in opened.stems.items() if prefix(stem)[1] == part}
        if stems:
            lines.append(f"  {title:12} {described(opened, part, stems)}")
    found = [dialect.title for stem in opened.stems if (dialect := prefix(stem)[0])]
    kinds = Counter(found).most_common(1)
    named = f"in the names of {kinds[0][0]}" if kinds else "in names that are not known"
    dora = any("magnitude" in found for found in opened.stems.values())
    unread = [stem for stem in opened.stems if not prefix(stem)[0]] + opened.unknown
    lines += [f"  not known: {some(unread)}"] if unread else []
    return "\n".join([str(path), f"  {'DoRA' if dora else 'LoRA'} {named}", *lines])


def described(opened: Opened, part: str, stems: Stems) -> str:
    """The layers of one part."""
    pairs = {stem: found for stem, found in stems.items() if found.keys() >= {"down", "up"}}
    ranks = [found["down"].shape[0] for found in pairs.values()]
    alphas = [alpha_of(opened, stem, found) for stem, found in pairs.items()]
    layers = [stem.removeprefix(start(stem)) for stem in stems]
    kinds = dict.fromkeys(re.sub(r"\d+", "*", layer, count=1) for layer in layers)
    half = f", {len(stems) - len(pairs)} of them half" if len(pairs) < len(stems) else ""
    width = f", {wide(pairs)}" if part == "mmdit" and pairs else ""
    sizes = f"rank {span(ranks)}, alpha {span(alphas)}" if pairs else "no pair"
    return f"{len(stems)} layers{half}, {sizes}{width}: {', '.join(kinds)}"


def start(stem: str) -> str:
    """The prefix of a layer's name."""
    dialect, part = prefix(stem)
    return dialect.starts[part] if dialect else ""


def span(values: list[float] | list[int]) -> str:
    """A value, or the least and the greatest of several."""
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def wide(stems: Stems) -> str:
    """The width of the network that a LoRA is for, and the released models that have it."""
    inputs = Counter(found["down"].shape[-1] for found in stems.values())
    ((width, _),) = inputs.most_common(1)
    names = [name for name, config in PRESETS.items() if config.width == width]
    return f"for a width of {width}" + (f" ({', '.join(names)})" if names else "")
