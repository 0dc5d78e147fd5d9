"""Conversion loses nothing: every tensor comes back byte for byte, and diffusers loads the rest."""

import json
import math
import os
import resource
import shutil
import struct
from pathlib import Path

import files
import numpy as np
import oracle
import pytest
import small
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from test_cli import refused

import sd3min
from sd3min import cli, convert, folder, formats, writer
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.parts import DERIVED, PREFIXES
from sd3min.pipeline import Pipeline
from sd3min.writer import Lazy, write_tensors

RECORD = convert.RECORD
CALL = {"prompt": ["a red star on blue", "!"], "seed": 3, "steps": 2, "width": 64, "height": 48}
EIGHT_BIT = torch.float8_e4m3fn


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a file, read without any library."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    described = header.items()
    return {
        name: (t["dtype"], tuple(t["shape"]), data[slice(*t["data_offsets"])])
        for name, t in described
    }


def metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__", {})


def components(place: Path) -> dict[str, dict]:
    """The tensors of each part of a diffusers folder, whatever their files."""
    names = [component.folder for component in folder.COMPONENTS.values()]
    return {
        name: {
            n: t
            for path in sorted((place / name).glob("*.safetensors"))
            for n, t in raw(path).items()
        }
        for name in names
        if (place / name).is_dir()
    }


