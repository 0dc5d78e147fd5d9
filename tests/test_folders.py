"""Folders load like single files: diffusers', in shards and variants too, and official ones."""

import json
import shutil
from dataclasses import replace

import files
import oracle
import pytest
import small
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

import sd3min
from sd3min import checkpoint, cli, config, convert, formats, probes, text_encoders
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.folder import USUAL
from sd3min.parts import DERIVED, PREFIXES, TITLES

CPU = torch.device("cpu")
ONE_ULP = 1.2e-7  # of times near 1 in float32
PROJECTION = DERIVED["clip_l"]
PROMPT = "a red star above a blue circle"
SHARD = "60KB"  # small enough that every part has several
CLASSES = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}
LAYOUTS = {  # what diffusers' save_pretrained is asked for
    "plain": {},
    "sharded": {"max_shard_size": SHARD},
    "fp16": {"variant": "fp16"},
    "fp16 sharded": {"variant": "fp16", "max_shard_size": SHARD},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module", params=["SD3-medium", "SD3.5-medium"])
def pipe(request, folder):
    return small.pipeline(folder / request.param, small.VARIANTS[request.param])


@pytest.fixture(scope="module")
def theirs(pipe):
    return oracle.pipeline(pipe)


@pytest.fixture(scope="module")
def saved(pipe, theirs, tmp_path_factory):
    """What diffusers writes, by layout."""
    places = {layout: tmp_path_factory.mktemp("saved") / layout for layout in LAYOUTS}
    for layout, place in places.items():
        theirs.save_pretrained(place, **LAYOUTS[layout])
    return places


@pytest.fixture(scope="module")
def official(pipe, tmp_path_factory):
    """A folder of official files as sd3-ref expects it, with tokenizers."""
    place = tmp_path_factory.mktemp("models")
    small.save_official(pipe, place / "sd3_medium.safetensors", ("mmdit", "autoencoder"))
    for part, tensors in small.official_tensors(pipe).items():
        if part in ("clip_l", "clip_g", "t5"):
            save_file(tensors, place / f"{part.replace('t5', 't5xxl')}.safetensors")
    small.tokenizers(place)
    return place


def refused(action, *words):
    """The sentence that a call is refused with, which is one line and has the words."""
    with pytest.raises(Refusal) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence
    return sentence


def modules(pipe):
    encoders = pipe.text_encoders
    return {
        "mmdit": pipe.mmdit,
        "autoencoder": pipe.autoencoder,
        "clip_l": encoders.clip_l,
        "clip_g": encoders.clip_g,
        "t5": encoders.t5,
    }


def assert_holds(path, pipe, dtype=torch.float32):
    """Every part at the path has the pipeline's very tensors."""
    opened = Checkpoint.open(path)
    opened.require(list(PREFIXES))
    for part, module in modules(pipe).items():
        loaded = opened.load(part, dtype, CPU).state_dict()
        expected = {
            name: tensor.to(loaded[name].dtype) for name, tensor in module.state_dict().items()
        }
        torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


# a diffusers folder


def test_the_layouts_are_what_their_names_say(saved):
    for layout, place in saved.items():
        names = {path.name for path in place.rglob("*") if path.is_file()}
        assert any("-00002-of-0" in name for name in names) == ("sharded" in layout)
        assert any(".fp16" in name for name in names) == ("fp16" in layout)
    fp16 = {path.name for path in saved["fp16 sharded"].rglob("*.json")}
    assert {"model.safetensors.index.fp16.json"} <= fp16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_diffusers_saves_loads_to_the_same_tensors(layout, saved, pipe):
    assert_holds(saved[layout], pipe)


@pytest.mark.parametrize("layout", ["plain", "sharded"])
def test_what_diffusers_saves_answers_as_diffusers_in_float64(layout, saved, pipe, theirs):
    opened = Checkpoint.open(saved[layout])
    ours = opened.load("mmdit", torch.float64, CPU)
    latents, timesteps, context, pooled = inputs = oracle.inputs(ours)
    expected = oracle.velocity(theirs.transformer.double(), *inputs)
    assert oracle.relative(ours(latents, timesteps, context, pooled), expected) < oracle.RUNG_1

    autoencoder = opened.load("autoencoder", torch.float64, CPU)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    mean, _ = autoencoder.moments(images)
    vae = theirs.vae.double()
    assert oracle.relative(mean, vae.encode(images).latent_dist.mean) < oracle.RUNG_1

    ids = torch.randint(0, 100, (2, 16))
    for part in ("clip_l", "clip_g", "t5"):
        model, number = opened.load(part, torch.float64, CPU), list(PREFIXES).index(part) - 1
        other = (theirs.text_encoder, theirs.text_encoder_2, theirs.text_encoder_3)[number - 1]
        assert oracle.relative(model(ids)[0], other.double()(ids)[0]) < oracle.RUNG_1


def test_a_diffusers_folder_makes_the_pictures_of_the_single_file(saved, official):
    """As sd3min says it, from the folder's own tokenizers."""
    call = {
        "guidance_scale": 4,
        "steps": 2,
        "seed": 3,
        "width": 64,
        "height": 48,
        "t5_length": 16,
        "progress": False,
    }
    one, other = (sd3min.load(place)(PROMPT, **call)[0] for place in (saved["plain"], official))
    assert one.tobytes() == other.tobytes()


def test_the_plain_files_come_before_those_in_float16(saved, pipe, tmp_path):
    shutil.copytree(saved["fp16 sharded"], tmp_path / "both")
    for path in tmp_path.glob("both/*/*.safetensors"):
        tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path)
    shutil.copytree(saved["sharded"], tmp_path / "both", dirs_exist_ok=True)
    assert_holds(tmp_path / "both", pipe)
    for name in ("transformer", "text_encoder_3"):  # the plain index alone, without its shards
        for path in (tmp_path / "both" / name).glob("*.safetensors"):
            if ".fp16" not in path.name:
                path.unlink()
    opened = Checkpoint.open(tmp_path / "both")
    assert all(
        ".fp16" in path.name for name in ("mmdit", "t5") for path in opened.parts[name].paths
    )
    assert not any(".fp16" in path.name for path in opened.parts["clip_g"].paths)


