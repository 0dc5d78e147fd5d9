"""Files load strictly and without a copy, and whatever does not fit is refused in one sentence."""

import os
import random
from itertools import combinations
from pathlib import Path

import files
import pytest
import small
import torch
import transformers
from safetensors.torch import load_file, save_file

from sd3min import checkpoint, config, parts
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.mmdit import position_table
from sd3min.parts import DERIVED, PREFIXES, TITLES
from sd3min.sources import open_path

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT = "a red star above a blue circle"
SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"
PUBLISHED = {  # parameters
    config.SD3_MEDIUM: 2_028_328_000,
    config.SD3_5_MEDIUM: 2_243_171_520,
    config.SD3_5_LARGE: 8_056_627_520,
    config.AutoencoderConfig(): 83_819_683,
    config.CLIP_L: 123_060_480,
    config.CLIP_G: 694_659_840,
    config.T5_XXL: 4_762_310_656,
}
HELD = {  # parts in each official file
    "sd3_medium.safetensors": ["mmdit", "autoencoder"],
    "sd3.5_medium.safetensors": ["mmdit", "autoencoder"],
    "sd3.5_large.safetensors": ["mmdit", "autoencoder"],
    "sd3_medium_incl_clips.safetensors": ["mmdit", "autoencoder", "clip_l", "clip_g"],
    "sd3_medium_incl_clips_t5xxlfp8.safetensors": list(TITLES),
    "sd3_medium_incl_clips_t5xxlfp16.safetensors": list(TITLES),
    "text_encoders/clip_l.safetensors": ["clip_l"],
    "text_encoders/clip_g.safetensors": ["clip_g"],
    "text_encoders/t5xxl_fp16.safetensors": ["t5"],
    "text_encoders/t5xxl_fp8_e4m3fn.safetensors": ["t5"],
}
PRESETS = {
    "sd3_medium": config.SD3_MEDIUM,
    "sd3.5_medium": config.SD3_5_MEDIUM,
    "sd3.5_large": config.SD3_5_LARGE,
    "clip_l": config.CLIP_L,
    "clip_g": config.CLIP_G,
    "t5": config.T5_XXL,
    "autoencoder": config.AutoencoderConfig(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def pipe(folder):
    return small.pipeline(folder)


@pytest.fixture(scope="module")
def bare(pipe):
    """The tensors of each part, by their names without a prefix."""
    return small.official_tensors(pipe)


@pytest.fixture(scope="module")
def whole(pipe, folder):
    """A file of all parts."""
    return small.save_official(pipe, folder / "whole.safetensors")


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def prefix(part, named):
    """Names of a part as a file of several parts has them."""
    return {PREFIXES[part] + name: value for name, value in named.items()}


def prefixed(bare, names):
    return {name: t for part in names for name, t in prefix(part, bare[part]).items()}


# which parts a file holds


def test_every_subset_of_parts_is_recognised(bare, tmp_path):
    for count in range(1, 6):
        for names in combinations(PREFIXES, count):
            path = files.sparse(tmp_path / "file", shapes(prefixed(bare, names)))
            assert tuple(open_path(path).parts) == names


@pytest.mark.parametrize("part", PREFIXES)
def test_a_part_without_its_prefix_is_recognised(part, bare, tmp_path):
    found, _ = open_path(files.sparse(tmp_path / "file", shapes(bare[part])))
    assert list(found) == [part]
    found[part].skeleton()


def test_an_mmdit_without_its_prefix_is_recognised_among_other_parts(bare, tmp_path):
    others = prefixed(bare, ["autoencoder", "clip_l", "clip_g", "t5"])
    path = files.sparse(tmp_path / "file", shapes(bare["mmdit"] | others))
    opened = Checkpoint.open(path)
    assert list(opened.parts) == list(PREFIXES)
    opened.require(list(PREFIXES))


def test_a_clip_that_projects_is_clip_l_where_it_is_as_wide_as_clip_l(tmp_path):
    for width, part in ((768, "clip_l"), (1280, "clip_g")):
        names = {"text_model.final_layer_norm.weight": [width], "text_projection.weight": [width]}
        found, _ = open_path(files.sparse(tmp_path / "file", names))
        assert list(found) == [part]


# what is loaded


@pytest.mark.parametrize("part", PREFIXES)
def test_a_loaded_part_has_the_tensors_of_the_file(part, bare, whole):
    module = Checkpoint.open(whole).load(part, torch.float32, CPU)
    loaded = module.state_dict()
    assert loaded.keys() - bare[part].keys() <= {DERIVED.get(part)}
    torch.testing.assert_close({name: loaded[name] for name in bare[part]}, bare[part])
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(child.training for child in module.modules())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_has_the_type_asked_for_but_t5s_wo_in_float16(dtype, bare, whole):
    for part in PREFIXES:
        module = Checkpoint.open(whole).load(part, DTYPES[dtype], CPU)
        for name, tensor in module.state_dict().items():
            kept = dtype == "float16" and name.endswith("DenseReluDense.wo.weight")
            wanted = torch.float32 if kept else DTYPES[dtype]
            assert tensor.dtype == wanted, name
            if name in bare[part]:
                torch.testing.assert_close(tensor, bare[part][name].to(wanted), rtol=0, atol=0)


def test_files_in_every_type_load_to_every_type(bare, tmp_path):
    for stored in (torch.float64, *DTYPES.values(), torch.float8_e4m3fn):
        tensors = {name: tensor.to(stored) for name, tensor in bare["autoencoder"].items()}
        save_file(tensors, tmp_path / "file")
        for dtype in DTYPES:
            module = checkpoint.load_autoencoder(tmp_path / "file", dtype=dtype)
            expected = tensors["decoder.conv_in.weight"].to(DTYPES[dtype])
            torch.testing.assert_close(module.decoder.conv_in.weight.data, expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("part", PREFIXES)
def test_tensors_that_fit_are_mapped_from_the_file_and_not_copied(part, whole):
    module = Checkpoint.open(whole).load(part, torch.float32, CPU)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(whole))]
    spans = [(int(start, 16), int(end, 16)) for start, end in ranges]
    for name, tensor in module.state_dict().items():
        mapped = any(start <= tensor.data_ptr() < end for start, end in spans)
        assert mapped or (part, name) == ("clip_l", DERIVED["clip_l"]), name


def test_separate_files_load_like_one(bare, folder, whole):
    paths = [folder / f"{part}.safetensors" for part in ("clip_l", "clip_g", "t5")]
    for path in paths:
        save_file(bare[path.stem], path)
    together = checkpoint.load_text_encoders(whole)
    for given in (paths, paths[::-1]):
        apart = checkpoint.load_text_encoders(given)
        torch.testing.assert_close(apart.encode([PROMPT], 16), together.encode([PROMPT]))
    save_file(prefixed(bare, ["mmdit", "autoencoder"]), folder / "model.safetensors")
    opened = Checkpoint.open(folder / "model.safetensors", paths)
    opened.require(list(PREFIXES))
    encoders = opened.load_text_encoders(torch.float32, CPU)
    torch.testing.assert_close(encoders.encode([PROMPT], 16), together.encode([PROMPT]))


def test_a_text_encoder_of_its_own_file_comes_before_that_of_the_first_file(bare, folder, whole):
    other = bare["t5"] | {"shared.weight": bare["t5"]["shared.weight"] + 1}
    save_file(other, folder / "other_t5.safetensors")
    opened = Checkpoint.open(whole, folder / "other_t5.safetensors")
    loaded = opened.load("t5", torch.float32, CPU)
    torch.testing.assert_close(loaded.shared.weight.data, other["shared.weight"])


def test_clip_ls_pooled_vector_is_not_projected_whatever_the_file_says(pipe, bare, folder):
    projection = {"text_projection.weight": torch.randn(64, 64)}
    tensors = prefixed(bare | {"clip_l": bare["clip_l"] | projection}, PREFIXES)
    save_file(tensors, folder / "projecting.safetensors")
    loaded = checkpoint.load_text_encoders(folder / "projecting.safetensors")
    expected = pipe.text_encoders.encode([PROMPT])
    torch.testing.assert_close(loaded.encode([PROMPT], 16), expected)


def test_tensors_that_no_module_needs_are_passed_over(bare, folder, whole):
    unused = {
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.zeros(1, 16),
        "text_encoders.clip_l.logit_scale": torch.zeros(1),
        "text_encoders.t5xxl.transformer.spiece_model": torch.zeros(9, dtype=torch.uint8),
    }
    save_file(load_file(whole) | unused, folder / "unused.safetensors")
    Checkpoint.open(folder / "unused.safetensors").require(list(PREFIXES))
    names = ("clip_l", "clip_g", "t5")
    loaded = checkpoint.load_text_encoders(folder / "unused.safetensors")
    expected = checkpoint.load_text_encoders(whole)
    assert all(
        torch.equal(a, b)
        for name in names
        for a, b in zip(
            getattr(loaded, name).parameters(), getattr(expected, name).parameters(), strict=True
        )
    )


@pytest.mark.parametrize("names", [(SHARED,), (EMBED,), (SHARED, EMBED)])
def test_t5s_embedding_loads_from_either_name_or_both_to_one_tensor(names, pipe, bare, tmp_path):
    embedding = bare["t5"][SHARED]
    rest = {name: t for name, t in bare["t5"].items() if name not in (SHARED, EMBED)}
    save_file(rest | {name: embedding.clone() for name in names}, tmp_path / "t5")
    model = Checkpoint.open(tmp_path / "t5").load("t5", torch.bfloat16, CPU)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in pipe.text_encoders.t5.parameters())
    torch.testing.assert_close(model.shared.weight.data, embedding.bfloat16())