def round_trip(source: Path, place: Path, **options) -> Path:
    """An official file to a folder and back."""
    convert.convert(source, place / "folder", **options, progress=False)
    return convert.convert(place / "folder", place / "back.safetensors", progress=False)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the small tokenizers."""
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module", params=small.VARIANTS)
def variant(request, here):
    """A small model of each variant, and its official file."""
    pipe = small.pipeline(here, small.VARIANTS[request.param])
    return pipe, small.save_official(pipe, here / f"{request.param}.safetensors")


@pytest.fixture(scope="module")
def bare(here):
    """The tensors of each part of one small model, by their names without a prefix."""
    return small.official_tensors(small.pipeline(here))


@pytest.fixture(scope="module")
def whole(bare, here):
    """A file of all parts."""
    save_file(prefixed(bare), here / "whole.safetensors")
    return here / "whole.safetensors"


def prefixed(bare, *names):
    return {
        PREFIXES[part] + name: tensor
        for part in names or PREFIXES
        for name, tensor in bare[part].items()
    }


def in_type(tensors, dtype):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


# there and back


def test_every_variant_comes_back_as_the_same_file(variant, tmp_path):
    _, source = variant
    assert round_trip(source, tmp_path).read_bytes() == source.read_bytes()


def test_sd3_tiny_comes_back_as_the_same_file(tmp_path):
    source = sd3min.checkpoint.tiny()
    assert round_trip(source, tmp_path).read_bytes() == source.read_bytes()


T5_DUPLICATE = PREFIXES["t5"] + DERIVED["t5"]
T5_SHARED = PREFIXES["t5"] + "shared.weight"
CLIP_L = PREFIXES["clip_l"]


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


def renamed(tensors, old, new):
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


ODD = {
    "mmdit and autoencoder": lambda bare: prefixed(bare, "mmdit", "autoencoder"),
    "no t5": lambda bare: prefixed(bare, "mmdit", "autoencoder", "clip_l", "clip_g"),
    "an mmdit alone": lambda bare: prefixed(bare, "mmdit"),
    "an mmdit without a prefix": lambda bare: bare["mmdit"],
    "an autoencoder without a prefix": lambda bare: bare["autoencoder"],
    "a clip-l without a prefix": lambda bare: bare["clip_l"],
    "a clip-g without a prefix": lambda bare: bare["clip_g"],
    "a t5 without a prefix": lambda bare: bare["t5"],
    "an mmdit without a prefix among others": lambda bare: (
        bare["mmdit"] | prefixed(bare, "autoencoder", "t5")
    ),
    "no duplicate embedding": lambda bare: without(prefixed(bare), T5_DUPLICATE),
    "an embedding by its other name": lambda bare: without(prefixed(bare), T5_SHARED),
    "no positional table": lambda bare: without(prefixed(bare), PREFIXES["mmdit"] + "pos_embed"),
    "a projection of clip-l": lambda bare: (
        prefixed(bare) | {CLIP_L + DERIVED["clip_l"]: torch.randn(64, 64)}
    ),
    "known extras": lambda bare: (
        prefixed(bare)
        | {
            "logit_scale": torch.tensor(4.6),
            CLIP_L + "logit_scale": torch.tensor(4.6),
            CLIP_L + "text_model.embeddings.position_ids": torch.arange(16)[None],
            PREFIXES["t5"] + "spiece_model": torch.arange(7, dtype=torch.uint8),
        }
    ),
    "float16": lambda bare: in_type(prefixed(bare), torch.float16),
    "float64": lambda bare: in_type(prefixed(bare), torch.float64),
    "t5 in 8 bits": lambda bare: (
        in_type(prefixed(bare), torch.float16) | in_type(prefixed(bare, "t5"), EIGHT_BIT)
    ),
    "all in 8 bits": lambda bare: in_type(prefixed(bare), EIGHT_BIT),
    "many types": lambda bare: {
        name: tensor.to([EIGHT_BIT, torch.float16, torch.float32, torch.bfloat16][i % 4])
        for i, (name, tensor) in enumerate(prefixed(bare).items())
    },
}


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_of_file_comes_back_byte_for_byte(kind, bare, here, tmp_path):
    tensors, said = ODD[kind](bare), {"title": "a “kind” of file", "more": "1"}
    source = tmp_path / "source.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, source, said)
    back = round_trip(source, tmp_path, tokenizers=here)
    assert raw(back) == raw(source)
    assert metadata(back) == said


def test_values_that_are_not_numbers_come_back(bare, here, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 256, (tensor.numel() * 2,), dtype=torch.uint8, generator=generator)
        .view(torch.float16)
        .reshape(tensor.shape)
        for name, tensor in prefixed(bare).items()
    }
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    assert raw(round_trip(source, tmp_path, tokenizers=here)) == raw(source)


@pytest.fixture(scope="module")
def saved(variant, here, tmp_path_factory):
    """A folder that diffusers wrote, sharded."""
    place = tmp_path_factory.mktemp("saved") / "saved"
    oracle.pipeline(variant[0]).save_pretrained(place, max_shard_size="2MB")
    return place


def test_a_folder_of_diffusers_comes_back_byte_for_byte(saved, tmp_path):
    official = convert.convert(saved, tmp_path / "official.safetensors", progress=False)
    options = {"tokenizers": saved, "progress": False}
    convert.convert(official, tmp_path / "back", **options)
    assert (saved / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    assert components(tmp_path / "back") == components(saved)


def test_a_folder_of_diffusers_gives_the_official_file(variant, saved, tmp_path):
    official = convert.convert(saved, tmp_path / "official.safetensors", progress=False)
    expected = raw(variant[1])
    del expected[T5_DUPLICATE]  # which transformers does not save
    assert raw(official) == expected


def test_the_variant_in_float16_is_read(bare, here, tmp_path):
    pipe = small.pipeline(here)
    theirs = oracle.pipeline(pipe).to(torch.float16)
    theirs.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="2MB")
    assert list((tmp_path / "saved").glob("*/*index.fp16.json"))
    official = convert.convert(tmp_path / "saved", tmp_path / "out.safetensors", progress=False)
    expected = in_type(without(prefixed(bare), T5_DUPLICATE), torch.float16)
    save_file(expected, tmp_path / "expected.safetensors")
    assert raw(official) == raw(tmp_path / "expected.safetensors")


def test_a_converted_folder_can_be_sharded_anew(variant, tmp_path):
    _, source = variant
    convert.convert(source, tmp_path / "one", progress=False)
    convert.convert(tmp_path / "one", tmp_path / "many", shard_size=1_000_000, progress=False)
    assert components(tmp_path / "many") == components(tmp_path / "one")
    back = convert.convert(tmp_path / "many", tmp_path / "back.safetensors", progress=False)
    assert back.read_bytes() == source.read_bytes()


def test_separate_files_become_one(variant, bare, here, tmp_path):
    pipe, _ = variant
    main = small.save_official(pipe, tmp_path / "main.safetensors", ("mmdit", "autoencoder"))
    for part in ("clip_l", "clip_g", "t5"):
        save_file(bare[part], tmp_path / f"{part}.safetensors")
    encoders = [tmp_path / f"{part}.safetensors" for part in ("clip_l", "clip_g", "t5")]
    options = {"text_encoders": encoders, "progress": False}
    whole = convert.convert(main, tmp_path / "whole.safetensors", **options)
    assert raw(whole) == raw(small.save_official(pipe, tmp_path / "expected.safetensors"))
    assert metadata(whole) == metadata(main)
    convert.convert(main, tmp_path / "folder", tokenizers=here, **options)
    back = convert.convert(tmp_path / "folder", tmp_path / "back.safetensors", progress=False)
    assert raw(back) == raw(whole)
    assert metadata(back) == metadata(main)


def test_a_folder_whose_parts_were_changed_gets_the_usual_names(bare, here, tmp_path):
    source = tmp_path / "source.safetensors"
    save_file(bare["mmdit"] | prefixed(bare, "autoencoder", "t5"), source)
    convert.convert(source, tmp_path / "folder", tokenizers=here, progress=False)
    shutil.rmtree(tmp_path / "folder/text_encoder_3")
    back = convert.convert(tmp_path / "folder", tmp_path / "back.safetensors", progress=False)
    save_file(prefixed(bare, "mmdit", "autoencoder"), tmp_path / "expected.safetensors")
    assert raw(back) == raw(tmp_path / "expected.safetensors")


def test_a_part_that_was_added_to_a_folder_is_not_forgotten(bare, here, tmp_path):
    for part in ("mmdit", "clip_l"):
        save_file(prefixed(bare, part), tmp_path / f"{part}.safetensors")
        convert.convert(
            tmp_path / f"{part}.safetensors", tmp_path / part, tokenizers=here, progress=False
        )
    (tmp_path / "clip_l/text_encoder").rename(tmp_path / "mmdit/text_encoder")
    back = convert.convert(tmp_path / "mmdit", tmp_path / "back.safetensors", progress=False)
    save_file(prefixed(bare, "mmdit", "clip_l"), tmp_path / "expected.safetensors")
    assert raw(back) == raw(tmp_path / "expected.safetensors")


# scaled fp8


@pytest.fixture(scope="module", params=["", "scale_input"])
def scaled(request, bare, here):
    """A file with scaled fp8 in three parts, the others in float16, and what the values are."""
    tensors, values = {}, {}
    for i, (name, tensor) in enumerate(prefixed(bare).items()):
        weights = name.endswith((".qkv.weight", ".wo.weight", "token_embedding.weight"))
        tensors[name] = tensor.half()
        values[name] = tensor.half().float()
        if weights and not name.startswith(PREFIXES["clip_g"]):
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(EIGHT_BIT)
            values[name] = tensors[name].float() * scale
            stem = name.removesuffix("weight")
            tensors[stem + "scale_weight"] = scale.reshape([1] * (i % 2))
            tensors |= {stem + request.param: torch.ones(())} if request.param else {}
    place = here / "scaled.safetensors"
    save_file(tensors | {"scaled_fp8": torch.zeros(2, dtype=EIGHT_BIT)}, place, {"title": "mine"})
    return place, values


PROJECTION = DERIVED["clip_l"]
WRITTEN = "^scaled fp8 of MMDiT, CLIP-L, T5 is multiplied and written in float32, four times"


def assert_loads_as(place, source):
    """Every part has the very same values in every type to work in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in PREFIXES:
            there, here = (Checkpoint.open(path).parts[name] for path in (place, source))
            loaded, expected = (
                {own: part.tensor(own, dtype, torch.device("cpu")) for own in part.tensors}
                for part in (there, here)
            )
            if name == "clip_l":
                loaded.pop(PROJECTION, None)  # a folder's, the identity
            torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_scaled_fp8_becomes_the_float32_that_it_stands_for(scaled, here, tmp_path):
    source, values = scaled
    with pytest.warns(UserWarning, match=WRITTEN):
        convert.convert(source, tmp_path / "folder", tokenizers=here, progress=False)
    theirs = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "folder", torch_dtype=torch.float32
    )
    state = formats.to_diffusers(
        {
            n.removeprefix(PREFIXES["mmdit"]): tensor
            for n, tensor in values.items()
            if n.startswith(PREFIXES["mmdit"])
        },
        small.VARIANTS["SD3-medium"],
    )
    torch.testing.assert_close(theirs.transformer.state_dict(), state, rtol=0, atol=0)
    for part, module in (("clip_l", theirs.text_encoder), ("t5", theirs.text_encoder_3)):
        loaded = module.state_dict()
        start = PREFIXES[part]
        expected = {n.removeprefix(start): t for n, t in values.items() if n.startswith(start)}
        torch.testing.assert_close({n: loaded[n] for n in expected}, expected, rtol=0, atol=0)
    assert_loads_as(tmp_path / "folder", source)