def test_a_folder_with_some_of_the_parts_loads_those(saved, pipe, tmp_path):
    for name, load in (
        ("transformer", checkpoint.load_mmdit),
        ("vae", checkpoint.load_autoencoder),
    ):
        place = tmp_path / name
        shutil.copytree(saved["sharded"] / name, place / name)
        module = load(place)
        other = load(place / name)  # the subfolder itself
        torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)
        refused(lambda place=place: sd3min.load(place), str(place), "lacks")


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder/model.safetensors"])
def test_a_text_encoder_is_told_by_its_folder(name, saved):
    assert list(Checkpoint.open(saved["plain"] / name).parts) == ["clip_l"]


def test_a_file_of_diffusers_alone_loads_too(saved, pipe):
    path = saved["plain"] / "vae" / "diffusion_pytorch_model.safetensors"
    loaded = checkpoint.load_autoencoder(path).state_dict()
    torch.testing.assert_close(loaded, pipe.autoencoder.state_dict(), rtol=0, atol=0)


def without(place, copied, name, drop=(), add=None):
    """A copy of a diffusers folder whose part lacks some tensors and has others."""
    shutil.copytree(place, copied)
    (path,) = (copied / name).glob("*.safetensors")
    tensors = {n: t for n, t in load_file(path).items() if n not in drop}
    save_file(tensors | (add or {}), path)
    return copied


def test_faults_of_a_diffusers_folder_are_told_in_its_own_names(saved, tmp_path):
    key = "transformer_blocks.0.attn.to_k.weight"
    norm = "transformer_blocks.1.norm1_context.linear.bias"
    place = without(
        saved["plain"],
        tmp_path / "copy",
        "transformer",
        [key, norm],
        {"odd": torch.ones(1), "proj_out.bias": torch.ones(65)},
    )
    refused(
        lambda: Checkpoint.open(place).require(["mmdit"]),
        f"lacks {key}, {norm}, has odd, which does not belong there",
        "has proj_out.bias of shape [65] and not [64]: copy",
    )


