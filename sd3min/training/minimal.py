"""Rectified flow, all of it: `python -m sd3min.training.minimal` learns two moons and ten digits
from nothing, and draws minimal.png: moons on their way out of noise, and the digits asked for.
"""

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import layer_norm, one_hot, silu

from sd3min import flow


class Network(nn.Module):
    """The velocity of points [b, size] at times [b], under labels [b] from 0 to 9."""

    def __init__(self, size: int, width: int = 384):
        super().__init__()
        self.enter, self.leave = nn.Linear(size + 16 + 10, width), nn.Linear(width, size)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """v(z, t) [b, size]; the time is seen as waves of eight lengths."""
        waves = torch.pi * t[:, None] * torch.arange(1, 9)
        h = self.enter(torch.cat([z, waves.sin(), waves.cos(), one_hot(label, 10)], dim=1))
        for layer in self.layers:
            h = h + silu(layer(layer_norm(h, h.shape[1:])))
        return self.leave(h)


def moons(label: Tensor) -> Tensor:
    """Points [b, 2] on the upper half circle or, under odd labels, on the lower."""
    angle, side = torch.pi * torch.rand(len(label)), 1 - 2 * (label % 2)
    circle = torch.stack([2 * angle.cos() - 1, 2 * angle.sin() - 0.5], dim=1)
    return side[:, None] * circle + 0.1 * torch.randn(len(label), 2)


def digits(label: Tensor) -> Tensor:
    """Pictures [b, 16·16] of the labels in -1 to 1, each a little off the centre."""
    pictures = [Image.new("L", (16, 16)) for _ in label]
    places = (7 + 2 * torch.rand(len(label), 2)).tolist()
    for picture, digit, (x, y) in zip(pictures, label.tolist(), places, strict=True):
        ImageDraw.Draw(picture).text((x, y), str(digit), fill=255, font_size=14, anchor="mm")
    return torch.tensor([list(picture.tobytes()) for picture in pictures]) / 127.5 - 1


def train(data: Tensor, label: Tensor, steps: int = 1500) -> Network:
    """A network that has learnt the way between data [n, size] and noise."""
    network = Network(data.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        some = torch.randint(len(data), (128,))
        t, noise = torch.randn(128).sigmoid(), torch.randn_like(data[some])
        velocity = network(flow.interpolate(data[some], noise, t[:, None]), t, label[some])
        (velocity - flow.velocity_target(data[some], noise)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


@torch.no_grad()
def sample(network: Network, noise: Tensor, label: Tensor, steps: int = 20) -> list[Tensor]:
    """Where noise [b, size] is after every step along the velocity, at last at data."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return network(z, t.expand(len(z)), label)

    run = flow.steps(velocity, noise, flow.sigmas(steps, shift=1.0))
    return [noise, *(step.next_latents for step in run)]


def main() -> None:
    """Learn both and draw them, 640 by 416 pixels."""
    label, sheet = torch.arange(5000) % 10, torch.zeros(208, 320)
    run = sample(train(moons(label), label), torch.randn(5000, 2), label)
    for panel, points in enumerate(run[::5]):
        x, y = ((points.clamp(-4, 3.9) + 4) * 8).long().unbind(1)
        sheet[63 - y, 64 * panel + x] = 255
    asked = torch.arange(180) % 20 // 2
    made = sample(train(digits(label), label), torch.randn(180, 256), asked)[-1]
    rows = made.view(9, 20, 16, 16).transpose(1, 2).reshape(144, 320)
    sheet[64:] = 127.5 * (rows.clamp(-1, 1) + 1)
    picture = Image.fromarray(sheet.byte().numpy())
    picture.resize((640, 416), Image.Resampling.NEAREST).save("minimal.png")


if __name__ == "__main__":
    main()
