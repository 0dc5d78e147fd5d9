"""LoRA: put beside layers, merged and taken out, read strictly, and loaded with a model."""

import math

import files
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sd3min
from sd3min import lora
from sd3min.config import Refusal
from sd3min.lora.layers import LoRALinear, LowRank
from sd3min.lora.names import places
from sd3min.parts import PREFIXES

CPU = torch.device("cpu")
EXACT = 1e-10  # float64, relative
QKV = "joint_blocks.0.x_block.attn.qkv"
ALL = ("*qkv", "*proj", "mlp.fc1", "adaLN_modulation.1", "mlp.0", "*_proj", "SelfAttention.*", "wo")
official = pytest.mark.skipif(not files.manifests(), reason="the official lists are not here")


@pytest.fixture
def mmdit():
    return small.mmdit(small.VARIANTS["SD3.5-medium"]).double()


def fill(made: lora.LoRA, seed: int = 5) -> lora.LoRA:
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.2 * noise.to(parameter.dtype)
    return made


def run(mmdit: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = (3, 16, 6, 4), (3, 5, 320), (3, 192)
    latents, context, pooled = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes
    )
    times = torch.tensor([999.0, 500.5, 3.25], dtype=torch.float64)
    return mmdit(latents, times, context, pooled)


def weights(mmdit: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in mmdit.state_dict().items()}


# beside the layers


def test_a_new_lora_changes_nothing_and_alone_gets_gradients(mmdit):
    before = run(mmdit)
    made = lora.add({"mmdit": mmdit}, rank=8, targets=["attn.to_q", "attn2.qkv", "mlp.fc1"])
    assert torch.equal(run(mmdit), before)
    trained = {id(p) for p in mmdit.parameters() if p.requires_grad}
    assert trained == {id(p) for p in made.parameters()}
    fill(made)
    run(mmdit).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())
    assert all(p.grad is None for p in mmdit.parameters() if id(p) not in trained)