def test_pieces_that_do_not_fit_together_are_told(saved, tmp_path):
    names = [f"transformer_blocks.0.attn.to_{x}.bias" for x in "qkv"]
    uneven = {names[0]: torch.ones(64), names[1]: torch.ones(192), names[2]: torch.ones(128)}
    place = without(saved["plain"], tmp_path / "copy", "transformer", (), uneven)
    said = f"has {', '.join(names)} of shapes that do not fit together"
    refused(lambda: Checkpoint.open(place).require(["mmdit"]), said)
    scalars = {name: torch.tensor(1.0) for name in names}
    place = without(saved["plain"], tmp_path / "scalars", "transformer", (), scalars)
    refused(lambda: Checkpoint.open(place).require(["mmdit"]), said)
    odd = {"norm_out.linear.bias": torch.ones(())}
    place = without(saved["plain"], tmp_path / "odd", "transformer", (), odd)
    refused(lambda: Checkpoint.open(place).require(["mmdit"]), "has norm_out.linear.bias of")


def test_another_model_in_a_diffusers_folder_is_refused(saved, tmp_path):
    shutil.copytree(saved["plain"], tmp_path / "copy")
    unet = {"down_blocks.0.attentions.0.proj_in.weight": torch.ones(1)}
    save_file(unet, tmp_path / "copy/transformer/diffusion_pytorch_model.safetensors")
    refused(lambda: Checkpoint.open(tmp_path / "copy"), "down_blocks.0", "no official")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        json.dumps({"weight_map": {"a": "x" * 5000}}),
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_index_is_refused(content, saved, tmp_path):
    shutil.copytree(saved["sharded"], tmp_path / "copy")
    index = tmp_path / "copy/transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(content.encode(errors="surrogateescape"))
    refused(lambda: Checkpoint.open(tmp_path / "copy"), str(index), "is no index of shards")


def test_missing_and_stray_shards_are_refused(saved, tmp_path):
    shutil.copytree(saved["sharded"], tmp_path / "copy")
    place = tmp_path / "copy/transformer"
    first, second, *_ = sorted(place.glob("*.safetensors"))
    content = first.read_bytes()
    first.unlink()
    refused(lambda: Checkpoint.open(tmp_path / "copy"), first.name, "missing there: copy")
    first.write_bytes(second.read_bytes())
    refused(lambda: Checkpoint.open(tmp_path / "copy"), "two shards", "download them again")
    first.write_bytes(content)
    next(place.glob("*.index.json")).unlink()
    refused(
        lambda: Checkpoint.open(tmp_path / "copy"), "is a shard that no index", "copy the index"
    )