def test_t5_in_float16_runs_and_answers_in_float16(whole):
    model = Checkpoint.open(whole).load("t5", torch.float16, CPU)
    rows = model(torch.tensor([[3, 6, 17, 1]])).last_hidden_state
    assert rows.dtype == torch.float16 and rows.isfinite().all()


def test_the_positional_table_is_the_files_own_where_it_holds_one(bare, whole):
    loaded = checkpoint.load_mmdit(whole)
    torch.testing.assert_close(loaded.pos_embed, bare["mmdit"]["pos_embed"])
    other = dict(bare["mmdit"], pos_embed=torch.full_like(bare["mmdit"]["pos_embed"], 7))
    save_file(other, whole.with_name("sevens.safetensors"))
    assert checkpoint.load_mmdit(whole.with_name("sevens.safetensors")).pos_embed.unique() == 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_positional_table_is_the_papers_where_the_file_holds_none(dtype, bare, tmp_path):
    save_file({n: t for n, t in bare["mmdit"].items() if n != "pos_embed"}, tmp_path / "file")
    loaded = checkpoint.load_mmdit(tmp_path / "file", dtype=dtype)
    expected = position_table(loaded.config.width, 192).to(DTYPES[dtype])
    torch.testing.assert_close(loaded.pos_embed, expected, rtol=0, atol=0)