def test_a_is_normal_with_deviation_of_one_over_the_rank_and_b_is_zero(mmdit):
    made = lora.add({"mmdit": mmdit}, 8, targets=["*qkv"], generator=torch.manual_seed(0))
    downs = torch.cat([change.down.flatten() for _, change in made])
    assert len(downs) > 5000
    assert downs.std().item() * 8 == pytest.approx(1, abs=0.03)
    assert abs(downs.mean().item()) * 8 < 0.03
    assert not any(change.up.any() for _, change in made)
    again = lora.add({"mmdit": mmdit}, 8, targets=["*qkv"], generator=torch.manual_seed(0))
    assert torch.equal(downs, torch.cat([change.down.flatten() for _, change in again]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_lora_of_short_weights_is_in_float32(mmdit, dtype):
    made = lora.add({"mmdit": mmdit.to(dtype)})
    assert {p.dtype for p in made.parameters()} == {torch.promote_types(dtype, torch.float32)}
    linear = mmdit.get_submodule(QKV)
    assert linear(torch.ones(2, 3, 128, dtype=dtype)).dtype == dtype


def test_three_loras_of_q_k_and_v_are_rows_of_one_layer(mmdit):
    made = fill(lora.add({"mmdit": mmdit}, 4, 6.0, ["x_block.attn.qkv", "attn.to_q", "attn.to_v"]))
    changes = [change.rows for layer, change in made if layer.name == QKV]
    assert changes == [slice(0, 384)]  # one, since the whole is named
    made = [(layer, c) for layer, c in made if "context_block.attn.qkv" in layer.name]
    assert made == []  # diffusers calls those add_q_proj
    apart = fill(lora.add({"mmdit": mmdit}, 4, 6.0, ["attn.add_k_proj", "attn.add_v_proj"]))
    rows = [change.rows for layer, change in apart if "joint_blocks.0." in layer.name]
    assert rows == [slice(128, 256), slice(256, 384)]
    linear = mmdit.joint_blocks[0].context_block.attn.qkv
    x = torch.randn(2, 3, 128, dtype=torch.float64, generator=torch.manual_seed(2))
    moved = linear(x) - nn.functional.linear(x, linear.weight, linear.bias)
    assert not moved[..., :128].any() and moved[..., 128:].abs().min() > 0
    k, v = (change for layer, change in apart if "joint_blocks.0." in layer.name)
    by_hand = torch.cat([x @ c.down.T @ c.up.T * 6 / 4 for c in (k, v)], dim=-1)
    torch.testing.assert_close(moved[..., 128:], by_hand, rtol=0, atol=EXACT)


def test_merged_weights_compute_the_same_and_come_back_bit_for_bit(mmdit):
    kept, parts = weights(mmdit), {"mmdit": mmdit}
    fill(lora.add(parts, 3, 7.0, ["*qkv", "attn.to_out.0", "mlp.fc1", "adaLN_modulation.1"]))
    beside = run(mmdit)
    lora.merge(parts)
    changed = mmdit.state_dict()[f"{QKV}.weight"]
    assert (changed - kept[f"{QKV}.weight"]).abs().max() > 0.1
    torch.testing.assert_close(run(mmdit), beside, rtol=0, atol=EXACT)
    lora.merge(parts)
    torch.testing.assert_close(run(mmdit), beside, rtol=0, atol=EXACT)
    lora.unmerge(parts)
    assert torch.equal(run(mmdit), beside)
    assert all(torch.equal(mmdit.state_dict()[name], tensor) for name, tensor in kept.items())


def test_unmerging_in_bfloat16_gives_the_same_bits(mmdit):
    mmdit.bfloat16()
    kept, parts = weights(mmdit), {"mmdit": mmdit}
    made = fill(lora.add(parts, 2))
    lora.merge(parts)
    exact = kept[f"{QKV}.weight"].double()
    for layer, change in made:
        if layer.name == QKV:
            exact[change.rows] += change.up.double() @ change.down.double()
    step = exact.abs() * torch.finfo(torch.bfloat16).eps / 2  # rounded once
    assert ((mmdit.state_dict()[f"{QKV}.weight"] - exact).abs() <= step * (1 + 1e-4)).all()
    lora.unmerge(parts)
    assert all(torch.equal(mmdit.state_dict()[name], tensor) for name, tensor in kept.items())


def test_several_loras_add_up_each_with_its_own_scale(mmdit):
    kept, parts = weights(mmdit), {"mmdit": mmdit}
    one = fill(lora.add(parts, 3, 7.0, ["attn.to_q"]), 1).set_scale(0.5)
    two = fill(lora.add(parts, 5, 1.0, ["attn.qkv"]), 2).set_scale(-2.0)
    by_hand = kept[f"{QKV}.weight"].clone()
    for made, factor in ((one, 0.5 * 7 / 3), (two, -2.0 / 5)):
        for layer, change in made:
            if layer.name == QKV:
                by_hand[change.rows] += factor * change.up @ change.down
    lora.merge(parts)
    torch.testing.assert_close(mmdit.state_dict()[f"{QKV}.weight"], by_hand, rtol=0, atol=EXACT)
    with pytest.raises(Refusal, match="unmerge them first"):
        lora.add(parts)
    lora.detach(parts, one)
    alone = run(mmdit)
    one.set_scale(0)
    lora.attach(parts, one, 0.0)
    torch.testing.assert_close(run(mmdit), alone, rtol=0, atol=EXACT)
    lora.detach(parts, one)
    lora.detach(parts, two)
    assert not [m for m in mmdit.modules() if isinstance(m, LoRALinear | LowRank)]
    assert weights(mmdit).keys() == kept.keys()
    assert all(torch.equal(mmdit.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"targets": ["attn.to_x"]}, "target attn.to_x is the end of no layer's name"),
        ({"targets": ["attn.to_q", "to_k", "k"]}, "target k is the end of no layer's name"),
        ({"targets": []}, "no layer of mmdit is a target"),
        ({"rank": 0}, "rank 0 and alpha 0 make no LoRA"),
        ({"alpha": math.nan}, "rank 4 and alpha nan make no LoRA"),
    ],
)
def test_what_makes_no_lora_is_refused_and_freezes_nothing(given, said, mmdit):
    mmdit.requires_grad_(True)
    with pytest.raises(Refusal, match=said):
        lora.add({"mmdit": mmdit}, **given)
    assert all(parameter.requires_grad for parameter in mmdit.parameters())
    assert not any(isinstance(module, LoRALinear) for module in mmdit.modules())