@pytest.mark.skipif(not files.manifests(), reason="the official lists are not here")
def test_a_diffusers_folder_of_full_size_is_recognised_by_its_shapes(tmp_path, capsys):
    listed = files.manifests()["sd3.5_large.safetensors"]
    for part, name, sizes in (
        ("mmdit", "transformer", config.SD3_5_LARGE),
        ("autoencoder", "vae", config.AutoencoderConfig()),
    ):
        start = PREFIXES[part]
        own = {n.removeprefix(start): s for n, s in listed.items() if n.startswith(start)}
        meta = {n: torch.empty(s, device="meta") for n, s in own.items()}
        named = {n: list(t.shape) for n, t in formats.to_diffusers(meta, sizes).items()}
        half = len(named) // 2
        shards = [dict(list(named.items())[:half]), dict(list(named.items())[half:])]
        weight_map = {}
        for i, shapes in enumerate(shards):
            file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
            files.sparse(tmp_path / name / file, shapes, "BF16")
            weight_map |= dict.fromkeys(shapes, file)
        index = tmp_path / name / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    opened = Checkpoint.open(tmp_path)
    opened.require(["mmdit", "autoencoder"])
    assert opened.parts["mmdit"].config == config.SD3_5_LARGE
    assert opened.parts["mmdit"].parameters == 8_056_627_520
    assert opened.parts["autoencoder"].parameters == 83_819_683
    assert {n: t.shape for n, t in opened.parts["mmdit"].tensors.items()} == {
        n.removeprefix(PREFIXES["mmdit"]): s
        for n, s in listed.items()
        if n.startswith(PREFIXES["mmdit"])
    }
    refused(lambda: sd3min.load(tmp_path), "is SD3.5-large without text encoders")
    assert cli.main(["inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "SD3.5-large, depth 38" in output and "missing: CLIP-L, CLIP-G, T5" in output
    assert "in transformer/diffusion_pytorch_model-00002-of-00002.safetensors" in output


# its scheduler


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def scheduled(saved, tmp_path):
    """Links to a diffusers folder's parts, with a scheduler of one's own."""

    def make(config):
        place = tmp_path / f"scheduled {len(list(tmp_path.iterdir()))}"
        (place / "scheduler").mkdir(parents=True)
        for name in (*CLASSES, "tokenizer", "tokenizer_2", "tokenizer_3"):
            (place / name).symlink_to(saved["plain"] / name)
        content = config if isinstance(config, bytes) else json.dumps(config).encode()
        (place / SCHEDULER).write_bytes(content)
        return place

    return make


@pytest.mark.parametrize("shift", [1.0, 1.73, 3.0, 6])
def test_the_shift_of_the_scheduler_gives_diffusers_times(shift, scheduled):
    place = scheduled({})
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(place / "scheduler")
    pipe = sd3min.load(place)
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(place, subfolder="scheduler")
    assert pipe.defaults == replace(config.Defaults(), shift=shift)
    for steps in (1, 7, 28):
        theirs.set_timesteps(steps)
        seen = []
        size = {"width": 16, "height": 16, "t5_length": 16, "guidance_scale": 1}
        pipe(PROMPT, steps=steps, on_step=seen.append, progress=False, **size)
        times = torch.stack([step.t for step in seen])
        torch.testing.assert_close(times, theirs.sigmas[:-1], rtol=0, atol=ONE_ULP)


def test_without_a_shift_it_is_diffusers_one_and_without_a_scheduler_the_papers(scheduled, saved):
    theirs = FlowMatchEulerDiscreteScheduler.from_config({})
    assert Checkpoint.open(scheduled({})).defaults.shift == theirs.shift == 1.0
    place = scheduled({})
    shutil.rmtree(place / "scheduler")
    assert Checkpoint.open(place).defaults == config.Defaults()


def test_the_scheduler_comes_before_metadata_and_of_several_the_last(scheduled, official):
    place, other = scheduled({"shift": 2.0}), scheduled({"shift": 5.0})
    single = official / "sd3_medium.safetensors"
    assert Checkpoint.open(single).defaults == small.DEFAULTS
    for paths, shift in (
        ([single, place], 2.0),
        ([place, single], 2.0),
        ([place, other], 5.0),
        ([other, place], 2.0),
    ):
        assert Checkpoint.open(paths).defaults.shift == shift
    expected = replace(small.DEFAULTS, shift=2.0)
    assert Checkpoint.open([place, single]).defaults == expected
    assert Checkpoint.open(single, text_encoders=place).defaults == small.DEFAULTS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read: copy or download it again"),
        (b"[]", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        ({"shift": 0}, "has the shift 0, not a number from 0.001 to 1000: mend it"),
        ({"shift": -3.0}, "has the shift -3.0, not"),
        ({"shift": "3"}, "has the shift '3', not"),
        ({"shift": None}, "has the shift None, not"),
        ({"shift": True}, "has the shift True, not"),
        ({"shift": [3.0]}, "has the shift [3.0], not"),
        ({"shift": float("nan")}, "has the shift nan, not"),
        ({"shift": 10**400}, "not a number from 0.001 to 1000"),
    ],
)
def test_a_scheduler_that_says_nothing_sensible_is_refused(content, said, scheduled):
    place = scheduled(content)
    refused(lambda: Checkpoint.open(place), str(place / SCHEDULER), said)


def test_a_scheduler_that_cannot_be_opened_is_refused(scheduled):
    place = scheduled({})
    (place / SCHEDULER).unlink()
    (place / SCHEDULER).symlink_to("nowhere")
    refused(lambda: Checkpoint.open(place), SCHEDULER, "cannot be read")
    (place / SCHEDULER).unlink()
    (place / SCHEDULER).mkdir()
    refused(lambda: Checkpoint.open(place), SCHEDULER, "cannot be read")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas True"),
        ({"shift_terminal": 0.1}, "shift_terminal 0.1"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "_class_name FlowMatchHeunDiscrete"),
    ],
)
def test_times_that_no_fixed_shift_makes_are_a_warning(other, said, scheduled):
    place = scheduled({"shift": 2.0} | other)
    with pytest.warns(UserWarning) as caught:
        assert Checkpoint.open(place).defaults.shift == 2.0
    (message,) = {str(warning.message) for warning in caught}
    instead = "pictures are made with the fixed shift 2.0 unless another is passed"
    assert str(place / SCHEDULER) in message and said in message and instead in message