def test_scaled_fp8_is_scaled_no_second_time(scaled, here, tmp_path):
    source, _ = scaled
    with pytest.warns(UserWarning, match=WRITTEN):
        convert.convert(source, tmp_path / "file.safetensors", progress=False)
    with pytest.warns(UserWarning, match=WRITTEN):
        back = round_trip(source, tmp_path, tokenizers=here)
    for path in (tmp_path / "file.safetensors", back):
        assert_loads_as(path, source)
        assert not [name for name in raw(path) if "scale" in name]
        assert metadata(path) == {"title": "mine"}
    kept = {n: t for n, t in raw(source).items() if t[0] == "F16"}
    assert len(kept) > 100 and {n: raw(back)[n] for n in kept} == kept


# what diffusers makes of it


@pytest.fixture(scope="module")
def converted(variant, tmp_path_factory):
    """A small model, and the folder and the file that were made of it and of that."""
    pipe, source = variant
    place = tmp_path_factory.mktemp("converted")
    round_trip(source, place, shard_size=2_000_000)
    return pipe, place


def in_float64(pipe: Pipeline) -> Pipeline:
    parts = (pipe.mmdit, pipe.autoencoder, pipe.text_encoders)
    return Pipeline(*(part.double() for part in parts), pipe.defaults)


