"""Joint blocks that are given their modulation and leave the rest to `kernels`.

The modules are the plain ones of `mmdit` without those that make the modulation, which is computed
for a whole run at once.
"""

from collections.abc import Callable, Iterator, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from sd3min.fast import kernels
from sd3min.mmdit import DualStream, Heads, JointBlock, LastContextStream, Stream

AnyStream = Stream | LastContextStream
Parts = Float[Tensor, "b _ d"]
MODULATION = "adaLN_modulation"
ROWS = 2048  # tokens that go through an MLP at a time, for the size of its hidden layer


def qkv(attn: Heads, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d3"]:
    """Queries, keys and values of all heads side by side, normalised where the model does that."""
    return kernels.normalise_heads(attn.qkv(tokens), attn.ln_q, attn.ln_k)


def opened(stream: AnyStream, tokens: Tensor, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """What goes to the joint attention, and the gated result of the image's own, if it has one."""
    joint = qkv(stream.attn, kernels.modulate(tokens, parts[:, 0], parts[:, 1]))
    if not isinstance(stream, DualStream):
        return joint, None
    alone = qkv(stream.attn2, kernels.modulate(tokens, parts[:, 6], parts[:, 7]))
    return joint, stream.attn2.proj(kernels.attention(alone))


def closed(
    stream: AnyStream, tokens: Tensor, attended: Tensor, own: Tensor | None, parts: Parts
) -> Tensor:
    """The gated residuals of attention and MLP, written over the tokens."""
    if not isinstance(stream, Stream):
        return tokens
    if own is not None:
        tokens = kernels.add_gated_(tokens, parts[:, 8], own)
    tokens = kernels.add_gated_(tokens, parts[:, 2], stream.attn.proj(attended))
    fc1, _, fc2 = stream.mlp
    for rows, own in pieces(tokens, parts):
        hidden = kernels.gelu_(fc1(kernels.modulate(rows, own[:, 3], own[:, 4])))
        kernels.add_gated_(rows, own[:, 5], fc2(hidden))
    return tokens


def pieces(tokens: Tensor, parts: Parts) -> Iterator[tuple[Tensor, Parts]]:
    """All tokens, or of more than `ROWS` a picture's at a time, `ROWS` by `ROWS`."""
    if tokens.shape[:2].numel() <= ROWS:
        yield tokens, parts
        return
    for own_tokens, own_parts in zip(tokens.split(1), parts.split(1), strict=True):
        yield from ((rows, own_parts) for rows in own_tokens.split(ROWS, dim=1))


class FastBlock(nn.Module):
    """A joint block whose modulation is given, row by row of the batch."""

    def __init__(self, block: JointBlock):
        super().__init__()
        self.context_block, self.x_block = block.context_block, block.x_block

    def forward(
        self,
        context: Float[Tensor, "b l d"],
        image: Float[Tensor, "b n d"],
        context_parts: Parts,
        image_parts: Parts,
        repeats: int = 1,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b n d"]]:
        """Both streams, one block further, in the memory of the old ones.

        `repeats`: how many equal rows the last one of the context stands for.
        """
        context_qkv, _ = opened(self.context_block, context, context_parts)
        image_qkv, own = opened(self.x_block, image, image_parts)
        to_context, to_image = kernels.joint_attention(context_qkv, image_qkv, repeats)
        context = closed(self.context_block, context, to_context, None, context_parts)
        return context, closed(self.x_block, image, to_image, own, image_parts)


def without_modulation(block: JointBlock) -> JointBlock:
    """A block, perhaps on the meta device, that has no weights for its modulation."""
    for stream in (block.context_block, block.x_block):
        setattr(stream, MODULATION, nn.Identity())
    return block


def remake(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            remake(child, make)


def build(
    skeleton: JointBlock, tensors: Mapping[str, Tensor], make: Callable[[nn.Linear], nn.Module]
) -> FastBlock:
    """A block of a skeleton without modulation and its tensors, its linear layers remade."""
    skeleton.load_state_dict(tensors, strict=True, assign=True)
    remake(skeleton.requires_grad_(False), make)
    return FastBlock(skeleton)