def test_the_public_loaders_load_their_part(whole):
    assert checkpoint.load_mmdit(whole).config == small.VARIANTS["SD3-medium"]
    assert checkpoint.load_autoencoder(whole).config == small.AUTOENCODER
    encoders = checkpoint.load_text_encoders(str(whole), t5=False)
    context, pooled = encoders.encode([PROMPT])
    assert context.shape == (1, 32, 320) and pooled.shape == (1, 192)
    assert context[:, 16:].count_nonzero() == 0


def test_defaults_come_from_the_metadata(whole, bare, tmp_path):
    assert Checkpoint.open(whole).defaults == small.DEFAULTS
    save_file(bare["t5"], tmp_path / "file")
    assert Checkpoint.open(tmp_path / "file").defaults == config.Defaults()


def test_small_models_load_in_float32_and_others_in_bfloat16_or_as_stored(
    whole, tmp_path, monkeypatch
):
    assert Checkpoint.open(whole).placement("cpu", None) == (torch.float32, CPU)
    assert Checkpoint.open(whole).placement("cpu", "float16") == (torch.float16, CPU)
    large = {"joint_blocks.0.x_block.attn.qkv.weight": [20_000, 20_000]}
    cuda = torch.device("cuda")
    kept = {"F32": torch.float32, "F16": torch.float16, "F8_E4M3": torch.bfloat16}
    for stored, dtype in kept.items():
        opened = Checkpoint.open(files.sparse(tmp_path / "file", large, stored))
        assert opened.placement("cpu", None) == (torch.bfloat16, CPU)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "usable_device", lambda device: cuda)
            assert opened.placement(None, None) == (dtype, cuda)