def their_pictures(theirs: StableDiffusion3Pipeline, t5_length: int) -> np.ndarray:
    """diffusers' pictures of the same call, of our noise, rounded to float32 after every step."""
    generators = [torch.Generator().manual_seed(CALL["seed"] + i) for i in range(2)]
    noise = [torch.randn(1, 16, 6, 8, generator=generator) for generator in generators]

    def rounded(_pipe, _index, _t, tensors):
        return {"latents": tensors["latents"].float().double()}

    theirs.set_progress_bar_config(disable=True)
    result = theirs(
        CALL["prompt"],
        negative_prompt=["", ""],
        width=CALL["width"],
        height=CALL["height"],
        num_inference_steps=CALL["steps"],
        guidance_scale=4.0,
        max_sequence_length=t5_length,
        latents=torch.cat(noise).double(),
        callback_on_step_end=rounded,
    )
    return np.stack([np.asarray(image) for image in result.images])


def from_folder(place: Path) -> StableDiffusion3Pipeline:
    theirs = StableDiffusion3Pipeline.from_pretrained(place, torch_dtype=torch.float64)
    theirs.transformer = oracle.with_exact_norms(theirs.transformer)
    return theirs


def test_diffusers_loads_the_folder_and_makes_the_same_pictures(converted):
    pipe, place = converted
    theirs = their_pictures(from_folder(place / "folder"), pipe.defaults.t5_length)
    ours = in_float64(pipe)(**CALL, guidance_scale=4.0, progress=False)
    assert theirs.std() > 10, "a flat picture proves nothing"
    assert np.array_equal(np.stack([np.asarray(image) for image in ours]), theirs)


