"""The benchmark's arithmetic, tables and plots; what it measures is not asked for here."""

import copy
import runpy
from pathlib import Path

import pytest
import small
import torch
from PIL import Image

from sd3min.fast.linear import Int8Linear
from sd3min.fast.mmdit import FastMMDiT
from sd3min.fast.native import library
from sd3min.text_encoders import Conditioning

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def bench():
    """The functions of `tools/bench.py`."""
    return runpy.run_path(str(TOOLS / "bench.py"))


@pytest.fixture
def results(bench):
    """Figures of two sides, neither of them diffusers."""
    rows = {
        "step 512": {"stream": {"seconds": 3.0}, "fast": {"seconds": 2.0}, "operations": 4e12},
        "decode 512": {"fast": {"seconds": 5.0}, "stream": {"seconds": 5.0}},
    }
    tokens = {
        count: {s: {"seconds": 1e-3 * count} for s in ("plain", "fast")} for count in (64, 256)
    }
    scaling = {"depth": 2, "tokens": tokens}
    scaling |= {side: bench["fit"]((64, 256), (0.4, 0.6)) for side in ("plain", "fast")}
    return {"sides": ["stream", "fast"], "work": rows, "scaling": scaling}


def test_operations_are_those_of_both_halves_of_guidance_in_every_block(bench):
    tokens, width = 32 * 32 + 333, 1536
    linear = 2 * tokens * width * 12 * width  # q k v, out, and the MLP's two of four widths
    scores = 2 * 2 * tokens**2 * width
    assert bench["operations"](512, 24) == 2 * 24 * (linear + scores)
    assert bench["operations"](512, 24, batch=3) == 3 * bench["operations"](512, 24)


def test_the_fit_finds_the_exponent_and_where_the_square_term_is_the_larger(bench):
    tokens = (64, 256, 1024, 4096)
    rows = [count + bench["TEXT"] for count in tokens]
    found = bench["fit"](tokens, [2e-3 * n + 1e-6 * n**2 for n in rows])
    assert found["attention takes over"] == pytest.approx(2000)
    assert 1.0 < found["exponent"] < 2.0
    assert bench["fit"](tokens, [1e-9 * n**1.5 for n in rows])["exponent"] == pytest.approx(1.5)


def test_the_table_is_relative_to_the_first_side(bench, results):
    head, _, step, decode = bench["table"](results).splitlines()
    assert head == "|  | fast | stream, s | GFLOP/s, fast |"
    assert step == "| step 512 | 1.50x | 3.00 | 2,000 |"
    assert decode == "| decode 512 | 1.00x | 5.00 | – |"