@pytest.mark.parametrize("across", [True, False], ids=["columns", "rows"])
def test_dora_gives_rows_or_columns_the_lengths_that_it_has(across, mmdit, tmp_path):
    """The lengths of rows are PEFT's, those of columns are found in files of LyCORIS."""
    kept, parts = weights(mmdit)[f"{QKV}.weight"], {"mmdit": mmdit}
    generator = torch.Generator().manual_seed(4)
    down, up, lengths = (
        torch.randn(size, generator=generator, dtype=torch.float64).abs()
        for size in ((3, 128), (384, 3), (1, 128) if across else (384, 1))
    )
    stem = f"lora_unet_{QKV.replace('.', '_')}"
    values = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": lengths}
    tensors = {f"{stem}.{name}": value for name, value in values.items()}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(1.5)}, tmp_path / "dora.safetensors")
    lora.attach(parts, lora.read(tmp_path / "dora.safetensors", parts), 0.5)

    by_hand = kept + 0.5 * 1.5 / 3 * up @ down
    by_hand = by_hand * lengths / by_hand.square().sum(0 if across else 1, keepdim=True).sqrt()
    linear, x = mmdit.get_submodule(QKV), torch.ones(2, 3, 128, dtype=torch.float64)
    expected = nn.functional.linear(x, by_hand, linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=EXACT)
    lora.merge(parts)
    torch.testing.assert_close(linear.weight.data, by_hand, rtol=0, atol=EXACT)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=EXACT)
    if across:
        with pytest.raises(Refusal, match="has DoRA's lengths of columns: save as kohya"):
            lora.save(lora.read(tmp_path / "dora.safetensors", parts), tmp_path / "b.safetensors")


@pytest.mark.parametrize("missing", [True, False])
def test_dora_of_some_rows_is_refused_where_kohyas_names_cannot_say_it(missing, mmdit, tmp_path):
    made = fill(lora.add({"mmdit": mmdit}, 2, targets=["attn.to_q", "attn.to_k", "attn.to_v"]))
    for layer, change in made:
        if not (missing and layer.name == QKV and change.rows.start):
            change.magnitude = nn.Parameter(torch.ones(128, 1, dtype=torch.float64))
    if missing:
        with pytest.raises(Refusal, match=f"DoRA changes some rows of {QKV} alone"):
            lora.save(made, tmp_path / "kohya.safetensors", "kohya")
        with pytest.raises(Refusal, match="DoRA changes some layers alone"):
            lora.save(made, tmp_path / "diffusers.safetensors")
        assert not list(tmp_path.iterdir())
    else:
        lora.save(made, tmp_path / "kohya.safetensors", "kohya")


def test_a_lora_that_does_not_fit_the_modules_is_put_nowhere(mmdit, tmp_path):
    made = fill(lora.add({"mmdit": mmdit}, 2))
    lora.detach({"mmdit": mmdit}, made)
    with pytest.raises(Refusal, match="the LoRA changes MMDiT: pass it as mmdit too"):
        lora.attach({"clip_l": nn.Module()}, made)
    qkv, patches = f"lora_unet_{QKV.replace('.', '_')}", "lora_unet_x_embedder_proj"
    tensors = {
        f"{qkv}.lora_A.weight": torch.ones(1, 128),
        f"{qkv}.lora_B.weight": torch.ones(384, 1),
        f"{patches}.lora_down.weight": torch.ones(1, 16, 2, 2),
        f"{patches}.lora_up.weight": torch.ones(128, 1, 1, 1),
    }
    save_file(tensors, tmp_path / "patches.safetensors")
    read = lora.read(tmp_path / "patches.safetensors", {"mmdit": mmdit})
    assert len(read.layers) == 2
    with pytest.raises(Refusal, match=r"x_embedder.proj is a convolution: load the LoRA with"):
        lora.attach({"mmdit": mmdit}, read)
    assert not any(isinstance(module, LoRALinear) for module in mmdit.modules())
    with pytest.raises(Refusal, match=r"x_embedder.proj is a convolution: save as kohya"):
        lora.save(read, tmp_path / "other.safetensors")


