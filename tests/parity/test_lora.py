"""LoRA files cross to diffusers and back: the same velocities, embeddings and pictures.

diffusers' LoRA layers are PEFT's. Here they are changes of rows of fused layers, so that equal
outputs show the names, the rows, the swapped halves and alpha to be right.
"""

import json
import re

import numpy as np
import oracle
import pytest
import small
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import VARIANTS

from sd3min import lora
from sd3min.checkpoint import Checkpoint
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import TextEncoders

CPU, DOUBLE = torch.device("cpu"), torch.float64
EVERYWHERE = (  # targets of both kinds: fused and apart, with halves that are swapped there
    "qkv",
    "to_out.0",
    "to_add_out",
    "mlp.fc1",
    "mlp.fc2",
    "adaLN_modulation.1",
    "final_layer.linear",
    "context_embedder",
    "t_embedder.mlp.0",
    "y_embedder.mlp.2",
    "self_attn.*_proj",
    "text_projection",
)
THEIRS = (  # the same by diffusers' names, with the convolution too
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out", "context_embedder"),
    *("timestep_embedder.linear_1", "text_embedder.linear_2", "pos_embed.proj"),
)
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RANK, ALPHA, STRENGTH = 4, 10, 0.6
PROMPTS = ["a red circle above a blue square on gray", "", "a cat!"]
CALL = {"prompt": PROMPTS[:1], "width": 64, "height": 48}


@pytest.fixture(params=["SD3-medium", "SD3.5-medium"])
def ours(request, tmp_path) -> Pipeline:
    return in_double(small.pipeline(tmp_path, VARIANTS[request.param]))


def in_double(pipe: Pipeline) -> Pipeline:
    parts = (pipe.mmdit, pipe.autoencoder, pipe.text_encoders)
    return Pipeline(*(part.to(DOUBLE) for part in parts), pipe.defaults)


def modules(pipe: Pipeline) -> dict:
    encoders = pipe.text_encoders
    return {"mmdit": pipe.mmdit, "clip_l": encoders.clip_l, "clip_g": encoders.clip_g}