def test_the_fingerprint_tells_files_apart(tmp_path):
    path = tmp_path / "file"
    seen = set()
    for content in (b"a", b"b", b"ab", bytes(3 << 20), bytes(2 << 20) + b"x" + bytes(1 << 20)):
        path.write_bytes(content)
        assert checkpoint.fingerprint(path) == checkpoint.fingerprint(path)
        seen.add(checkpoint.fingerprint(path))
    assert len(seen) == 5


# silent traps: nothing raises an error where one of these is forgotten


def test_tokenizers_split_a_prompt_into_its_words(whole):
    words = PROMPT.split()
    *clips, t5 = checkpoint.load_text_encoders(whole).tokenizers
    for clip in clips:
        expected = ["<|startoftext|>", *(f"{word}</w>" for word in words), "<|endoftext|>"]
        assert clip.convert_ids_to_tokens(clip(PROMPT).input_ids) == expected
    expected = [*(f"▁{word}" for word in words), "</s>"]
    assert t5.convert_ids_to_tokens(t5(PROMPT).input_ids) == expected


@pytest.mark.skipif(not files.TOKENIZERS.is_dir(), reason="the official tokenizers are not here")
def test_official_tokenizers_give_the_official_ids(bare, tmp_path):
    rows = {"clip_l": 49408, "clip_g": 49408, "t5": 32128}
    tokens = {"clip_l": "text_model.embeddings.token_embedding.weight", "t5": "shared.weight"}
    tokens["clip_g"] = tokens["clip_l"]
    paths = []
    for part, count in rows.items():
        width = bare[part][tokens[part]].shape[1]
        given = shapes(bare[part]) | {tokens[part]: [count, width]}
        if part == "t5":
            given |= {"encoder.embed_tokens.weight": [count, width]}
        paths.append(files.sparse(tmp_path / part, given))
    opened = Checkpoint.open(paths[0], paths[1:], files.TOKENIZERS)
    ids = [opened.load_tokenizer(part)("a photo of a cat").input_ids for part in rows]
    assert ids[0] == ids[1] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[2] == [3, 9, 1202, 13, 3, 9, 1712, 1]


def test_clips_row_numbers_are_real_and_in_order(pipe, whole):
    loaded = checkpoint.load_text_encoders(whole)
    for model in (loaded.clip_l, loaded.clip_g):
        places = model.text_model.embeddings.position_ids
        assert not places.is_meta and torch.equal(places, torch.arange(16)[None])
    expected = pipe.text_encoders.encode([PROMPT])
    torch.testing.assert_close(loaded.encode([PROMPT]), expected)