def test_sd3_tiny_makes_the_same_pictures_in_diffusers(tmp_path):
    convert.convert(sd3min.checkpoint.tiny(), tmp_path / "folder", progress=False)
    ours = in_float64(sd3min.load())
    theirs = their_pictures(from_folder(tmp_path / "folder"), ours.defaults.t5_length)
    pictures = ours(**CALL, guidance_scale=4.0, progress=False)
    assert np.array_equal(np.stack([np.asarray(image) for image in pictures]), theirs)


def test_the_folder_loads_here_as_the_file_does(converted):
    pipe, place = converted
    opened = Checkpoint.open(place / "folder")
    assert opened.defaults == pipe.defaults
    for name, expected in small.official_tensors(pipe).items():
        loaded = opened.load(name, torch.float64, torch.device("cpu")).state_dict()
        wanted = {n: tensor.double() for n, tensor in expected.items()}
        torch.testing.assert_close({n: loaded[n] for n in wanted}, wanted, rtol=0, atol=0)


def test_configs_are_those_that_diffusers_itself_would_write(converted):
    pipe, place = converted
    theirs, loaded = oracle.pipeline(pipe), from_folder(place / "folder")
    for name in ("transformer", "vae", "scheduler"):
        own = "sample_size"  # of the default picture
        given, expected = (
            {k: v for k, v in getattr(p, name).config.items() if k[0] != "_" and k != own}
            for p in (loaded, theirs)
        )
        assert json.loads(json.dumps(given)) == json.loads(json.dumps(expected))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        configs = [getattr(p, name).config.to_dict() for p in (theirs, loaded)]
        unlike = {k for k in configs[0] if configs[0][k] != configs[1].get(k)}
        assert unlike <= {"_name_or_path", "architectures", "dtype"}
    assert loaded.transformer.config.sample_size == pipe.defaults.width // 8
    assert loaded.default_sample_size == pipe.defaults.width // 8


def test_the_default_size_and_shift_are_the_official_ones(bare, here, tmp_path):
    save_file(prefixed(bare), tmp_path / "plain.safetensors")
    convert.convert(tmp_path / "plain.safetensors", tmp_path / "folder", None, here, progress=False)
    configs = {
        path.parent.name: json.loads(path.read_text())
        for path in (tmp_path / "folder").glob("*/*config.json")
    }
    assert configs["transformer"]["sample_size"] == 128
    assert configs["vae"]["sample_size"] == 1024
    assert configs["scheduler"]["shift"] == 3.0
    assert configs["vae"]["scaling_factor"] == 1.5305
    assert configs["vae"]["shift_factor"] == 0.0609


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_diffusers_loads_the_official_file_with_a_local_config(converted, dtype):
    pipe, place = converted
    options = {"config": str(place / "folder"), "torch_dtype": dtype}
    path = str(place / "back.safetensors")
    mmdit = pipe.mmdit.to(dtype)
    theirs = SD3Transformer2DModel.from_single_file(path, subfolder="transformer", **options)
    given = [tensor.to(dtype) for tensor in oracle.inputs(mmdit)]
    tolerance = oracle.RUNG_1 if dtype == torch.float64 else 1e-5
    with torch.no_grad():
        difference = oracle.relative(
            mmdit(*given), oracle.velocity(oracle.with_exact_norms(theirs), *given)
        )
    assert difference < tolerance
    vae = AutoencoderKL.from_single_file(path, subfolder="vae", **options)
    own = pipe.autoencoder.to(dtype)
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(1), dtype=dtype)
    with torch.no_grad():
        mean = vae.encode(image).latent_dist.mean
        assert oracle.relative(own.moments(image)[0], mean) < tolerance
        decoded = vae.decode(mean).sample
        latents = (mean - 0.0609) * 1.5305
        assert oracle.relative(own.decode(latents), decoded) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, EIGHT_BIT])