def fill(parameters, seed: int = 3) -> None:
    """Give a LoRA values that matter, its DoRA lengths those of another layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        data = parameter.data * (1 + 0.3 * noise) if "magnitude" in name else 0.1 * noise
        parameter.data = data.to(DOUBLE)


def outputs(pipe: Pipeline) -> list[torch.Tensor]:
    with torch.no_grad():
        return [pipe.mmdit(*oracle.inputs(pipe.mmdit)), *pipe.encode_prompt(PROMPTS)]


def their_outputs(theirs: StableDiffusion3Pipeline, pipe: Pipeline) -> list[torch.Tensor]:
    with torch.no_grad():
        velocity = oracle.velocity(theirs.transformer, *oracle.inputs(pipe.mmdit))
        context, _, pooled, _ = theirs.encode_prompt(
            *[PROMPTS] * 3,
            do_classifier_free_guidance=False,
            max_sequence_length=pipe.defaults.t5_length,
        )
    return [velocity, context, pooled]


def assert_same(ours: list, theirs: list, without: list) -> None:
    """To rung 1, where the LoRA changes every one of them."""
    for one, other, plain in zip(ours, theirs, without, strict=True):
        assert oracle.relative(other, plain) > 0.01, "a LoRA of no effect proves nothing"
        assert oracle.relative(one, other) < oracle.RUNG_1


def our_file(pipe: Pipeline, folder, targets=EVERYWHERE) -> lora.LoRA:
    made = lora.add(modules(pipe), 3, alpha=7.0, targets=targets)
    fill(made.named_parameters())
    lora.save(made, folder / "pytorch_lora_weights.safetensors")
    return made


@pytest.mark.parametrize("targets", [EVERYWHERE, None], ids=["everywhere", "default"])
def test_diffusers_loads_what_is_written_here(ours, targets, tmp_path):
    without, theirs = outputs(ours), oracle.pipeline(ours)
    made = our_file(ours, tmp_path, targets)
    theirs.load_lora_weights(tmp_path, adapter_name="own")
    assert_same(outputs(ours), their_outputs(theirs, ours), without)
    theirs.set_adapters("own", STRENGTH)
    made.set_scale(STRENGTH)
    assert_same(outputs(ours), their_outputs(theirs, ours), without)


def words_of(pipe: Pipeline) -> dict[str, list[lora.Word]]:
    """Two words of the first prompt for one CLIP, and one for the other, by their ids."""
    clip_l, clip_g = (
        tokenizer("red square cat dog").input_ids[1:-1]
        for tokenizer in pipe.text_encoders.tokenizers[:2]
    )
    red, square, cat, dog = clip_l
    return {
        "clip_l": [lora.Word(red, [cat, dog]), lora.Word(square, [])],
        "clip_g": [lora.Word(clip_g[1], [clip_g[2]])],
    }


def our_file_with_words(pipe: Pipeline, folder) -> lora.LoRA:
    parts = modules(pipe)
    made = lora.add(parts, 3, targets=["attn.to_q", "self_attn.v_proj"])
    words = lora.add_words(parts, words_of(pipe), faster=6.0)
    fill(made.named_parameters())
    fill([(name, p) for name, p in words.named_parameters() if name.endswith("down")])
    both = lora.LoRA([*made, *words])
    lora.save(both, folder / "pytorch_lora_weights.safetensors")
    return both


def test_diffusers_reads_the_rows_of_words_that_were_learnt_here(ours, tmp_path):
    without, theirs = outputs(ours), oracle.pipeline(ours)
    made = our_file_with_words(ours, tmp_path)
    theirs.load_lora_weights(tmp_path, adapter_name="own")
    assert_same(outputs(ours), their_outputs(theirs, ours), without)
    ids = ours.text_encoders.tokenizers[0](PROMPTS[:1], return_tensors="pt").input_ids
    rows = [
        model.get_input_embeddings()(ids)
        for model in (ours.text_encoders.clip_l, theirs.text_encoder)
    ]
    assert oracle.relative(*rows) < oracle.RUNG_1
    theirs.set_adapters("own", STRENGTH)
    made.set_scale(STRENGTH)
    assert_same(outputs(ours), their_outputs(theirs, ours), without)


def test_the_default_targets_are_those_of_diffusers_trainer(ours, tmp_path):
    theirs = oracle.pipeline(ours)
    our_file(ours, tmp_path, None)
    image, context = ("to_k", "to_q", "to_v", "to_out.0"), ("add_k_proj", "add_q_proj")
    listed = [f"attn.{name}" for name in (*image, *context, "add_v_proj", "to_add_out")]
    theirs.transformer.add_adapter(LoraConfig(target_modules=listed))
    clips = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    theirs.text_encoder.add_adapter(clips)
    theirs.text_encoder_2.add_adapter(clips)
    names = {
        f"{part}.{name}"
        for part, module in adapters(theirs).items()
        for name in get_peft_model_state_dict(module)
    }
    assert load_file(tmp_path / "pytorch_lora_weights.safetensors").keys() == names


@pytest.mark.parametrize("write", [our_file, our_file_with_words], ids=["layers", "words too"])
def test_a_picture_with_a_lora_has_the_same_pixels(ours, tmp_path, write):
    theirs = oracle.pipeline(ours)
    plain = np.asarray(ours(**CALL, seed=0, progress=False)[0])
    write(ours, tmp_path)
    theirs.load_lora_weights(tmp_path)
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(0))

    def rounded(_pipe, _index, _t, tensors):
        return {"latents": tensors["latents"].float().to(DOUBLE)}

    made = theirs(
        **CALL,
        num_inference_steps=ours.defaults.steps,
        guidance_scale=ours.defaults.guidance_scale,
        max_sequence_length=ours.defaults.t5_length,
        latents=noise.to(DOUBLE),
        callback_on_step_end=rounded,
    ).images[0]
    picture = np.asarray(ours(**CALL, seed=0, progress=False)[0])
    assert np.abs(picture.astype(int) - plain).mean() > 2
    assert np.array_equal(picture, np.asarray(made))


def adapters(theirs: StableDiffusion3Pipeline) -> dict:
    return {
        "transformer": theirs.transformer,
        "text_encoder": theirs.text_encoder,
        "text_encoder_2": theirs.text_encoder_2,
    }


def their_file(theirs: StableDiffusion3Pipeline, folder, clip=CLIP, **given):
    """Adapters that PEFT makes in diffusers' modules, written by diffusers."""
    found = adapters(theirs)
    for name, module in found.items():
        targets = list(THEIRS if name == "transformer" else clip)
        config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets} | given
        module.add_adapter(LoraConfig(**config, init_lora_weights="gaussian"))
        fill((n, p) for n, p in module.named_parameters() if "lora_" in n)
        assert not [n for n in targets if not any(f"{n}.lora_" in k for k in module.state_dict())]
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        *(get_peft_model_state_dict(module) for module in found.values()),
        **_collate_lora_metadata(found),
    )
    return folder / "pytorch_lora_weights.safetensors"


