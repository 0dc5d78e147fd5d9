"""`verify` sees what is wrong with a file or with this code, and says where."""

import re
import subprocess
import sys
from pathlib import Path

import files
import pytest
import small
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd3min import cli, mmdit, probes
from sd3min.checkpoint import PREFIXES, Checkpoint
from sd3min.config import Refusal
from sd3min.probes import checks, comparisons, report, table
from sd3min.probes.checks import Check

ALONE = {"sizes", "values", "positions", "pictures"}
COMPARED = {"velocity", "encode", "decode", "rows", "shift 3", "picture"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model in one file, and a file without text encoders."""
    folder = tmp_path_factory.mktemp("models")
    pipe = small.pipeline(folder)
    small.save_official(pipe, folder / "small.safetensors")
    small.save_official(pipe, folder / "bare.safetensors", ("mmdit", "autoencoder"))
    without_t5 = ("mmdit", "autoencoder", "clip_l", "clip_g")
    small.save_official(pipe, folder / "without_t5.safetensors", without_t5)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """All checks of the small model."""
    return list(probes.verify(folder / "small.safetensors"))


def altered(folder, path, part, name, change):
    """A copy of the small model with one tensor changed."""
    tensors = load_file(folder / "small.safetensors")
    with safe_open(folder / "small.safetensors", "pt") as file:
        metadata = file.metadata()
    change(tensors[PREFIXES[part] + name])
    save_file(tensors, path, metadata)
    return path


def alone(path):
    """What is found out without diffusers, by part and check."""
    opened = Checkpoint.open(path)
    found = [check for name in opened.parts for check in checks.alone(opened, name)]
    return {(check.part, check.what): check for check in found}


def compared(path):
    """What is found out with diffusers."""
    with torch.no_grad():
        return list(comparisons.compare(Checkpoint.open(path)))


def failed(found):
    return {(check.part, check.what) for check in found if check.passed is False}


def test_a_sound_model_of_random_weights_fails_at_nothing_but_pictures(whole):
    assert {check.what for check in whole} == ALONE | COMPARED
    assert failed(whole) == {("autoencoder", "pictures")}, "no picture survives random weights"
    assert all(check.passed is not None for check in whole)


def test_each_comparison_has_counts_and_both_errors(whole):
    rows = [check for check in whole if check.what in ("velocity", "encode", "decode", "rows")]
    assert len(rows) == 6
    for check in rows:
        assert check.tensors > 10 and check.parameters > 10_000
        assert 0 <= check.double <= 1e-10 and check.double <= check.single <= 1e-5
    (run,) = (check for check in whole if check.what == "picture")
    assert run.note.startswith("64x48, 4 steps; float32: ")
    assert "float64: 0 of 9,216 values differ" in run.note
    assert [picture.size for picture in run.pictures] == [(64, 48)] * 2


@pytest.mark.parametrize(
    ("part", "title", "name", "number"),
    [
        ("mmdit", "MMDiT", "joint_blocks.1.x_block.mlp.fc1.weight", "nan"),
        ("autoencoder", "autoencoder", "decoder.conv_in.bias", "inf"),
        ("clip_l", "CLIP-L", "text_model.final_layer_norm.weight", "nan"),
        ("clip_g", "CLIP-G", "text_projection.weight", "-inf"),
        ("t5", "T5", "encoder.block.1.layer.1.DenseReluDense.wo.weight", "inf"),
    ],
)
def test_a_value_that_is_no_number_is_found_in_its_tensor(
    folder, tmp_path, part, title, name, number
):
    def change(tensor):
        tensor.view(-1)[3:5] = float(number)

    found = alone(altered(folder, tmp_path / "bad.safetensors", part, name, change))
    wrong = found[title, "values"]
    assert wrong.verdict == f"FAILED: 2 values of {name} are no numbers"
    others = failed(found.values()) - {("autoencoder", "pictures")}
    assert others == {(title, "values")}


def test_positions_of_rows_for_columns_are_found(folder, tmp_path):
    def change(tensor):
        tensor.copy_(tensor.roll(tensor.shape[-1] // 2, -1))

    path = altered(folder, tmp_path / "bad.safetensors", "mmdit", "pos_embed", change)
    found = alone(path)["MMDiT", "positions"]
    assert found.passed is False
    assert re.fullmatch(r"[12]\.\de\+00 from the paper's for .* pixels.*", found.note)
    assert alone(folder / "small.safetensors")["MMDiT", "positions"].passed


def test_positions_are_judged_by_the_precision_that_they_are_stored_in():
    exact = small.mmdit()
    for dtype in (torch.float16, torch.bfloat16):
        assert checks.position_check(exact.to(dtype), small.DEFAULTS).passed
    exact = small.mmdit()
    exact.pos_embed += 1e-4
    assert not checks.position_check(exact, small.DEFAULTS).passed
    assert checks.position_check(exact.half(), small.DEFAULTS).passed


def test_a_released_size_is_recognised_by_its_count(tmp_path):
    names = {
        "sd3_medium": "SD3-medium",
        "sd3.5_medium": "SD3.5-medium",
        "sd3.5_large": "SD3.5-large",
    }
    manifests = files.manifests()
    if not manifests:
        pytest.skip("the official manifests are not here")
    for file, name in names.items():
        path = files.sparse(tmp_path / f"{file}.safetensors", manifests[f"{file}.safetensors"])
        check = checks.size_check(Checkpoint.open(path).parts["mmdit"])
        assert check.verdict == f"passed: {name}, as released"
        assert check.parameters == checks.RELEASED[name]


def test_a_trained_autoencoder_brings_a_picture_back_and_a_deaf_one_does_not():
    opened = Checkpoint.open()
    autoencoder = checks.load(opened, "autoencoder")
    with torch.no_grad():
        assert checks.reconstruction_check(autoencoder).passed
        autoencoder.decoder.conv_in.weight.zero_()
        worse = checks.reconstruction_check(autoencoder)
    assert worse.passed is False
    assert worse.note.endswith("dB, below 20")


def test_a_mistake_in_this_code_is_found_with_its_tensor_and_line(folder, monkeypatch):
    def modulate(tokens, shift, scale):
        return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * scale + shift

    monkeypatch.setattr(mmdit, "modulate", modulate)
    found = list(probes.verify(folder / "bare.safetensors"))
    (wrong,) = (check for check in found if check.what == "velocity")
    assert wrong.passed is False and wrong.double > 1e-3
    assert re.match(
        r"joint_blocks\.0\.context_block\.attn\.qkv\.in differs by \d.* sd3min/mmdit\.py:\d+",
        wrong.note,
    )
    assert failed(found) == {("MMDiT", "velocity"), ("autoencoder", "pictures")}


def test_parts_that_are_missing_are_not_compared(folder):
    found = list(probes.verify(folder / "bare.safetensors"))
    assert found[-1].verdict == "not compared: the files lack CLIP-L, CLIP-G"
    assert "rows" not in {check.what for check in found}


def test_a_file_without_t5_is_compared_without_it(folder):
    found = {
        (check.part, check.what): check for check in compared(folder / "without_t5.safetensors")
    }
    assert {part for part, what in found if what == "rows"} == {"CLIP-L", "CLIP-G"}
    assert ", without T5; float32: " in found["whole run", "picture"].note
    assert all(check.passed for check in found.values())


def test_an_encoder_alone_is_not_compared(folder, tmp_path):
    tensors = load_file(folder / "small.safetensors")
    start = PREFIXES["t5"]
    only = {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
    save_file(only, tmp_path / "t5.safetensors")
    (rows, *_) = compared(tmp_path / "t5.safetensors")
    assert rows.verdict == "not compared: diffusers encodes with both CLIPs"


def test_what_the_memory_does_not_hold_is_said(folder, monkeypatch):
    monkeypatch.setattr(comparisons, "available", lambda: 1e6)
    check = comparisons.mmdit_check(Checkpoint.open(folder / "bare.safetensors"))
    assert check.passed and check.single is not None and check.double is None
    assert re.fullmatch(r"float64 needs 0\.\d GiB of memory and 0\.0 are free", check.note)


def test_the_shipped_model_passes_every_check_and_has_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verify", "--report", "out.html"]) == 0
    output, errors = capsys.readouterr()
    head, *lines, found, name = output.splitlines()
    assert head.split() == list(table.HEAD)
    assert len(lines) == 20 and all("  passed" in line for line in lines), output
    assert (found, name, errors) == ("nothing failed", "out.html", "")
    assert [file.name for file in tmp_path.iterdir()] == ["out.html"]
    page = Path("out.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r"(src|href)=(?!.data:)|url\(", page), "nothing is fetched"
    assert page.count("<h2>") == 3 and page.count("<tr>") == 2 == page.count("<table>")
    assert page.count('<tr class="passed">') == 20 and page.count("<b>passed</b>") == 20
    assert "<h1>Nothing failed</h1><p>sd3-tiny.safetensors</p>" in page and "<header>" in page


def test_a_page_shows_what_failed_and_leaves_out_what_was_not_looked_at():
    notes = {True: "all <fine>", False: "the first tensor & more", None: "no memory"}
    found = [Check("MMDiT", "values", passed, note) for passed, note in notes.items()]
    page = report.page("a: b: 1 of 3 checks failed", "versions", found)
    assert '<header class="failed"><h1>1 of 3 checks failed</h1><p>a: b</p>' in page
    lines = re.findall(r'<tr class="(\w+)">.*?<b>(.*?)</b> <span>(.*?)</span>', page)
    assert lines == [
        ("passed", "passed", "all &lt;fine&gt;"),
        ("FAILED", "FAILED", "the first tensor &amp; more"),
        ("not", "not compared", "no memory"),
    ]
    assert page.count("<h2>") == 1 and "img" not in page.partition("</style>")[2]
    heads = re.findall(r"<th\b[^>]*>(.*?)</th>", page)
    assert heads == ["part", "check", "verdict"]
    compared = Check("T5", "rows", False, "", 3, 1_000, 0.25, 0.0)
    page = report.page("a: b", "", [*found, compared])
    heads = re.findall(r"<th\b[^>]*>(.*?)</th>", page.rpartition("<h2>")[2])
    assert heads == list(table.HEAD)
    assert '<td class="number" data-label="float64">0</td>' in page


def test_the_command_ends_with_1_where_a_check_failed(folder, capsys):
    assert cli.main(["verify", str(folder / "bare.safetensors")]) == 1
    output, errors = capsys.readouterr()
    assert "FAILED: a drawn picture comes back at" in output
    assert output.splitlines()[-1] == "1 of 11 checks failed"
    assert not errors


def test_the_difference_of_two_pictures_is_amplified_and_says_by_how_much(whole):
    ours, theirs = whole[-1].pictures
    changed = ours.copy()
    changed.putpixel((5, 7), tuple(min(255, value + 3) for value in ours.getpixel((5, 7))))
    shown, told = report.difference(ours, ours)
    assert told == "difference: none, all values are equal"
    assert shown.getbbox() is None
    shown, told = report.difference(changed, ours)
    assert re.fullmatch(r"difference, amplified \d+ times: [123] of 9,216 values", told)
    assert shown.getbbox() == (5, 7, 6, 8)
    assert max(shown.getpixel((5, 7))) > 250
    assert theirs.size == ours.size


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["none.safetensors"], "none.safetensors does not exist"),
        (["--report", "none/out.html"], "--report none/out.html cannot be written (No such file"),
        (["--report", "out.txt"], "--report out.txt is not the name of a page"),
        (["--report", "."], "--report . is not the name of a page"),
        (["one", "two"], "one does not exist: pass"),
    ],
)
def test_a_bad_call_is_refused_before_any_work(given, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verify", *given]) == 2
    output, line = capsys.readouterr()
    assert not output and said in line and line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_tokenizers_are_refused_before_any_work(folder, tmp_path):
    with pytest.raises(Refusal, match="tokenizer"):
        next(probes.verify(folder / "small.safetensors", tokenizers=tmp_path))


def test_a_misshapen_part_is_refused(folder, tmp_path):
    tensors = load_file(folder / "bare.safetensors")
    del tensors[PREFIXES["mmdit"] + "joint_blocks.0.x_block.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(Refusal, match=r"lacks joint_blocks\.0\.x_block\.mlp\.fc1\.bias"):
        next(probes.verify(tmp_path / "bad.safetensors"))


def test_without_diffusers_a_file_is_checked_alone():
    program = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from sd3min.cli import main; sys.exit(main(['verify']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not compared: diffusers cannot be imported; install it" in done.stdout
    assert done.stdout.count("passed") == 12
    assert not done.stderr