def test_a_lora_is_put_beside_a_layer_once(mmdit):
    made = lora.add({"mmdit": mmdit}, 2)
    with pytest.raises(Refusal, match="has this LoRA already: detach it first"):
        lora.attach({"mmdit": mmdit}, made)
    lora.detach({"mmdit": mmdit}, made)
    lora.attach({"mmdit": mmdit}, made)


def test_a_lora_in_float16_computes_in_the_models_longer_type(mmdit):
    fill(lora.add({"mmdit": mmdit.float()}, 2, targets=["x_block.attn.proj"])).half()
    tokens = 1e5 * torch.randn(3, mmdit.config.width)  # beyond float16
    found = mmdit.joint_blocks[0].x_block.attn.proj(tokens)
    lora.merge({"mmdit": mmdit})
    expected = mmdit.joint_blocks[0].x_block.attn.proj(tokens)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_clip_ls_projection_is_no_target_since_no_file_has_it(tmp_path):
    encoders = small.pipeline(tmp_path).text_encoders
    parts = {"clip_l": encoders.clip_l, "clip_g": encoders.clip_g}
    named = {(layer.part, layer.name) for layer, _ in lora.add(parts, targets=["text_projection"])}
    assert ("clip_g", "text_projection") in named and ("clip_l", "text_projection") not in named


# the rows of words

TABLE = "text_model.embeddings.token_embedding"


@pytest.fixture
def clip(tmp_path):
    return small.pipeline(tmp_path).text_encoders.clip_l.double()


