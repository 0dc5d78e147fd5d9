"""Blocks that are multiplied where the file is mapped are the blocks that were read."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import save_file

from sd3min import convert
from sd3min.checkpoint import Checkpoint
from sd3min.fast import mapped
from sd3min.fast.mapped import MappedLinear, mapped_network
from sd3min.fast.mmdit import FastMMDiT
from sd3min.stored import read_header
from sd3min.text_encoders import Conditioning

CPU = torch.device("cpu")
TIMES = torch.tensor([1000.0, 400.0])
EXACT = 1e-10  # relative, in float64


@pytest.fixture(params=["file", "folder"])
def opened(request, whole, tmp_path):
    if request.param == "folder":
        return Checkpoint.open(convert.convert(whole, tmp_path / "folder", progress=False))
    return Checkpoint.open(whole)


def inputs(config, dtype):
    generator = torch.Generator().manual_seed(3)
    sizes = (3, 16, 6, 10), (3, 11, config.context_width), (3, config.pooled_width)
    latents, *text = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return latents, Conditioning(*text)


def steps(network, dtype):
    latents, text = inputs(network.config, dtype)
    run = network.prepare(text, TIMES)
    return torch.stack([run(latents, i) for i in (0, 1, 1)])


def error(a, exact):
    return ((a.double() - exact).norm() / exact.norm()).item()


@torch.no_grad()
def test_every_layout_is_the_plain_network_in_float64(opened):
    part = opened.parts["mmdit"]
    network = mapped_network(part, torch.float64)
    layers = [m for block in network.blocks.blocks for m in block.modules()]
    assert sum(isinstance(m, MappedLinear) for m in layers) == 8 * part.config.depth - 3
    latents, text = inputs(part.config, torch.float64)
    plain = part.load(torch.float64, CPU)
    expected = torch.stack([plain(latents, TIMES[i].expand(3), *text) for i in (0, 1, 1)])
    made = steps(network, torch.float64)
    assert ((made - expected).abs().max() / expected.abs().max()).item() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_in_bfloat16_it_errs_as_the_network_that_was_read(kind, tmp_path):
    tensors = {n: t.to(kind) for n, t in small.mmdit().state_dict().items()}
    save_file(tensors, path := tmp_path / "mmdit.safetensors")
    part = Checkpoint.open(path).parts["mmdit"]
    exact = steps(FastMMDiT.of(part.load(torch.float64, CPU)), torch.float64)
    network = FastMMDiT.of(part.load(torch.bfloat16, CPU))
    read = error(steps(network, torch.bfloat16), exact)
    assert error(steps(mapped_network(part, torch.bfloat16), torch.bfloat16), exact) < 1.05 * read


def resident(memory) -> int:
    """Bytes of a mapping that are in memory."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        first, _, last = line.partition(" ")[0].partition("-")
        if last and int(first, 16) <= address < int(last, 16):
            return next(int(x.split()[1]) << 10 for x in lines if x.startswith("Rss:"))
    raise AssertionError("the file is not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's counts")
def test_pages_leave_the_process_after_their_block_and_can_be_had_again(tmp_path):
    tensors = {f"weight {i}": torch.full((1 << 21,), float(i)) for i in range(3)}
    save_file(tensors, path := tmp_path / "three.safetensors")
    pages = mapped.Pages(path)
    stored, _ = read_header(path)
    for _ in range(2):
        for i, one in enumerate(stored):
            pages.fetch(one)
            assert pages.read(one).eq(float(one.name[-1])).all(), i
            assert resident(pages.memory) >= 1 << 23
            pages.drop(one)
            assert resident(pages.memory) < 1 << 22


def test_a_scale_is_applied(tmp_path):
    save_file({"scale": torch.tensor(0.5), "weight": torch.ones(3, 5)}, tmp_path / "two")
    stored, _ = read_header(tmp_path / "two")
    tensors = {one.name: one for one in stored}
    scaled = replace(tensors["weight"], scale=tensors["scale"])
    assert mapped.Pages(tmp_path / "two").read(scaled).eq(0.5).all()


@torch.no_grad()
def test_each_block_is_asked_for_while_the_one_before_it_is_used_and_dropped_after(
    whole, monkeypatch
):
    network, order = mapped_network(Checkpoint.open(whole).parts["mmdit"], torch.float32), []
    blocks = network.blocks.blocks
    number = {id(stored): i for i, block in enumerate(blocks) for stored in pieces(block)}
    for do in ("fetch", "drop"):
        monkeypatch.setattr(
            mapped.Pages, do, lambda pages, stored, do=do: order.append((do, number[id(stored)]))
        )
    for i, _ in enumerate(network.blocks):
        network.blocks.worker.submit(int).result()
        order.append(("use", i))
    network.blocks.worker.shutdown()
    assert list(dict.fromkeys(order)) == [
        *[("fetch", 1), ("use", 0), ("drop", 0)],
        *[("fetch", 0), ("use", 1), ("drop", 1)],
    ]


def pieces(block):
    return [s for m in block.modules() if isinstance(m, MappedLinear) for _, s in m.pieces]


def test_files_are_closed_with_the_network(whole):
    def open_files():
        return sum(os.path.realpath(p) == str(whole) for p in Path("/proc/self/fd").iterdir())

    before = open_files()
    network = mapped_network(Checkpoint.open(whole).parts["mmdit"], torch.float32)
    assert open_files() > before
    del network
    assert open_files() == before