def test_files_of_fewer_bits_have_the_same_values_in_diffusers(dtype, bare, here, tmp_path):
    save_file(in_type(prefixed(bare), dtype), tmp_path / "source.safetensors")
    convert.convert(
        tmp_path / "source.safetensors", tmp_path / "folder", None, here, progress=False
    )
    theirs = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "folder", torch_dtype=torch.float32
    )
    pipe = small.pipeline(here)
    expected = oracle.pipeline(pipe)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        wanted = in_type(in_type(getattr(expected, name).state_dict(), dtype), torch.float32)
        torch.testing.assert_close(getattr(theirs, name).state_dict(), wanted, rtol=0, atol=0)


def test_a_folder_without_t5_loads_in_diffusers(here, tmp_path):
    pipe = small.pipeline(here)
    parts = ("mmdit", "autoencoder", "clip_l", "clip_g")
    source = small.save_official(pipe, tmp_path / "source.safetensors", parts)
    convert.convert(source, tmp_path / "folder", None, here, progress=False)
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}  # which diffusers asks for always
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", **without_t5)
    theirs.set_progress_bar_config(disable=True)
    assert (
        np.asarray(theirs("a cat", num_inference_steps=1, width=32, height=32).images[0]).std() > 1
    )
    assert theirs.text_encoder_3 is None and theirs.tokenizer_3 is None


# shards