def test_a_word_begins_as_the_mean_of_others_and_its_difference_alone_learns(clip):
    table = clip.get_submodule(TABLE).weight.detach().clone()
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    made = lora.add_words({"clip_l": clip}, {"clip_l": [lora.Word(7, [2, 5])]}, faster=4.0)
    made.requires_grad_(True)
    ((layer, change),) = made
    change.up.requires_grad_(False)
    assert layer.name == TABLE and change.rows == slice(7, 8) and change.factor == 1
    look = clip.get_input_embeddings()
    rows = look(torch.tensor([[7, 2, 6], [8, 7, 0]]))
    learnt = table[[2, 5]].mean(dim=0)
    expected = torch.stack([learnt, table[2], table[6], table[8], learnt, table[0]])
    torch.testing.assert_close(rows.flatten(0, 1), expected, rtol=0, atol=1e-12)
    rows.sum().backward()
    torch.testing.assert_close(change.down.grad, torch.full_like(change.down, 2 * 4.0))
    lora.merge({"clip_l": clip})
    torch.testing.assert_close(look(torch.tensor([7]))[0], learnt, rtol=0, atol=1e-12)
    lora.detach({"clip_l": clip}, made)
    assert type(clip.get_input_embeddings()) is nn.Embedding
    assert all(torch.equal(clip.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_word_that_is_like_none_begins_as_it_is(clip):
    ids = torch.arange(9)[None]
    before = clip.get_input_embeddings()(ids)
    lora.add_words({"clip_l": clip}, {"clip_l": [lora.Word(3, [])]})
    assert torch.equal(clip.get_input_embeddings()(ids), before)


def test_words_with_scales_come_back_from_the_file_and_change_no_other_row(whole, tmp_path):
    pipe = sd3min.load(whole)
    parts, path = modules(pipe), tmp_path / "words.safetensors"
    table = pipe.text_encoders.clip_g.get_submodule(TABLE).weight.detach().clone()
    made = lora.add_words(parts, {"clip_g": [lora.Word(4, [1]), lora.Word(9, [2, 3])]}, 6.0)
    lora.save(made.set_scale(0.5), path)
    assert set(load_file(path)) == {
        f"text_encoder_2.{TABLE}.lora_embedding_{side}" for side in "AB"
    }
    merged = sd3min.load(whole, lora=[(path, 3.0)]).text_encoders.clip_g.get_submodule(TABLE).weight
    expected = table.clone()
    expected[4] += 1.5 * (table[1] - table[4])
    expected[9] += 1.5 * (table[[2, 3]].mean(dim=0) - table[9])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    others = [i for i in range(len(table)) if i not in (4, 9)]
    assert torch.equal(merged[others], table[others])
    ((_, change),) = lora.read(path, parts)
    assert change.rows == slice(4, 10)
    with pytest.raises(Refusal, match="rows of words, which kohya cannot say"):
        lora.save(made, tmp_path / "kohya.safetensors", "kohya")


# files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def whole(folder):
    return small.save_official(small.pipeline(folder), folder / "whole.safetensors")


def modules(pipe) -> dict[str, nn.Module]:
    encoders = pipe.text_encoders
    every = {"mmdit": pipe.mmdit, "clip_l": encoders.clip_l, "clip_g": encoders.clip_g}
    return every | ({"t5": encoders.t5} if encoders.t5 else {})


@pytest.fixture(scope="module")
def made(whole, folder):
    """Three files: of all parts, of the MMDiT alone, and of the CLIPs alone."""
    pipe = sd3min.load(whole)
    every = modules(pipe)
    named = {"all": ["mmdit", "clip_l", "clip_g", "t5"], "mmdit": ["mmdit"], "clips": ["clip_l"]}
    for seed, (name, parts) in enumerate(named.items()):
        chosen = {part: every[part] for part in parts}
        targets = ALL if name == "all" else None
        new = fill(lora.add(chosen, 3, alpha=5.0, targets=targets), seed)
        lora.save(new, folder / f"{name}.safetensors")
        lora.detach(chosen, new)
    return folder


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_a_saved_lora_comes_back(dialect, made, whole, tmp_path):
    parts = modules(sd3min.load(whole))
    first = lora.attach(parts, lora.read(made / "all.safetensors", parts), 0.5)
    lora.save(first, tmp_path / "again.safetensors", dialect)
    lora.merge(parts)
    ours = modules(sd3min.load(whole))
    again = lora.attach(ours, lora.read(tmp_path / "again.safetensors", ours))
    lora.merge(ours)
    assert {layer.part for layer, _ in again} == set(parts)
    for part, module in parts.items():
        theirs = ours[part].state_dict()
        for name, tensor in module.state_dict().items():
            if ".loras." not in name:
                torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(Refusal, match=r"again.safetensors exists: remove it first"):
        lora.save(first, tmp_path / "again.safetensors")
    with pytest.raises(Refusal, match="dialect a1111 is not one of diffusers, kohya"):
        lora.save(first, tmp_path / "other.safetensors", "a1111")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors"]


def edited(made, path, edit, metadata=None):
    """A good file with something done to its tensors."""
    tensors = load_file(made / "mmdit.safetensors")
    edit(tensors)
    save_file(tensors, path, metadata)
    return path


TO_Q = "transformer.transformer_blocks.0.attn.to_q"
OTHER_TO_Q = "lora_transformer_transformer_blocks_0_attn_to_q"
FAULTS = {
    "a name of nothing": (
        lambda t: t.update({f"{TO_Q}x.lora_A.weight": torch.ones(1), "why": torch.ones(1)}),
        [f"has {TO_Q}x.lora_A.weight, why, which the model has no layer for"],
    ),
    "many names of nothing": (
        lambda t: t.update(
            {f"transformer.blocks.{i}.lora_A.weight": torch.ones(1) for i in "abcdef"}
        ),
        ["has transformer.blocks.a.lora_A.weight, transformer.blocks.b", "and 3 more"],
    ),
    "a bias": (
        lambda t: t.update({f"{TO_Q}.lora_B.bias": torch.ones(128)}),
        [f"has {TO_Q}.lora_B.bias, which the model has no layer for"],
    ),
    "half a pair": (lambda t: t.pop(f"{TO_Q}.lora_A.weight"), [f"has but half of {TO_Q}"]),
    "a lonely alpha": (
        lambda t: (
            t.update({f"{TO_Q.replace('0', '1').replace('_q', '_out.0')}.alpha": t.pop("x")})
            if "x" in t
            else t.update({"lora_unet_joint_blocks_0_x_block_mlp_fc1.alpha": torch.ones(())})
        ),
        ["has but half of lora_unet_joint_blocks_0_x_block_mlp_fc1"],
    ),
    "too few rows": (
        lambda t: t.update({f"{TO_Q}.lora_B.weight": torch.ones(127, 3)}),
        [f"has {TO_Q}.lora_B.weight of shape [127, 3] for a layer of 128 to 128 values"],
    ),
    "too few inputs": (
        lambda t: t.update({f"{TO_Q}.lora_A.weight": torch.ones(3, 64)}),
        [f"has {TO_Q}.lora_A.weight of shape [3, 64] for a layer of 128 to 128 values"],
    ),
    "two ranks": (
        lambda t: t.update({f"{TO_Q}.lora_A.weight": torch.ones(2, 128)}),
        [f"has {TO_Q}.lora_B.weight of shape [128, 3]"],
    ),
    "no rank": (
        lambda t: t.update({f"{TO_Q}.lora_A.weight": torch.ones(0, 128)}),
        [f"has {TO_Q}.lora_A.weight of shape [0, 128]"],
    ),
    "many alphas": (
        lambda t: t.update({f"{TO_Q}.alpha": torch.ones(2)}),
        [f"has {TO_Q}.alpha of shape [2]"],
    ),
    "odd lengths": (
        lambda t: t.update({f"{TO_Q}.dora_scale": torch.ones(2, 64)}),
        [f"has {TO_Q}.dora_scale of shape [2, 64]"],
    ),
    "integers": (
        lambda t: t.update({f"{TO_Q}.lora_A.weight": torch.ones(3, 128, dtype=torch.int8)}),
        [f"has {TO_Q}.lora_A.weight as I8, no plain floating-point type"],
    ),
    "NaN": (
        lambda t: t[f"{TO_Q}.lora_A.weight"][1, 7].fill_(math.nan),
        [f"NaN or infinity in {TO_Q}"],
    ),
    "infinity": (
        lambda t: t[f"{TO_Q}.lora_B.weight"][1, 1].fill_(-math.inf),
        [f"NaN or infinity in {TO_Q}"],
    ),
    "an alpha of NaN": (
        lambda t: t.update({f"{TO_Q}.alpha": torch.tensor(math.nan)}),
        [f"NaN or infinity in {TO_Q}"],
    ),
    "two of one kind": (
        lambda t: t.update({f"{TO_Q}.lora_down.weight": torch.ones(3, 128)}),
        ["lora", "which the model has no layer for"],
    ),
    "two dialects": (
        lambda t: t.update(
            {
                f"{OTHER_TO_Q}.lora_down.weight": torch.ones(3, 128),
                f"{OTHER_TO_Q}.lora_up.weight": torch.ones(128, 3),
            }
        ),
        [OTHER_TO_Q, TO_Q, " for the same place"],
    ),
    "a table of other tokens": (
        lambda t: t.update(
            {
                f"text_encoder.{TABLE}.lora_embedding_A": torch.ones(1, 50),
                f"text_encoder.{TABLE}.lora_embedding_B": torch.ones(64, 1),
            }
        ),
        [f"has text_encoder.{TABLE}.lora_embedding_A of shape [50, 1] for a layer of"],
    ),
    "lengths of a table": (
        lambda t: t.update(
            {
                f"text_encoder.{TABLE}.lora_embedding_A": torch.ones(1, 716),
                f"text_encoder.{TABLE}.lora_embedding_B": torch.ones(64, 1),
                f"text_encoder.{TABLE}.lora_magnitude_vector": torch.ones(716),
            }
        ),
        [f"has text_encoder.{TABLE}.lora_magnitude_vector of shape [716] for a layer of"],
    ),
    "several faults": (
        lambda t: (t.pop(f"{TO_Q}.lora_A.weight"), t.update({"why": torch.ones(1)})),
        ["looks like one of diffusers, and has why, which", f"has but half of {TO_Q}"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_a_fault_is_refused_in_one_sentence_that_names_it(fault, made, whole, tmp_path):
    edit, words = FAULTS[fault]
    path = edited(made, tmp_path / "odd.safetensors", edit)
    with pytest.raises(Refusal) as caught:
        sd3min.load(whole, lora=path)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "looks like a LoRA of Flux"),
        (["lora_unet_input_blocks_1_1_proj_in.lora_down.weight"], "Stable Diffusion 1, 2 or XL"),
        (["transformer.transformer_blocks.0.attn.to_q.lokr_w1"], "looks like LoKr, which is not"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a"], "looks like LoHa, which is not"),
        (["joint_blocks.0.x_block.attn.qkv.diff"], "looks like whole differences, which are not"),
        ([], "holds no layers"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(names, said, whole, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(Refusal, match=said):
        sd3min.load(whole, lora=path)


@pytest.mark.parametrize("settings", ["{", "[1]", '{"transformer.alpha_pattern": {"(": 1}}'])
def test_damaged_settings_are_refused(settings, made, whole, tmp_path):
    path = tmp_path / "odd.safetensors"
    edited(made, path, lambda tensors: None, {"lora_adapter_metadata": settings})
    with pytest.raises(Refusal, match=r"the settings of the LoRA .* are damaged"):
        sd3min.load(whole, lora=path)


def test_a_damaged_or_missing_file_is_refused(whole, made, tmp_path):
    with pytest.raises(Refusal, match=r"the LoRA no.safetensors is not a file: pass the path"):
        sd3min.load(whole, lora="no.safetensors")
    path = tmp_path / "short.safetensors"
    path.write_bytes((made / "all.safetensors").read_bytes()[:5000])
    with pytest.raises(Refusal, match="truncated"):
        sd3min.load(whole, lora=path)
    with pytest.raises(Refusal, match="is given twice"):
        sd3min.load(whole, lora=[made / "all.safetensors", (made / "all.safetensors", 0.2)])
    with pytest.raises(Refusal, match="scale of nan is not a number"):
        sd3min.load(whole, lora=[(made / "all.safetensors", math.nan)])


@official
@pytest.mark.parametrize(
    "name", ["sd3_medium", "sd3.5_medium", "sd3.5_large", "sd3_medium_incl_clips_t5xxlfp16"]
)
def test_every_linear_of_an_official_file_is_known_by_kohyas_name(name, tmp_path):
    listed = files.manifests()[f"{name}.safetensors"]
    starts = {"mmdit": "unet", "clip_l": "te1", "clip_g": "te2", "t5": "te3"}
    shapes, keys = {}, {}
    for part, start in starts.items():
        own = {n.removeprefix(PREFIXES[part]): s for n, s in listed.items() if PREFIXES[part] in n}
        tables = ("embedding.weight", "shared.weight", "embed_tokens.weight", "bias.weight")
        for weight, shape in own.items():
            if weight.endswith(".weight") and len(shape) > 1 and not weight.endswith(tables):
                stem = f"lora_{start}_{weight.removesuffix('.weight').replace('.', '_')}"
                keys[f"{stem}.lora_down.weight"] = [1, math.prod(shape[1:])]
                keys[f"{stem}.lora_up.weight"] = [shape[0], 1]
        shapes |= {part: own} if own else {}
    depth, dual = (38, 0) if "large" in name else (24, 13 * (name == "sd3.5_medium"))
    blocks = 2 * 5 * depth - 3 + 2 * dual  # the last context has neither proj nor MLP
    linears = [key for key in keys if "lora_unet" in key and "down" in key]
    assert len(linears) == blocks + 8  # x, t, y and context embedders, and the final layer
    assert {key.rsplit(".", 2)[0] for key in keys} <= places(shapes).keys()
    path = files.sparse(tmp_path / "lora.safetensors", keys)
    read = lora.read(path, shapes)
    assert len(read.layers) == len(keys) / 2
    assert all(change.rows == layer.whole for layer, change in read)
