"""Where do two runs part? Every tensor on the way through a network, by name, and the first of two
rows of them that differs.

Names are those of our modules, which are the official tensors' names: `….in` is what a module was
given, `….out` what it made of it. diffusers' networks are recorded under the same names, by the
table of `sd3min.formats`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sd3min import formats
from sd3min.config import AutoencoderConfig, MMDiTConfig, Refusal

SINGLE = 1e-5  # relative: what two float32 runs of one network may differ by
STREAMS = {  # diffusers' names of what goes through a joint block
    "hidden_states": "image",
    "encoder_hidden_states": "context",
    "temb": "cond",
}
BLOCKS = ("JointBlock", "JointTransformerBlock")
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Trace:
    """A run: its tensors in the order in which they came about, where, and what it returned."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    output: Any = None


class Difference(NamedTuple):
    """The first tensor that differs, by how much of its largest value, and the line it is from."""

    name: str
    error: float
    place: str

    def __str__(self) -> str:
        return f"{self.name} differs by {self.error:.1e} of its largest value: {self.place}"


def place() -> str:
    """The two innermost lines of this package that are being run, probes left out."""
    frame, lines = inspect.currentframe(), []
    while frame is not None and len(lines) < 2:
        path, code = Path(frame.f_code.co_filename), frame.f_code
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "probes"):
            file = path.relative_to(PACKAGE.parent)
            lines.append(f"{file}:{frame.f_lineno} in {code.co_qualname}")
        frame = frame.f_back
    return ", called by ".join(lines)


class Piece(NamedTuple):
    """A module's share of a named tensor: one of several that stand side by side."""

    name: str
    place: int = 0
    of: int = 1
    ours: Callable[[Tensor], Tensor] = lambda output: output


def last_first(output: Tensor) -> Tensor:
    """A layer's output with the halves in our order."""
    return formats.swap_halves(output.movedim(-1, 0)).movedim(0, -1)


def table(model: nn.Module) -> dict[str, Piece]:
    """Our names for a network's modules: the table's for diffusers', their own for all others."""
    config: Any = getattr(model, "config", None)
    if type(model).__name__ == "SD3Transformer2DModel":
        rows = list(formats.rows(MMDiTConfig(config.num_layers)))
    elif type(model).__name__ == "AutoencoderKL":
        widths = tuple(config.block_out_channels)
        rows = list(formats.rows(AutoencoderConfig(widths, config.layers_per_block)))
    else:
        return {name: Piece(name) for name, _ in model.named_modules()}
    found = {}
    for official, theirs, _, back in rows:
        turn = {"ours": last_first} if back is formats.swap_halves else {}
        for index, name in enumerate(theirs):
            found[name] = Piece(official, index, len(theirs), **turn)
        if "blocks." in official:  # the block that the layer is in
            block, other = (".".join(name.split(".")[:2]) for name in (official, theirs[0]))
            found[other] = Piece(block)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in what a call returned."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        [t for item in value for t in tensors_of(item)] if isinstance(value, list | tuple) else []
    )