def test_fill_leaves_nothing_on_the_meta_device(bare):
    with torch.device("meta"):
        module = parts.MODULES["clip_g"](config.CLIPConfig.from_shapes(shapes(bare["clip_g"])))
    module.text_model.register_buffer("forgotten", torch.empty(1, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="forgotten"):
        parts.fill(module, bare["clip_g"])


def test_two_passes_of_every_text_encoder_agree_as_nothing_is_dropped(whole):
    loaded = checkpoint.load_text_encoders(whole)
    assert not any(module.training for module in (loaded.clip_l, loaded.clip_g, loaded.t5))
    torch.testing.assert_close(loaded.encode([PROMPT]), loaded.encode([PROMPT]), rtol=0, atol=0)


# what is refused


def refused(action, *words):
    """The sentence that a call is refused with, which is one line and has the words."""
    with pytest.raises(Refusal) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    return sentence


def no_file(path):
    pass


def a_folder(path):
    path.mkdir()


def an_empty_file(path):
    path.touch()


def a_text(path):
    path.write_text("These are not the weights that you are looking for. " * 9)


def a_pickle(path):
    torch.save({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(3)}, path)


def no_tensors(path):
    files.write_header(path, b"{}")


def a_unet(path):
    files.sparse(path, {"model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3]})


def flux(path):
    files.sparse(path, {"double_blocks.0.img_attn.qkv.weight": [96, 32]})


def flux_under_a_prefix(path):
    files.sparse(path, {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": [96, 32]})


def a_lora(path):
    files.sparse(path, {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": [4, 64]})


@pytest.mark.parametrize(
    ("write", "fault", "mend"),
    [
        (no_file, "does not exist", "pass the path"),
        (a_folder, "holds no .safetensors files", "pass an official file"),
        (an_empty_file, "is empty", "download it again"),
        (a_text, "no safetensors file", "download it again"),
        (a_pickle, "no safetensors file", "download it again"),
        (no_tensors, "holds no tensors", "pass an official"),
        (a_unet, "input_blocks.0.0.weight", "no official Stable Diffusion 3 file: pass one"),
        (flux, "double_blocks.0", "no official Stable Diffusion 3 file: pass one"),
        (flux_under_a_prefix, "double_blocks.0", "no official Stable Diffusion 3 file: pass one"),
        (a_lora, "lora_A", "no official Stable Diffusion 3 file: pass one"),
    ],
)
def test_a_file_of_something_else_is_refused(write, fault, mend, tmp_path):
    path = tmp_path / "file.safetensors"
    write(path)
    refused(lambda: Checkpoint.open(path), str(path), fault, mend)


def test_a_truncated_file_is_refused(whole, tmp_path):
    content = whole.read_bytes()
    for length in (4, 100, 50_000, len(content) // 2, len(content) - 1):
        (tmp_path / "file").write_bytes(content[:length])
        refused(lambda: Checkpoint.open(tmp_path / "file"), "is truncated", "download it again")


def test_a_name_too_long_for_any_file_is_refused():
    refused(lambda: Checkpoint.open("x" * 5000), "cannot be read")


@pytest.mark.parametrize("part", PREFIXES)
def test_a_missing_or_misshapen_tensor_is_refused_by_its_name(part, bare, tmp_path):
    path = tmp_path / "file"
    own = shapes(bare[part])
    names = sorted(own.keys() - {SHARED, EMBED})
    for name in names[:: len(names) // 12]:
        without = {other: shape for other, shape in own.items() if other != name}
        files.sparse(path, prefix(part, own | {name: [*own[name], 2]}))
        refused(lambda: Checkpoint.open(path).require([part]), str(path), TITLES[part])
        files.sparse(path, prefix(part, without))
        if name != "pos_embed":
            refused(lambda: Checkpoint.open(path).require([part]), str(path), f"lacks {name}")


def test_a_t5_without_an_embedding_is_refused(bare, tmp_path):
    own = shapes({n: t for n, t in bare["t5"].items() if n not in (SHARED, EMBED)})
    refused(lambda: Checkpoint.open(files.sparse(tmp_path / "t5", own)).require(["t5"]), "lacks")


@pytest.mark.parametrize("part", PREFIXES)
def test_a_tensor_that_does_not_belong_is_refused_by_its_name(part, bare, tmp_path):
    path = files.sparse(tmp_path / "file", prefix(part, shapes(bare[part]) | {"odd.bias": [1]}))
    refused(lambda: Checkpoint.open(path).require([part]), "odd.bias, which does not belong")


def test_a_shape_is_told_beside_the_right_one(bare, tmp_path):
    own = shapes(bare["mmdit"]) | {"t_embedder.mlp.0.bias": [3]}
    path = files.sparse(tmp_path / "file", own)
    refused(lambda: checkpoint.load_mmdit(path), "t_embedder.mlp.0.bias of shape [3] and not [128]")


def test_many_faults_make_one_short_sentence(bare, tmp_path):
    own = {name: [*shape, 2] for name, shape in shapes(bare["mmdit"]).items() if "fc" in name}
    path = files.sparse(tmp_path / "file", shapes(bare["mmdit"]) | own)
    sentence = refused(lambda: checkpoint.load_mmdit(path), " and 9 more:")
    assert len(sentence) < 600


def test_an_mmdit_whose_width_is_not_64_times_its_depth_is_refused(bare, tmp_path):
    own = shapes(bare["mmdit"])
    shallow = {n: shape for n, shape in own.items() if not n.startswith("joint_blocks.1.")}
    path = files.sparse(tmp_path / "file", shallow)
    refused(lambda: checkpoint.load_mmdit(path), "128 wide", "64 x its depth of 1")


def test_whole_numbers_are_refused_as_weights(bare, tmp_path):
    path = files.sparse(tmp_path / "file", shapes(bare["autoencoder"]), "I8")
    refused(lambda: checkpoint.load_autoencoder(path), " as I8, ", ", no plain floating-point type")


def test_a_part_that_is_there_twice_is_refused(bare, tmp_path):
    own = shapes(bare["mmdit"])
    path = files.sparse(tmp_path / "file", own | prefix("mmdit", own))
    refused(lambda: Checkpoint.open(path), "no official Stable Diffusion 3 file")


def test_a_file_that_lacks_a_part_is_refused(whole, bare, tmp_path):
    path = files.sparse(tmp_path / "file", shapes(bare["mmdit"]))
    refused(lambda: Checkpoint.open(path).require(["autoencoder"]), "lacks autoencoder: pass")
    refused(lambda: Checkpoint.open(path).require(["t5"]), "lacks T5: name", "go without T5")
    encoders = ["clip_l", "clip_g"]
    refused(
        lambda: Checkpoint.open(path).require(encoders),
        "without text encoders: name the files of CLIP-L",
    )
    refused(lambda: Checkpoint.open(whole, path), "holds no text encoder: leave it out")


def test_text_encoders_of_another_model_are_refused(bare, whole, tmp_path):
    wider = {name: [2 * n for n in shape] for name, shape in shapes(bare["clip_g"]).items()}
    longer = shapes(bare["clip_g"]) | {"text_model.embeddings.position_embedding.weight": [77, 128]}
    other_t5 = shapes(bare["t5"])
    narrow = {n: [64 if side == 320 else side for side in shape] for n, shape in other_t5.items()}
    for given in (wider, longer, narrow):
        opened = Checkpoint.open(whole, files.sparse(tmp_path / "file", given))
        refused(lambda opened=opened: opened.load_text_encoders(torch.float32, CPU), "do not fit")


@pytest.mark.parametrize("fill_folder", ["missing", "empty", "garbage", "another's"])
@pytest.mark.parametrize("part", ["clip_l", "clip_g", "t5"])
def test_tokenizers_that_are_not_the_encoders_own_are_refused(fill_folder, part, whole, tmp_path):
    place, kind = checkpoint.TOKENIZERS[part]
    folder = tmp_path / place
    if fill_folder != "missing":
        folder.mkdir()
    if fill_folder == "garbage":
        (folder / "tokenizer.json").write_text("{")
    if fill_folder == "another's":
        getattr(transformers, kind)().save_pretrained(folder)
    opened = Checkpoint.open(whole, tokenizers=tmp_path)
    refused(lambda: opened.load_tokenizer(part), str(folder), f"not {TITLES[part]}'s tokenizer")


@pytest.mark.parametrize(
    "defaults", ["{", "[1]", "7", '{"steps": "4"}', '{"stride": 4}', "[" * 100_000]
)
def test_metadata_that_cannot_be_read_is_refused(defaults, bare, tmp_path):
    save_file({"joint_blocks.0": torch.zeros(1)}, tmp_path / "f", {"sd3min.defaults": defaults})
    refused(lambda: Checkpoint.open(tmp_path / "f"), "sd3min.defaults", str(tmp_path / "f"))


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", "hpu", "mkldnn", "cuda:-1"])
def test_a_device_that_is_not_here_is_refused(device, whole):
    refused(lambda: checkpoint.load_mmdit(whole, device=device), f"device {device} cannot be used")


@pytest.mark.parametrize("dtype", ["int8", "foo", "nn", "", torch.int8, torch.float64])
def test_a_type_other_than_the_three_is_refused(dtype, whole):
    refused(lambda: checkpoint.load_mmdit(whole, dtype=dtype), "is not one of float32, bfloat16")


def test_a_damaged_header_is_refused_and_never_an_error(bare, tmp_path):
    rng = random.Random(0)
    path = files.sparse(tmp_path / "file", shapes(bare["t5"]))
    size, content = path.stat().st_size, path.read_bytes()[:4096]
    outcomes = set()
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(rng.choice([8, 4096]))] = rng.choice([0, 34, 57, 123, 255])
        path.write_bytes(changed)
        os.truncate(path, size)
        try:
            Checkpoint.open(path).require(["t5"])
            outcomes.add("opened")
        except Refusal as refusal:
            outcomes.add("refused")
            assert str(path) in str(refusal)
    assert outcomes == {"opened", "refused"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("mmdit", {"joint_blocks.999999999999.x_block.attn.qkv.weight": [1]}),
        ("mmdit", {f"joint_blocks.{'9' * 9999}.x_block.attn.qkv.weight": [1]}),
        ("mmdit", {"context_embedder.weight": []}),
        ("mmdit", {"context_embedder.weight": [2, 0]}),
        ("mmdit", {"pos_embed": []}),
        ("mmdit", {"pos_embed": [1, 145, 128]}),
        ("mmdit", {"x_embedder.proj.weight": [0, 16, 2, 2]}),
        ("autoencoder", {"encoder.down.0.block.0.conv1.weight": [33, 33, 3, 3]}),
        ("autoencoder", {"encoder.down.0.block.0.conv1.weight": []}),
        ("autoencoder", {"encoder.down.999999999.block.0.conv1.weight": [32, 32, 3, 3]}),
        ("clip_l", {"text_model.embeddings.token_embedding.weight": [590]}),
        ("clip_l", {"text_model.embeddings.token_embedding.weight": [590, 0]}),
        ("clip_l", {"text_model.embeddings.token_embedding.weight": [590, 100]}),
        ("clip_g", {"text_model.encoder.layers.999999999.mlp.fc1.weight": [160, 128]}),
        ("t5", {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [32]}),
        ("t5", {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [0, 0]}),
        ("t5", {SHARED: [0, 0], EMBED: [0, 0]}),
    ],
)
def test_impossible_sizes_are_refused_at_once(part, changes, bare, tmp_path):
    path = files.sparse(tmp_path / "file", prefix(part, shapes(bare[part]) | changes))
    refused(lambda: Checkpoint.open(path).require([part]), str(path), TITLES[part])


# the official files, by their names and shapes

official = pytest.mark.skipif(not files.manifests(), reason="the official lists are not here")


@official
def test_every_official_file_is_expected():
    assert files.manifests().keys() == HELD.keys()


@pytest.mark.parametrize("name", HELD)
@official
def test_an_official_file_holds_its_parts_at_their_published_sizes(name, tmp_path):
    listed = files.manifests()[name]
    opened = Checkpoint.open(files.sparse(tmp_path / name, listed))
    assert list(opened.parts) == HELD[name]
    assert opened.defaults == config.Defaults()
    for part in opened.parts.values():
        model = name.split("_incl")[0].removesuffix(".safetensors")
        preset = PRESETS[model if part.name == "mmdit" else part.name]
        assert part.config == preset
        assert part.parameters == PUBLISHED[preset]


@pytest.mark.parametrize("name", HELD)
@official
def test_modules_have_exactly_the_names_and_shapes_of_an_official_file(name, tmp_path):
    listed = files.manifests()[name]
    built = {}
    for part in Checkpoint.open(files.sparse(tmp_path / name, listed)).parts.values():
        prefix = PREFIXES[part.name] if len(HELD[name]) > 1 else ""
        built |= {prefix + n: t for n, t in shapes(part.skeleton().state_dict()).items()}
    extra = built.keys() - listed.keys()
    assert {name.removeprefix(PREFIXES["clip_l"]) for name in extra} <= {DERIVED["clip_l"]}
    assert {name: built.get(name) for name in listed} == listed
