"""The smallest rectified flow learns, measured against what no learning could reach."""

import ast
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd3min import flow
from sd3min.training import minimal

MOST_LINES = 60  # of code, without docstrings and blank lines


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def loss(velocity, data, label, t):
    noise = torch.randn_like(data)
    predicted = velocity(flow.interpolate(data, noise, t[:, None]), t, label)
    return (predicted - flow.velocity_target(data, noise)).square().mean().item()


def gaussian_loss(data, t):
    """The least loss, at times t, of a velocity that knows mean and covariance of the data alone.

    Along a principal axis of variance s² the velocity's variance given z_t is
    s² / ((1 − t)²·s² + t²), which follows from Gaussian conditioning.
    """
    variances = torch.linalg.eigvalsh(data.T.cov()).clamp(min=0)
    left = variances / ((1 - t[:, None]) ** 2 * variances + t[:, None] ** 2)
    return left.mean().item()


def test_that_bound_is_met_by_gaussian_data_and_its_own_velocity():
    scale = torch.tensor([2.0, 0.5])
    data, t = scale * torch.randn(100_000, 2), torch.rand(100_000)

    def velocity(z, t, label):
        t, variance = t[:, None], scale**2
        return z * (t - variance * (1 - t)) / (variance * (1 - t) ** 2 + t**2)

    assert loss(velocity, data, None, t) == pytest.approx(gaussian_loss(data, t), rel=0.02)


def test_two_moons_are_learnt():
    """Better than by any affine velocity; and samples lie on the moon asked for, all along it."""
    label = torch.arange(4000) % 2
    data, fresh = minimal.moons(label), minimal.moons(label)
    network = minimal.train(data, label, steps=400)
    t = torch.rand(4000)
    with torch.no_grad():
        reached = loss(network, fresh, label, t)
    best_constant = 1 + fresh.var(dim=0).mean().item()  # the variance of ε − x0
    assert reached < gaussian_loss(fresh, t) < best_constant

    run = minimal.sample(network, torch.randn(1000, 2), label[:1000])
    assert len(run) == 21
    distances = torch.cdist(run[-1], fresh)
    assert distances.min(dim=1).values.mean() < 0.1  # within the thickness of a moon
    assert (label[distances.argmin(dim=1)] == label[:1000]).float().mean() > 0.98
    other = torch.cdist(fresh[::10], run[-1]).min(dim=1).values
    assert other.max() < 0.5  # and no part of a moon is left out


def test_the_digit_asked_for_is_drawn():
    """Nearest to a drawn one of its kind nine times in ten; one in ten would be chance."""
    label = torch.arange(2000) % 10
    data = minimal.digits(label)
    network = minimal.train(data, label)
    t = torch.rand(2000)
    with torch.no_grad():
        reached = loss(network, data, label, t)
    best_constant = 1 + data.var(dim=0).mean().item()
    assert reached < gaussian_loss(data, t) < best_constant

    made = minimal.sample(network, torch.randn(200, 256), label[:200])[-1]
    nearest = torch.cdist(made, data).argmin(dim=1)
    assert (label[nearest] == label[:200]).float().mean() > 0.9


def test_it_writes_its_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = minimal.train
    monkeypatch.setattr(minimal, "train", lambda data, label: train(data, label, steps=2))
    minimal.main()
    assert Image.open("minimal.png").size == (640, 416)


def test_it_uses_flow_alone_and_stays_short():
    source = Path(minimal.__file__).read_text()
    tree = ast.parse(source)
    own = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    named = [n.name for node in own if getattr(node, "module", "") == "sd3min" for n in node.names]
    assert named == ["flow"] and "sd3min." not in source.replace("sd3min.training.minimal", "")
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    documented = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    words = [n.body[0] for n in documented if ast.get_docstring(n)]
    docstrings = sum(word.end_lineno - word.lineno + 1 for word in words)
    assert sum(bool(line.strip()) for line in source.splitlines()) - docstrings < MOST_LINES