def test_the_plot_needs_no_peer(bench, results, tmp_path):
    bench["draw"](results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_peers_that_are_not_installed_are_left_out(bench, monkeypatch):
    monkeypatch.setattr(bench["importlib"].util, "find_spec", lambda name: None)
    assert bench["installed"](["diffusers", "plain", "OpenVINO", "fast"]) == ["plain", "fast"]


def test_rows_of_former_runs_stay_where_they_are_of_the_same_machine_and_first_side(bench):
    here = {"processor": "a", "threads": 2, "torch": "2", "depth": 4, "ceilings": {"int8": 1}}
    before = here | {"sides": ["diffusers", "fast"], "work": {"step 512": {}}}
    now = here | {"sides": ["diffusers", "OpenVINO"], "work": {}, "ceilings": {"int8": 2}}
    both = bench["kept"](before, now)
    assert both == before | {"sides": ["diffusers", "fast", "OpenVINO"], "ceilings": {"int8": 2}}
    for other in ({"processor": "b"}, {"depth": 24}, {"sides": ["fast", "diffusers"]}):
        assert bench["kept"](before, now | other) == now | other
    assert bench["kept"]({}, now) == now


@pytest.mark.slow
@pytest.mark.parametrize("work", [["step", {"size": 64}], ["run", {"size": 64, "steps": 2}]])
def test_two_sides_are_timed_in_turns(bench, work):
    row = bench["compare"](["plain", "fast"], work, 1, 2, 1)
    assert row.keys() == {"plain", "fast"}
    for figures in row.values():
        low, high = figures["spread"]
        assert 0 < low <= figures["seconds"] <= high and figures["resident"] > 1e8


@pytest.fixture(scope="module")
def profiling():
    """The functions of `tools/profile_step.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return runpy.run_path(str(TOOLS / "profile_step.py"))


def test_operators_fall_into_kinds_of_work(profiling):
    kinds = {
        "aten::addmm": "linear layers",
        "aten::_int_mm": "linear layers",
        "sd3min::linear": "linear layers",
        "sd3min::attention": "attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "sd3min::quantise": "to and from 8 bits",
        "sd3min::modulate": "all else",
        "aten::native_layer_norm": "all else",
    }
    assert {operator: profiling["group"](operator) for operator in kinds} == kinds
    found = profiling["grouped"](dict.fromkeys(kinds, 2.0))
    assert list(found.values()) == [4.0, 6.0, 2.0, 4.0]


def test_a_profile_sees_what_every_side_does(profiling):
    profiling["recorded"]()
    try:
        found = profiling["measure"](64, 1, 1)
    finally:
        profiling["native"].call = profiling["native"].call.__wrapped__
    assert list(found) == list(profiling["COMPARED"])
    for operators in found.values():
        spent = profiling["grouped"](operators)
        assert spent["linear layers"] > 0 and spent["attention"] > 0 and spent["all else"] > 0
    if library():
        assert profiling["grouped"](found["int8"])["to and from 8 bits"] > 0
    head, _, *rows = profiling["table"]({"sizes": {"64": found}}).splitlines()
    assert head.count("|") == rows[0].count("|") and len(rows) == 4
    assert rows[0].endswith("| 100% |")


@pytest.fixture(scope="module")
def int8():
    """The functions of `tools/int8_errors.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return runpy.run_path(str(TOOLS / "int8_errors.py"))


@pytest.fixture(scope="module")
def int8_found(int8):
    """Errors of a small network: as it is, in eight bits, and with one block spoilt."""
    mmdit, generator = small.mmdit(), torch.manual_seed(0)
    config = mmdit.config
    context = torch.randn(2, 20, config.context_width, generator=generator)
    text = Conditioning(context, torch.randn(2, config.pooled_width, generator=generator))
    latents = {i: torch.randn(2, 16, 8, 12, generator=generator) for i in (0, 2)}
    given = int8["Given"](text, torch.tensor([1.0, 0.7, 0.4]), latents)

    def plain():
        return FastMMDiT.of(mmdit, lambda linear: linear)

    def spoilt():
        network = plain()
        network.blocks[1] = copy.deepcopy(network.blocks[1])
        network.blocks[1].x_block.attn.proj.weight *= 1.5
        return network

    makes = {"same": plain, "int8": lambda: FastMMDiT.of(mmdit, Int8Linear), "spoilt": spoilt}
    return int8["compare"](plain(), makes, given)


def test_a_network_as_it_is_has_no_errors_and_one_of_eight_bits_a_few_percent(int8_found):
    assert int8_found["same"]["velocity"] == 0
    assert not any(int8_found["same"]["block"] + int8_found["same"]["stream"])
    eight = int8_found["int8"]
    assert len(eight["block"]) == len(eight["stream"]) == len(small.mmdit().joint_blocks)
    assert all(0.001 < error < 0.05 for error in [*eight["block"], eight["velocity"]])


def test_what_one_block_does_wrong_is_its_own_error_and_in_all_streams_after_it(int8_found):
    first, second, *rest = int8_found["spoilt"]["block"]
    assert first == 0 and second > 0.01 and not any(rest)
    first, *after = int8_found["spoilt"]["stream"]
    assert first == 0 and all(error > 0.001 for error in after)


def test_errors_have_a_table_and_a_plot(int8, int8_found, tmp_path):
    kinds = {"bfloat16": int8_found["spoilt"], "int8": int8_found["int8"] | {"levels": 0.25}}
    head, _, one, other = int8["table"]({"it": kinds}).splitlines()
    assert head.count("|") == one.count("|") == other.count("|")
    assert one.startswith("| it | bfloat16 | ") and one.endswith(" | – |")
    assert other.startswith("| it | int8 | ") and other.endswith(" | 0.2 |")
    int8["draw"]({"it": kinds}, tmp_path / "int8.png")
    assert (tmp_path / "int8.png").stat().st_size > 10_000


def test_levels_are_those_of_the_pixels(int8):
    one, other = Image.new("RGB", (2, 1)), Image.new("RGB", (2, 1), (3, 0, 0))
    assert int8["levels"]([one, one], [one, other]) == pytest.approx(0.5)


def test_the_ceilings_are_those_of_the_layers_that_are_used(bench):
    """Signed whole numbers take oneDNN's reference where there is no AMX, for minutes."""
    threads = torch.get_num_threads()
    try:
        found = bench["ceilings"](1)
    finally:
        torch.set_num_threads(threads)
    assert found["int8"] > 0.2 * found["bfloat16"] > 0  # the reference reaches a hundredth