def test_all_that_diffusers_times_depend_on_is_known():
    """Every other choice of its scheduler is about one of these, or makes nothing without it."""
    choices = set(FlowMatchEulerDiscreteScheduler().config) - {"_use_default_values"}
    dynamic = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
    rest = choices - {"shift", "time_shift_type"} - dynamic
    assert rest == {name for name in USUAL if name != "_class_name"}
    theirs = FlowMatchEulerDiscreteScheduler().config
    assert {name: theirs[name] for name in rest} == {name: USUAL[name] for name in rest}


def test_a_converted_folder_keeps_its_shift(scheduled, tmp_path):
    place = scheduled({"shift": 1.73})
    there, back = tmp_path / "there.safetensors", tmp_path / "back"
    convert.convert(place, there, progress=False)
    assert Checkpoint.open(there).defaults == replace(config.Defaults(), shift=1.73)
    convert.convert(there, back, tokenizers=place, progress=False)
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(back, subfolder="scheduler")
    assert theirs.config.shift == 1.73
    (back / SCHEDULER).write_text('{"shift": 4}')  # changed by hand
    convert.convert(back, tmp_path / "again.safetensors", progress=False)
    assert Checkpoint.open(tmp_path / "again.safetensors").defaults.shift == 4
    convert.convert(back, tmp_path / "folder", progress=False)
    assert Checkpoint.open(tmp_path / "folder").defaults.shift == 4


# the projection of CLIP-L's pooled vector


@pytest.fixture(scope="module")
def projecting(saved, tmp_path_factory):
    """A diffusers folder whose CLIP-L projects, and the matrix."""
    place = tmp_path_factory.mktemp("projecting") / "folder"
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    return without(saved["plain"], place, "text_encoder", add={PROJECTION: matrix}), matrix


def pooled(theirs):
    """The pooled vector of diffusers' own encoding."""
    prompts = [PROMPT, "", "a blue heart!"]
    given = {"do_classifier_free_guidance": False, "max_sequence_length": 16}
    with torch.no_grad():
        return prompts, theirs.encode_prompt(prompts, None, None, **given)[2]


def test_a_diffusers_folder_projects_as_diffusers_does(projecting, saved, tmp_path):
    place, matrix = projecting
    options = {"torch_dtype": torch.float64}
    prompts, expected = pooled(StableDiffusion3Pipeline.from_pretrained(place, **options))
    encoders = checkpoint.load_text_encoders(place).double()
    ours = encoders.encode(prompts, 16).pooled
    assert oracle.relative(ours, expected) < oracle.RUNG_1
    plain = checkpoint.load_text_encoders(saved["plain"]).double().encode(prompts, 16).pooled
    assert oracle.relative(ours[:, :64], plain[:, :64] @ matrix.double().T) < oracle.RUNG_1
    mains = [place / name for name in ("transformer", "vae", "text_encoder_2", "text_encoder_3")]
    alone = Checkpoint.open(mains, [place / "text_encoder/model.safetensors"], place)
    named = alone.load_text_encoders(torch.float32, CPU).double()
    torch.testing.assert_close(named.encode(prompts, 16).pooled, ours, rtol=0, atol=0)