PATTERNS = {
    "rank_pattern": {"to_q": 2, "blocks.0.norm1.linear": 7, "q_proj": 5},
    "alpha_pattern": {"to_k": 3, "proj_out": 9.5, "q_proj": 1},
}
WRITTEN = {
    "plain": {},
    "tables of tokens": {"clip": (*CLIP, "token_embedding")} | PATTERNS,
    "rank-stabilised": {"use_rslora": True} | PATTERNS,
    "DoRA": {"use_dora": True} | PATTERNS,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pipeline with every kind of layer, and its outputs without a LoRA."""
    pipe = in_double(small.pipeline(tmp_path_factory.mktemp("large"), VARIANTS["SD3.5-medium"]))
    return pipe, outputs(pipe)


@pytest.mark.parametrize("given", WRITTEN)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_what_diffusers_writes_loads_here(large, given, tmp_path):
    """Merged into the weights as they are read, since a convolution is among them."""
    (ours, without), theirs = large, oracle.pipeline(large[0])
    path = their_file(theirs, tmp_path, **WRITTEN[given])
    whole = small.save_official(ours, tmp_path / "whole.safetensors")
    for scale in (1.0, STRENGTH):
        theirs.set_adapters("default", scale)
        assert_same(merged(whole, path, scale, ours), their_outputs(theirs, ours), without)


def merged(whole, path, scale: float, pipe: Pipeline) -> list[torch.Tensor]:
    """What the file's parts make with a LoRA merged."""
    names = ["mmdit", "clip_l", "clip_g"]
    opened = lora.merged(Checkpoint.open(whole), [(path, scale)], names)
    mmdit, *clips = (opened.load(name, DOUBLE, CPU) for name in names)
    encoders = pipe.text_encoders
    fresh = TextEncoders(*clips, encoders.t5, encoders.tokenizers, 320, encoders.t5_length)
    return outputs(Pipeline(mmdit, pipe.autoencoder, fresh, pipe.defaults))


BLOCK = {  # diffusers' names in a block and the official ones, by hand
    r"attn\.to_[qkv]": "x_block.attn.qkv",
    r"attn\.add_[qkv]_proj": "context_block.attn.qkv",
    r"attn2\.to_[qkv]": "x_block.attn2.qkv",
    r"attn\.to_out\.0": "x_block.attn.proj",
    r"attn\.to_add_out": "context_block.attn.proj",
    r"attn2\.to_out\.0": "x_block.attn2.proj",
    r"ff\.net\.0\.proj": "x_block.mlp.fc1",
    r"ff\.net\.2": "x_block.mlp.fc2",
    r"ff_context\.net\.0\.proj": "context_block.mlp.fc1",
    r"ff_context\.net\.2": "context_block.mlp.fc2",
    r"norm1\.linear": "x_block.adaLN_modulation.1",
    r"norm1_context\.linear": "context_block.adaLN_modulation.1",
}
OUTER = {
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "pos_embed.proj": "x_embedder.proj",
}
SWAPPED = ("final_layer.adaLN_modulation.1", "joint_blocks.1.context_block.adaLN_modulation.1")


def official_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, index, rest = name.split(".", 2)
    (own,) = [official for pattern, official in BLOCK.items() if re.fullmatch(pattern, rest)]
    return f"joint_blocks.{index}.{own}"


def pairs(path) -> dict:
    """(A, B) of each layer of diffusers' file, by its name there."""
    tensors = load_file(path)
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    return {n: (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in stems}


def by_official_names(path) -> dict:
    """(A, B, alpha) of each layer by its official name; q, k and v under one, of blocks."""
    groups: dict[str, list] = {}
    for name, (down, up) in pairs(path).items():
        part, _, rest = name.partition(".")
        own = official_name(rest) if part == "transformer" else rest
        if own in SWAPPED and part == "transformer":
            shift, scale = up[: len(up) // 2], up[len(up) // 2 :]
            up = torch.cat([scale, shift])
        order = next((i for i, c in enumerate("qkv") if f"to_{c}" in rest or f"_{c}_" in rest), 0)
        groups.setdefault(f"{part}.{own}", []).append((order, down, up))
    made = {}
    for name, group in groups.items():
        _, downs, ups = zip(*sorted(group, key=lambda piece: piece[0]), strict=True)
        down = torch.cat(downs)
        up = torch.block_diag(*ups) if len(ups) > 1 else ups[0]
        made[name] = (down, up, len(group) * ALPHA)
    return made


def kohya(path) -> dict:
    starts = {"transformer": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
    tensors = {}
    for name, (down, up, alpha) in by_official_names(path).items():
        part, _, own = name.partition(".")
        stem = f"lora_{starts[part]}_{own.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def comfyui(path) -> dict:
    starts = {
        "transformer": "diffusion_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    }
    tensors = {}
    for name, (down, up, alpha) in by_official_names(path).items():
        part, _, own = name.partition(".")
        stem = starts[part] + own
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def older(path) -> dict:
    """Names from before PEFT, and no alpha: it is the rank."""
    tensors = {}
    for name, (down, up) in pairs(path).items():
        tensors[f"{name}.lora.down.weight"] = down
        tensors[f"{name}.lora.up.weight"] = up * ALPHA / RANK
    return tensors


def onetrainer(path) -> dict:
    starts = {"transformer": "transformer", "text_encoder": "te1", "text_encoder_2": "te2"}
    tensors = {}
    for name, (down, up) in pairs(path).items():
        part, _, own = name.partition(".")
        stem = f"lora_{starts[part]}_{own.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(float(ALPHA))
    return tensors


@pytest.fixture(scope="module")
def crossed(large, tmp_path_factory):
    """Weights, a LoRA that diffusers wrote, and what diffusers makes with it."""
    folder, theirs = tmp_path_factory.mktemp("crossed"), oracle.pipeline(large[0])
    path = their_file(theirs, folder)
    whole = small.save_official(large[0], folder / "whole.safetensors")
    return whole, path, their_outputs(theirs, large[0])


@pytest.mark.parametrize("dialect", [kohya, comfyui, older, onetrainer])
def test_other_dialects_say_the_same(large, crossed, dialect, tmp_path):
    (ours, without), (whole, path, theirs) = large, crossed
    save_file(dialect(path), tmp_path / "other.safetensors")
    made = merged(whole, tmp_path / "other.safetensors", 1.0, ours)
    assert_same(made, theirs, without)


def test_pefts_own_folder_says_alpha_beside_its_file(large, crossed, tmp_path):
    (ours, without), (whole, path, theirs) = large, crossed
    tensors = {
        name.replace("transformer.", "base_model.model.", 1): tensor
        for name, tensor in load_file(path).items()
        if name.startswith("transformer.")
    }
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK}))
    assert_same(merged(whole, file, 1.0, ours)[:1], theirs[:1], without[:1])


@pytest.mark.parametrize("given", WRITTEN)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_what_diffusers_wrote_is_written_again_as_it_was(large, given, tmp_path):
    """But for rank-stabilised factors, which become alphas."""
    path = their_file(oracle.pipeline(large[0]), tmp_path, **WRITTEN[given])
    tensors = {n: t for n, t in load_file(path).items() if "pos_embed" not in n}
    with safe_open(path, "pt") as file:
        save_file(tensors, path, file.metadata())
    first = lora.read(path, modules(large[0]))
    lora.save(first, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    read = lora.read(tmp_path / "again.safetensors", modules(large[0]))
    alphas = [{layer.name: c.alpha for layer, c in made} for made in (first, read)]
    assert alphas[0] == alphas[1] and len(set(alphas[0].values())) > (given != "plain")


@pytest.mark.parametrize("given", ["plain", "DoRA"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_kohyas_names_as_they_are_written_say_the_same(large, given, tmp_path):
    (ours, without), theirs = large, oracle.pipeline(large[0])
    path = their_file(theirs, tmp_path, **WRITTEN[given])
    whole = small.save_official(ours, tmp_path / "whole.safetensors")
    lora.save(lora.read(path, modules(ours)), tmp_path / "kohya.safetensors", "kohya")
    made = merged(whole, tmp_path / "kohya.safetensors", 1.0, ours)
    assert_same(made, their_outputs(theirs, ours), without)
    names = load_file(tmp_path / "kohya.safetensors")
    assert names.keys() == kohya(path).keys() | {n for n in names if n.endswith(".dora_scale")}