def test_shards_hold_every_tensor_once_and_no_more_than_the_limit(variant, tmp_path):
    _, source = variant
    limit = 300_000
    convert.convert(source, tmp_path / "folder", shard_size=limit, progress=False)
    for component in folder.COMPONENTS.values():
        place = tmp_path / "folder" / component.folder
        shards = sorted(place.glob("*.safetensors"))
        index = json.loads((place / f"{component.stem}.safetensors.index.json").read_text())
        count = len(shards)
        assert count > 1
        names = [f"{component.stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        assert [shard.name for shard in shards] == names
        where = {name: shard.name for shard in shards for name in raw(shard)}
        assert sum(len(raw(shard)) for shard in shards) == len(where)
        assert index["weight_map"] == where
        sizes = [sum(len(data) for *_, data in raw(shard).values()) for shard in shards]
        assert index["metadata"]["total_size"] == sum(sizes)
        assert all(
            size <= limit or len(raw(shard)) == 1 for size, shard in zip(sizes, shards, strict=True)
        )


# the writer


def lazies(tensors):
    names = {dtype: name for name, dtype in writer.TYPES.items()}
    return {
        name: Lazy(list(tensor.shape), names[tensor.dtype], lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


def test_files_of_every_type_are_what_the_library_writes(tmp_path):
    for dtype in writer.TYPES.values():
        tensors = {
            f"{shape}": torch.arange(math.prod(shape)).reshape(shape).to(dtype)
            for shape in ((), (0,), (3,), (2, 5), (2, 0, 3), (1, 2, 3, 4))
        }
        save_file(tensors, tmp_path / "theirs", {"über": 'Äß\n"', "b": ""})
        write_tensors(tmp_path / "ours", lazies(tensors), {"über": 'Äß\n"', "b": ""})
        assert raw(tmp_path / "ours") == raw(tmp_path / "theirs")
        assert metadata(tmp_path / "ours") == metadata(tmp_path / "theirs")


def test_tensors_lie_where_their_type_can_be_read(tmp_path):
    tensors = {"a": torch.ones(3, dtype=EIGHT_BIT), "b": torch.ones(1), "c": torch.ones(1).half()}
    write_tensors(tmp_path / "file", lazies(tensors), {})
    content = (tmp_path / "file").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    for described in json.loads(content[8 : 8 + length]).values():
        assert described["data_offsets"][0] % writer.TYPES[described["dtype"]].itemsize == 0


def test_a_tensor_is_made_only_when_its_turn_comes(tmp_path):
    held = []

    def make(i):
        held.append(i)
        return torch.full((2,), float(i))

    tensors = {f"{i}": Lazy([2], "F32", lambda i=i: make(i)) for i in range(3)}
    seen = []
    write_tensors(tmp_path / "file", tensors, {}, lambda _: seen.append(list(held)))
    assert seen == [[0], [0, 1], [0, 1, 2]]


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path):
    for made in (torch.zeros(3), torch.zeros(2).half(), torch.zeros(1, 2)):
        with pytest.raises(RuntimeError, match=r"x is .* and not as announced"):
            write_tensors(tmp_path / "file", {"x": Lazy([2], "F32", lambda made=made: made)}, {})


# what is refused


def refuses(said, source, target, **options):
    """A call is refused in a sentence, and leaves nothing new."""
    before = set(Path(target).parent.rglob("*"))
    with pytest.raises(Refusal) as caught:
        convert.convert(source, target, progress=False, **options)
    assert said in str(caught.value)
    assert set(Path(target).parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
def test_what_exists_is_not_replaced(name, whole, tmp_path):
    target = tmp_path / name
    target.mkdir()
    refuses(f"{target} exists: remove it first", whole, target)
    target.rmdir()
    target.write_text("mine")
    refuses(f"{target} exists: remove it first", whole, target)
    assert target.read_text() == "mine"
    target.unlink()
    target.symlink_to("nowhere")
    refuses(f"{target} exists: remove it first", whole, target)


@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
def test_a_disk_that_is_too_small_is_seen_beforehand(name, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1_000_000))
    said = "GB and its disk has 0.00 GB left: make room, or pass a place on another disk"
    refuses(said, whole, tmp_path / name)


@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
def test_a_disk_that_fills_up_leaves_nothing(name, whole, tmp_path):
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, kept[1]))  # bytes of a file
    try:
        refuses("cannot be written (File too large): pass another", whole, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(name, error, whole, tmp_path, monkeypatch):
    content = writer.content

    def stop(name, tensor):
        if "mid" in name:
            raise error
        return content(name, tensor)

    monkeypatch.setattr(writer, "content", stop)
    with pytest.raises(error):
        convert.convert(whole, tmp_path / name, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_type_that_cannot_be_written_is_refused(bare, here, tmp_path):
    save_file(prefixed(bare, "t5"), tmp_path / "source.safetensors")
    content = (tmp_path / "source.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    odd = {"dtype": "U16", "shape": [1], "data_offsets": [end, end + 2]}
    header[PREFIXES["t5"] + "spiece_model"] = odd
    files.write_header(tmp_path / "odd.safetensors", json.dumps(header).encode(), end + 2)
    said = "spiece_model in U16, which cannot be converted without loss: pass"
    refuses(said, tmp_path / "odd.safetensors", tmp_path / "out", tokenizers=here)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizers": "models"}, "out.safetensors is a single file, which takes no tokenizers:"),
        ({"shard_size": 1}, "out.safetensors is a single file, which takes no shard_size: leave"),
        ({"tokenizers": "models", "shard_size": 1}, "takes no tokenizers and no shard_size: leave"),
    ],
)
def test_what_only_a_folder_takes_is_refused_for_a_file(options, said, whole, tmp_path):
    refuses(said, whole, tmp_path / "out.safetensors", **options)


def test_a_folder_whose_clip_l_projects_is_refused(bare, here, tmp_path):
    save_file(prefixed(bare, "clip_l"), tmp_path / "clip_l.safetensors")
    convert.convert(tmp_path / "clip_l.safetensors", tmp_path / "in", None, here, progress=False)
    tensors = bare["clip_l"] | {DERIVED["clip_l"]: torch.eye(64).flip(0)}
    save_file(tensors, tmp_path / "in/text_encoder/model.safetensors")
    said = "projects its pooled vector, which no official file can say"
    refuses(said, tmp_path / "in", tmp_path / "out.safetensors")


def test_a_folder_whose_record_is_damaged_is_refused(bare, tmp_path):
    save_file(prefixed(bare, "mmdit"), tmp_path / "mmdit.safetensors")
    convert.convert(tmp_path / "mmdit.safetensors", tmp_path / "in", progress=False)
    names = json.loads(metadata(tmp_path / "in" / RECORD)[convert.NAMES])
    for said in ("[]", "3", "{", json.dumps(names | {"more": ""}), "[" * 100_000):
        write_tensors(tmp_path / "in" / RECORD, {}, {convert.NAMES: said})
        refuses(f"{RECORD} is damaged", tmp_path / "in", tmp_path / "out.safetensors")


# the command


@pytest.fixture
def work(tmp_path, monkeypatch, bare, here):
    """A working folder with a small model, another without tokenizers, and a text file."""
    shutil.copytree(here, tmp_path / "models")
    save_file(prefixed(bare), tmp_path / "models/small.safetensors")
    save_file(prefixed(bare, "mmdit", "autoencoder"), tmp_path / "model.safetensors")
    save_file(bare["clip_l"], tmp_path / "clip_l.safetensors")
    (tmp_path / "text.safetensors").write_text("These are not the weights you are looking for.")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_goes_there_and_back(work, capsys):
    source = "models/small.safetensors"
    assert cli.main(["convert", source, "folder", "--shard-size", "1MB"]) == 0
    assert cli.main(["convert", "folder", "back.safetensors"]) == 0
    assert capsys.readouterr() == ("folder\nback.safetensors\n", "")
    assert len(list(Path("folder/transformer").glob("*.safetensors"))) > 1
    assert Path("back.safetensors").read_bytes() == Path(source).read_bytes()
    modes = [oct(Path(name).stat().st_mode & 0o777) for name in ("folder", "back.safetensors")]
    umask = os.umask(0)
    os.umask(umask)
    assert modes == [oct(0o777 & ~umask), oct(0o666 & ~umask)]


def test_the_command_adds_text_encoders(work):
    given = ["--text-encoders", "clip_l.safetensors", "--tokenizers", "models"]
    assert cli.main(["convert", "model.safetensors", "folder", *given]) == 0
    assert sorted(path.name for path in Path("folder").iterdir() if path.is_dir()) == [
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "the following arguments are required: source, target"),
        ("model.safetensors", "the following arguments are required: target"),
        ("nowhere out", "nowhere does not exist"),
        ("text.safetensors out", "text.safetensors is truncated or no safetensors file"),
        ("model.safetensors model.safetensors", "model.safetensors exists: remove it first"),
        ("model.safetensors models", "models exists: remove it first"),
        ("model.safetensors .", ". exists: remove it first"),
        ("model.safetensors no/where", "no/where cannot be written (No such file or directory)"),
        ("model.safetensors clip_l.safetensors/x", "cannot be written (Not a directory)"),
        (f"model.safetensors {'x' * 300}", "cannot be written (File name too long)"),
        ("model.safetensors out.ckpt", "out.ckpt is named like another format"),
        ("clip_l.safetensors out", "tokenizer is not CLIP-L's tokenizer"),
        ("clip_l.safetensors out --tokenizers nowhere", "is not CLIP-L's tokenizer"),
        ("model.safetensors out --shard-size 0GB", "'0GB' is not a length such as 5GB"),
        ("model.safetensors out --shard-size much", "'much' is not a length such as 5GB"),
        ("model.safetensors out --shard-size -5GB", "--shard-size: expected one argument"),
        ("model.safetensors out --text-encoders model.safetensors", "holds no text encoder"),
        ("model.safetensors out --text-encoders nowhere", "nowhere does not exist"),
    ],
)
def test_a_bad_call_of_the_command_is_one_sentence(arguments, said, work, capsys):
    assert said in refused(["convert", *arguments.split()], work, capsys)