def test_an_official_file_projects_nothing_as_in_diffusers(pipe, saved, tmp_path):
    path = small.save_official(pipe, tmp_path / "official.safetensors")
    tensors = load_file(path)
    save_file(tensors | {PREFIXES["clip_l"] + PROJECTION: torch.randn(64, 64)}, path)
    theirs = StableDiffusion3Pipeline.from_single_file(
        str(path), config=str(saved["plain"]), torch_dtype=torch.float64
    )
    prompts, expected = pooled(theirs)
    encoders = checkpoint.load_text_encoders(path, saved["plain"], dtype="float32").double()
    assert oracle.relative(encoders.encode(prompts, 16).pooled, expected) < oracle.RUNG_1


def test_an_official_clip_l_alone_pools_as_transformers_without_a_projection(tmp_path):
    sizes = config.CLIPConfig(layers=2, width=768, mlp_width=96, vocabulary=100, length=16)
    tensors = small.randomise(text_encoders.clip(sizes, "clip_l")).state_dict()
    save_file(tensors, tmp_path / "clip_l.safetensors")
    loaded = Checkpoint.open(tmp_path / "clip_l.safetensors").load("clip_l", torch.float64, CPU)
    theirs = CLIPTextModelWithProjection(loaded.config).double().eval()
    theirs.load_state_dict(tensors)
    ids = torch.randint(0, 90, (3, 16), generator=torch.Generator().manual_seed(6))
    ids[:, -1] = loaded.config.vocab_size - 1
    with torch.no_grad():
        expected = theirs.text_model(ids).pooler_output
        assert oracle.relative(loaded(ids).text_embeds, expected) < oracle.RUNG_1


def test_a_projection_of_another_shape_is_refused(saved, tmp_path):
    add = {PROJECTION: torch.ones(32, 64)}
    place = without(saved["plain"], tmp_path / "copy", "text_encoder", add=add)
    said = f"has {PROJECTION} of shape [32, 64] and not [64, 64]"
    refused(lambda: Checkpoint.open(place).require(["clip_l"]), said)


def test_a_projection_survives_sharding_anew(projecting, tmp_path):
    place, matrix = projecting
    convert.convert(place, tmp_path / "again", shard_size=50_000, progress=False)
    loaded = Checkpoint.open(tmp_path / "again").load("clip_l", torch.float32, CPU)
    torch.testing.assert_close(loaded.text_projection.weight, matrix, rtol=0, atol=0)


def test_verify_compares_with_the_projection(projecting):
    place, _ = projecting
    checks = [check for check in probes.verify(place) if check.what in ("rows", "picture")]
    assert len(checks) == 4 and all(check.passed for check in checks), checks


# a folder of official files


def test_a_folder_of_official_files_loads(official, pipe, tmp_path):
    assert_holds(official, pipe)
    shutil.copytree(official, tmp_path / "other")
    (tmp_path / "other/text_encoders").mkdir()
    for name in ("clip_l", "clip_g", "t5xxl"):
        source = tmp_path / "other" / f"{name}.safetensors"
        source.rename(
            tmp_path / "other/text_encoders" / f"{name.replace('xxl', 'xxl_fp16')}.safetensors"
        )
    assert_holds(tmp_path / "other", pipe)
    (tmp_path / "other/._sd3_medium.safetensors").write_bytes(b"\0")  # as some systems leave behind
    assert_holds(tmp_path / "other", pipe)


def test_two_files_of_the_same_part_are_refused_and_both_are_named(official, tmp_path):
    shutil.copytree(official, tmp_path / "models")
    one, other = (tmp_path / "models" / f"t5xxl{end}.safetensors" for end in ("", "_fp8_e4m3fn"))
    shutil.copy(one, other)
    refused(
        lambda: Checkpoint.open(tmp_path / "models"), str(one), str(other), "both hold the T5: pass"
    )