class Recorder:
    """The hooks of one trace."""

    def __init__(self, model: nn.Module):
        self.trace = Trace()
        self.pieces: dict[str, list[Tensor]] = {}
        self.sides: tuple[int, ...] = ()  # of the last feature map
        self.hooks = list(self.listen(model))

    def listen(self, model: nn.Module) -> Iterator[Any]:
        """Hook every module that has weights of its own, and every joint block."""
        names = table(model)
        for name, module in model.named_modules():
            piece = names.get(name)
            if piece is None:
                continue
            if type(module).__name__ in BLOCKS:
                before, after = partial(self.enter_block, piece), partial(self.leave_block, piece)
                yield module.register_forward_pre_hook(before, with_kwargs=True)
                yield module.register_forward_hook(after)
            elif next(module.parameters(recurse=False), None) is not None:
                yield module.register_forward_pre_hook(partial(self.enter, piece))
                yield module.register_forward_hook(partial(self.leave, piece))

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a copy; the second of a name is numbered."""
        number, numbered = 1, name
        while numbered in self.trace.tensors:
            number += 1
            numbered = f"{name} ({number})"
        self.trace.tensors[numbered] = tensor.detach().to("cpu", copy=True)
        self.trace.places[numbered] = place()

    def shaped(self, name: str, tensor: Tensor) -> Tensor:
        """An image's features as a map, where diffusers has them as rows."""
        if tensor.dim() == 4:
            self.sides = tuple(tensor.shape[2:])
        if ".mid.attn_1." not in name or tensor.dim() == 4:
            return tensor
        rows = tensor if name.endswith((".norm.in", ".norm.out")) else tensor.transpose(1, 2)
        return rows.unflatten(2, self.sides)

    def enter(self, piece: Piece, _: nn.Module, given: tuple[Any, ...]) -> None:
        """What a layer is given; of layers side by side, the first speaks for all."""
        if piece.place == 0 and isinstance(given[0], Tensor):
            name = f"{piece.name}.in"
            self.add(name, self.shaped(name, given[0]))

    def leave(self, piece: Piece, _: nn.Module, __: object, output: Tensor) -> None:
        """What a layer makes of it, once all that stand side by side are there."""
        side_by_side = self.pieces.setdefault(piece.name, [])
        side_by_side.append(output)
        if len(side_by_side) == piece.of:
            name = f"{piece.name}.out"
            whole = torch.cat(side_by_side, -1) if piece.of > 1 else output
            self.add(name, piece.ours(self.shaped(name, whole)))
            side_by_side.clear()

    def enter_block(
        self, piece: Piece, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Both streams and the condition before a block."""
        bound = inspect.signature(block.forward).bind(*given, **named).arguments
        for argument, value in bound.items():
            if isinstance(value, Tensor):
                self.add(f"{piece.name}.in.{STREAMS.get(argument, argument)}", value)

    def leave_block(self, piece: Piece, _: nn.Module, __: object, output: tuple[Any, ...]) -> None:
        """Both streams after it; diffusers drops the text's after the last."""
        for stream, value in zip(("context", "image"), output, strict=True):
            if value is not None:
                self.add(f"{piece.name}.out.{stream}", value)


def trace(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Trace:
    """Call a network, or a method of one, as it is called anyway, and keep what comes about.

    `trace(mmdit, latents, timesteps, context, pooled)`, `trace(autoencoder.decode, latents)`,
    `trace(text_encoders.encode, prompts)`; likewise diffusers' SD3Transformer2DModel and
    AutoencoderKL, called in their own way. The output is what it is without a trace, to the bit.
    Copies of all tensors are kept on the CPU: some 100 times the size of the tokens.
    """
    model = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
    if not isinstance(model, nn.Module):
        raise Refusal(f"{call} is no network: pass one, or a method of one")
    recorder = Recorder(model)
    try:
        output = call(*args, **kwargs)
    finally:
        for hook in recorder.hooks:
            hook.remove()
    found = tensors_of(output)
    for index, tensor in enumerate(found):
        recorder.add("output" if len(found) == 1 else f"output.{index}", tensor)
    return Trace(recorder.trace.tensors, recorder.trace.places, output)


def relative(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |b|, of any shape; infinite where the shapes differ or only one holds
    numbers.
    """
    if a.shape != b.shape:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
    return error if error == error else float("inf")


def first_difference(a: Trace, b: Trace, tolerance: float = SINGLE) -> Difference | None:
    """The first tensor of `a`, as it ran, that differs in `b`; None where all that both have agree.

    `tolerance` is relative to the tensor's largest value. All that such a tensor was computed from
    agrees, so what computes it is to blame: an `.in` on the line that is named, an `.out` there or
    in the weights of that name.
    """
    shared = [name for name in a.tensors if name in b.tensors]
    if not shared:
        raise Refusal("the two traces have no tensor in common: trace two runs of one network")
    for name in shared:
        error = relative(a.tensors[name], b.tensors[name])
        if error > tolerance:
            places = (side.places[name] for side in (a, b))
            return Difference(name, error, next(filter(None, places), "not a line of sd3min"))
    return None