@pytest.mark.parametrize("kind", ["plain", "official"])
def test_the_public_loaders_take_folders(kind, saved, official, pipe):
    place = official if kind == "official" else saved[kind]
    assert checkpoint.load_mmdit(place).config == pipe.mmdit.config
    assert checkpoint.load_autoencoder(place).config == small.AUTOENCODER
    encoders = checkpoint.load_text_encoders(place)
    torch.testing.assert_close(encoders.encode([PROMPT], 16), pipe.text_encoders.encode([PROMPT]))


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    for place in (tmp_path, tmp_path / "transformer"):
        refused(lambda place=place: Checkpoint.open(place), str(place), "holds no .safetensors")


# parts handed over one by one


def test_of_several_paths_the_last_that_holds_a_part_counts(official, saved, pipe, tmp_path):
    lighter = {name: 2 * t for name, t in small.official_tensors(pipe)["autoencoder"].items()}
    save_file(lighter, tmp_path / "vae.safetensors")
    paths = [official / "sd3_medium.safetensors", tmp_path / "vae.safetensors"]
    loaded = checkpoint.load_autoencoder(paths)
    torch.testing.assert_close(loaded.state_dict(), lighter, rtol=0, atol=0)
    loaded = checkpoint.load_autoencoder(paths[::-1])
    torch.testing.assert_close(loaded.state_dict(), pipe.autoencoder.state_dict(), rtol=0, atol=0)
    assert_holds(
        [saved["plain"] / "transformer", saved["sharded"] / "vae", *encoders(official)], pipe
    )


def encoders(official):
    return [official / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl")]


def test_text_encoders_come_from_folders_too_and_before_all_others(saved, official, pipe):
    whole = sd3min.load(official)
    mixed = sd3min.load(official / "sd3_medium.safetensors", saved["sharded"])
    call = {"steps": 1, "seed": 3, "width": 64, "height": 48, "t5_length": 16, "progress": False}
    assert mixed(PROMPT, **call)[0].tobytes() == whole(PROMPT, **call)[0].tobytes()


def test_the_fingerprint_is_the_files_own_or_that_of_all(official, saved, tmp_path):
    one = Checkpoint.open(official / "clip_l.safetensors")
    assert one.fingerprint() == checkpoint.fingerprint(official / "clip_l.safetensors")
    whole = Checkpoint.open(official).fingerprint()
    assert whole == Checkpoint.open(official).fingerprint() != one.fingerprint()
    shutil.copytree(official, tmp_path / "copy")
    assert Checkpoint.open(tmp_path / "copy").fingerprint() == whole
    tensors = load_file(tmp_path / "copy/clip_g.safetensors")
    tensors["text_projection.weight"] += 1
    save_file(tensors, tmp_path / "copy/clip_g.safetensors")
    assert Checkpoint.open(tmp_path / "copy").fingerprint() != whole


def test_the_command_line_takes_folders_and_several_files(official, saved, tmp_path, capsys):
    out = tmp_path / "out.png"
    settings = ["--size", "32x32", "--steps", "1", "--seed", "1", "--out", str(out)]
    vae = saved["sharded"] / "vae"
    for given in ([official], [saved["plain"]], [official, vae]):
        assert cli.main(["generate", PROMPT, "--weights", *map(str, given), *settings]) == 0
        out.unlink()
    assert cli.main(["inspect", str(official)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  missing: nothing"
    assert "  " + " " * 13 + "in clip_g.safetensors" in lines
    assert all(any(title in line for line in lines) for title in TITLES.values())
    assert cli.main(["inspect", str(official / "clip_l.safetensors"), str(vae)]) == 0
    assert "missing: MMDiT, CLIP-G, T5" in capsys.readouterr().out


def test_converted_tensors_are_read_one_at_a_time_as_they_are_stored(saved, pipe):
    part = Checkpoint.open(saved["sharded"]).parts["mmdit"]
    expected = pipe.mmdit.state_dict()
    assert part.tensors.keys() == expected.keys()
    for name, tensor in part.tensors.items():
        assert tensor.name == name or len(part.known_as(name)) == 1
        assert tensor.shape == list(expected[name].shape) and tensor.dtype == "F32"
        torch.testing.assert_close(tensor.read(), expected[name], rtol=0, atol=0)
