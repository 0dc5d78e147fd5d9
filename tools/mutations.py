"""Break the package on purpose and see whether the tests notice: python tools/mutations.py.

Each mutation is a mistake that an implementation of Stable Diffusion 3 can make and still draw
pictures. It is made in a copy, one at a time, and the tests that should notice are run there. The
exit code is 1 where a mutation survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("sd3min", "tests", "pyproject.toml", "README.md")
LINKED = ("weights",)  # read only
SMALL = ("-k", "not sd3-tiny")  # small random models notice as much, and sooner
PICTURES = ("test_pipeline.py", "parity/test_pictures.py")
TESTS = {  # by the file that is changed; those that are quick come first
    "mmdit.py": ("test_mmdit.py", "parity/test_mmdit.py"),
    "autoencoder.py": ("test_autoencoder.py", "parity/test_autoencoder.py"),
    "text_encoders.py": ("test_text_encoders.py", "parity/test_text_encoders.py"),
    "flow.py": ("test_flow.py", *PICTURES),
    "settings.py": ("test_settings.py", *PICTURES),
    "pipeline.py": PICTURES,
}


class Mutation(NamedTuple):
    """A mistake: what it is, and the text of a file that another one replaces."""

    file: str
    title: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "mmdit.py",
        "timestep: sine before cosine",
        "[angles.cos(), angles.sin()]",
        "[angles.sin(), angles.cos()]",
    ),
    Mutation(
        "mmdit.py",
        "timestep: frequencies one place off",
        "torch.arange(half, device=timesteps.device).float() / half",
        "torch.arange(half, device=timesteps.device).float() / (half - 1)",
    ),
    Mutation(
        "mmdit.py",
        "positions: row before column",
        "torch.cat([columns, rows], dim=-1)",
        "torch.cat([rows, columns], dim=-1)",
    ),
    Mutation(
        "mmdit.py",
        "positions: cosine before sine",
        "torch.cat([angles.sin(), angles.cos()], dim=-1)\n    columns",
        "torch.cat([angles.cos(), angles.sin()], dim=-1)\n    columns",
    ),
    Mutation("mmdit.py", "positions: no offset to the centre", "- (grid - side) / 2)", ")"),
    Mutation(
        "mmdit.py", "positions: the pretraining grid's spacing", " * pretrained / resolution", ""
    ),
    Mutation(
        "mmdit.py",
        "positions: corner crop for centre crop",
        "top, left = (grid - h) // 2, (grid - w) // 2",
        "top, left = 0, 0",
    ),
    Mutation(
        "mmdit.py",
        "positions: height and width of the crop swapped",
        "top, left = (grid - h) // 2, (grid - w) // 2",
        "top, left = (grid - w) // 2, (grid - h) // 2",
    ),
    Mutation(
        "mmdit.py", "modulation: scale for 1 + scale", "* (1 + scale) + shift", "* scale + shift"
    ),
    Mutation(
        "mmdit.py",
        "modulation: scaled after the shift",
        "F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift",
        "(F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS) + shift) * (1 + scale)",
    ),
    Mutation(
        "mmdit.py",
        "modulation: no SiLU",
        "nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))",
        "nn.Sequential(nn.Identity(), nn.Linear(width, parts * width))",
    ),
    Mutation("mmdit.py", "normalisation: epsilon 1e-5", "NORM_EPS = 1e-6", "NORM_EPS = 1e-5"),
    Mutation(
        "mmdit.py",
        "condition: pooled text forgotten",
        "cond = time + self.y_embedder(pooled)",
        "cond = time + 0 * self.y_embedder(pooled)",
    ),
    Mutation(
        "mmdit.py",
        "block: shift and scale swapped",
        "shift, scale, *rest = self",
        "scale, shift, *rest = self",
    ),
    Mutation(
        "mmdit.py",
        "block: gate of the attention after the MLP's shift",
        "gate, shift_mlp, scale_mlp, gate_mlp = rest",
        "shift_mlp, gate, scale_mlp, gate_mlp = rest",
    ),
    Mutation(
        "mmdit.py",
        "block: shift and scale of the MLP swapped",
        "gate, shift_mlp, scale_mlp, gate_mlp = rest",
        "gate, scale_mlp, shift_mlp, gate_mlp = rest",
    ),
    Mutation(
        "mmdit.py",
        "block: gates swapped",
        "gate, shift_mlp, scale_mlp, gate_mlp = rest",
        "gate_mlp, shift_mlp, scale_mlp, gate = rest",
    ),
    Mutation(
        "mmdit.py",
        "block: attention's residual without its gate",
        "tokens = tokens + gate * self.attn.proj(attended)",
        "tokens = tokens + self.attn.proj(attended)",
    ),
    Mutation("mmdit.py", "block: exact GELU for its tanh form", 'nn.GELU("tanh")', "nn.GELU()"),
    Mutation(
        "mmdit.py",
        "attention: q and k not normalised",
        "return self.ln_q(q), self.ln_k(k), v",
        "return q, k, v",
    ),
    Mutation(
        "mmdit.py",
        "attention: q and k normalised with each other's weights",
        "return self.ln_q(q), self.ln_k(k), v",
        "return self.ln_k(q), self.ln_q(k), v",
    ),
    Mutation(
        "mmdit.py",
        "attention: channels of a head interleaved",
        '"b n (three a e) -> three b a n e"',
        '"b n (three e a) -> three b a n e"',
    ),
    Mutation(
        "mmdit.py",
        "attention: keys before queries",
        "        q, k, v = rearrange(",
        "        k, q, v = rearrange(",
    ),
    Mutation(
        "mmdit.py",
        "joint attention: image before text in the split",
        "to_context, to_image = attended.split([context.shape[1], image.shape[1]], dim=1)",
        "to_image, to_context = attended.split([image.shape[1], context.shape[1]], dim=1)",
    ),
    Mutation(
        "mmdit.py",
        "joint attention: causal",
        "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(q, k, v, is_causal=True)",
    ),
    Mutation(
        "mmdit.py",
        "dual attention: reads the joint attention's modulation",
        "shift, scale, gate = rest[-3:]",
        "shift, scale, gate = *self.adaLN_modulation(cond)[:, None].chunk(9, -1)[:2], rest[-1]",
    ),
    Mutation(
        "mmdit.py",
        "dual attention: its parts before the MLP's",
        "        shift, scale, gate = rest[-3:]",
        "        rest = [rest[0], *rest[4:], *rest[1:4]]\n        shift, scale, gate = rest[-3:]",
    ),
    Mutation(
        "mmdit.py",
        "dual attention: its residual after the MLP",
        "return super().close(tokens + rest[-1], attended, rest[:-1])",
        "return super().close(tokens, attended, rest[:-1]) + rest[-1]",
    ),
    Mutation(
        "mmdit.py",
        "last block: shift and scale of the text swapped",
        "shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)\n"
        "        return self.attn",
        "scale, shift = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)\n"
        "        return self.attn",
    ),
    Mutation(
        "mmdit.py",
        "final layer: shift and scale swapped",
        "shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)\n"
        "        return self.linear",
        "scale, shift = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)\n"
        "        return self.linear",
    ),
    Mutation(
        "mmdit.py",
        "unpatchify: channel as the slowest axis",
        '"b (h w) (p q c) -> b c (h p) (w q)"',
        '"b (h w) (c p q) -> b c (h p) (w q)"',
    ),
    Mutation(
        "mmdit.py",
        "unpatchify: patches transposed",
        '"b (h w) (p q c) -> b c (h p) (w q)"',
        '"b (h w) (q p c) -> b c (h p) (w q)"',
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: latent shift forgotten in decode",
        "latents / SCALE + SHIFT",
        "latents / SCALE",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: latent scale inverted in decode",
        "latents / SCALE + SHIFT",
        "latents * SCALE + SHIFT",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: shift undone before the scale",
        "latents / SCALE + SHIFT",
        "(latents + SHIFT) / SCALE",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: latent shift forgotten in the mode",
        "return (mean - SHIFT) * SCALE",
        "return mean * SCALE",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: Stable Diffusion 1's latent scale",
        "SCALE = 1.5305",
        "SCALE = 0.18215",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: digits of the latent shift swapped",
        "SHIFT = 0.0609",
        "SHIFT = 0.0690",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: posterior mean for a sample",
        "torch.exp(0.5 * logvar) * noise",
        "0 * noise",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: variance for deviation",
        "torch.exp(0.5 * logvar) * noise",
        "torch.exp(logvar) * noise",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: log variance not clamped",
        "logvar.clamp(-30.0, 20.0)",
        "logvar",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: padded to the left and above",
        "F.pad(x, (0, 1, 0, 1))",
        "F.pad(x, (1, 0, 1, 0))",
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: group norm's default epsilon",
        "nn.GroupNorm(32, width, eps=1e-6)",
        "nn.GroupNorm(32, width)",
    ),
    Mutation(
        "autoencoder.py", "autoencoder: bilinear upsampling", 'mode="nearest"', 'mode="bilinear"'
    ),
    Mutation(
        "autoencoder.py",
        "autoencoder: attention without its residual",
        "return x + self.proj_out(",
        "return self.proj_out(",
    ),
    Mutation(
        "text_encoders.py",
        "text: last CLIP layer for the second-last",
        "outputs.hidden_states[-2]",
        "outputs.hidden_states[-1]",
    ),
    Mutation(
        "text_encoders.py",
        "text: final norm on the second-last layer",
        "outputs.hidden_states[-2]",
        "model.text_model.final_layer_norm(outputs.hidden_states[-2])",
    ),
    Mutation(
        "text_encoders.py",
        "text: CLIP-G padded with the end of the text",
        "return padded.input_ids",
        "ids, end = padded.input_ids, tokenizer.eos_token_id\n"
        '    return ids.masked_fill(padded.attention_mask == 0, end) if name == "CLIP-G" else ids',
    ),
    Mutation(
        "text_encoders.py",
        "text: CLIP-L padded with id 0",
        "return padded.input_ids",
        "ids = padded.input_ids\n"
        '    return ids.masked_fill(padded.attention_mask == 0, 0) if name == "CLIP-L" else ids',
    ),
    Mutation(
        "text_encoders.py",
        "text: CLIP-L's pooled vector projected",
        "torch.cat([l_pooled, g_pooled], dim=-1)",
        "torch.cat([l_pooled @ torch.randn(2 * [l_pooled.shape[-1]]).to(l_pooled), g_pooled], -1)",
    ),
    Mutation(
        "text_encoders.py",
        "text: pooled vectors swapped",
        "torch.cat([l_pooled, g_pooled], dim=-1)",
        "torch.cat([g_pooled, l_pooled], dim=-1)",
    ),
    Mutation(
        "text_encoders.py",
        "text: CLIP-G left of CLIP-L",
        "torch.cat([l_rows, g_rows], dim=-1)",
        "torch.cat([g_rows, l_rows], dim=-1)",
    ),
    Mutation(
        "text_encoders.py",
        "text: zeros left of the CLIPs",
        "(0, self.context_width - clip_rows.shape[-1])",
        "(self.context_width - clip_rows.shape[-1], 0)",
    ),
    Mutation(
        "text_encoders.py",
        "text: T5 above the CLIPs",
        "torch.cat([clip_rows, t5_rows], dim=1)",
        "torch.cat([t5_rows, clip_rows], dim=1)",
    ),
    Mutation(
        "text_encoders.py",
        "text: T5's padding masked",
        "self.t5(ids).last_hidden_state",
        "self.t5(ids, attention_mask=(ids != 0).long()).last_hidden_state",
    ),
    Mutation(
        "text_encoders.py",
        "text: CLIP's padding masked",
        "model(ids, output_hidden_states=True)",
        "model(ids, attention_mask=(ids != ids[:, -1:]).long(), output_hidden_states=True)",
    ),
    Mutation(
        "text_encoders.py",
        "text: length of T5 ignored",
        "t5_length or self.t5_length",
        "self.t5_length",
    ),
    Mutation(
        "text_encoders.py",
        "text: no rows where T5 was left out",
        "torch.zeros(len(prompts), length, self.context_width)",
        "torch.zeros(len(prompts), 0, self.context_width)",
    ),
    Mutation(
        "text_encoders.py",
        "text: one activation for both CLIPs",
        '"clip_l": "quick_gelu"',
        '"clip_l": "gelu"',
    ),
    Mutation(
        "text_encoders.py",
        "text: ReLU in T5",
        'feed_forward_proj="gated-gelu"',
        'feed_forward_proj="gated-relu"',
    ),
    Mutation(
        "text_encoders.py",
        "text: CLIP pools at a fixed id",
        "eos_token_id=2,",
        "eos_token_id=config.vocabulary - 2,",
    ),
    Mutation(
        "flow.py",
        "flow: data and noise swapped",
        "(1 - t) * data + t * noise",
        "t * data + (1 - t) * noise",
    ),
    Mutation("flow.py", "flow: target's sign", "return noise - data", "return data - noise"),
    Mutation(
        "flow.py",
        "flow: sign of the denoised latents",
        "latents - t * velocity",
        "latents + t * velocity",
    ),
    Mutation(
        "flow.py",
        "flow: shift inverted",
        "shift * t / (1 + (shift - 1) * t)",
        "t / (shift - (shift - 1) * t)",
    ),
    Mutation(
        "flow.py",
        "flow: single shift for the official double one",
        "first, last = shift_times(np.array([1.0, 1 / TRAINED_TIMES], dtype=np.float32), shift)",
        "first, last = np.array([1.0, 1 / TRAINED_TIMES], dtype=np.float32)",
    ),
    Mutation(
        "flow.py",
        "flow: own times not shifted",
        "torch.tensor([*shift_times(times, shift), 0.0]",
        "torch.tensor([*(shift_times(times, shift if isinstance(steps, int) else 1)), 0.0]",
    ),
    Mutation(
        "flow.py",
        "flow: guidance in the wrong direction",
        "negative + scale * (positive - negative)",
        "negative - scale * (positive - negative)",
    ),
    Mutation(
        "flow.py",
        "flow: guidance counted from the prompt",
        "negative + scale * (positive - negative)",
        "positive + scale * (positive - negative)",
    ),
    Mutation(
        "flow.py",
        "flow: halves of the doubled batch swapped",
        "negative, positive = velocity",
        "positive, negative = velocity",
    ),
    Mutation(
        "flow.py",
        "flow: guidance below 1 extrapolates backwards",
        "    if scale <= 1:",
        "    if scale == 1:",
    ),
    Mutation(
        "flow.py",
        "flow: velocity asked at the end of the step",
        "v = velocity(latents, t)",
        "v = velocity(latents, t_next)",
    ),
    Mutation(
        "flow.py",
        "flow: latents not kept in float32",
        "(latents.float() + (t_next - t) * velocity).float()",
        "(latents + (t_next - t) * velocity).to(velocity.dtype)",
    ),
    Mutation(
        "pipeline.py",
        "pipeline: time in 0 to 1 for 0 to 1000",
        "(flow.TRAINED_TIMES * t).expand",
        "t.expand",
    ),
    Mutation(
        "pipeline.py",
        "pipeline: prompts before negative prompts",
        "negatives + prompts if guided",
        "prompts + negatives if guided",
    ),
    Mutation(
        "pipeline.py",
        "pipeline: negative prompt ignored",
        "negatives + prompts if guided",
        '[""] * len(negatives) + prompts if guided',
    ),
    Mutation(
        "pipeline.py",
        "pipeline: equal prompts put back in the wrong places",
        "[unique.index(text) for text in prompts]",
        "[i % len(unique) for i, _ in enumerate(prompts)]",
    ),
    Mutation(
        "pipeline.py",
        "pipeline: length of T5 not passed on",
        "self.text_encoders.encode(unique, t5_length)",
        "self.text_encoders.encode(unique)",
    ),
    Mutation(
        "pipeline.py",
        "pipeline: height and width swapped",
        "h, w = settings.height // LATENT_DOWNSCALING, settings.width // LATENT_DOWNSCALING",
        "w, h = settings.height // LATENT_DOWNSCALING, settings.width // LATENT_DOWNSCALING",
    ),
    Mutation(
        "pipeline.py",
        "pipeline: one generator for the whole batch",
        "for value in seeds]",
        "for value in seeds][:1] * len(seeds)",
    ),
    Mutation("pipeline.py", "pipeline: floor for round", ".round().byte()", ".byte()"),
    Mutation(
        "pipeline.py",
        "pipeline: pixels wrap around",
        "(images / 2 + 0.5).clamp(0, 1)",
        "(images / 2 + 0.5)",
    ),
    Mutation(
        "pipeline.py",
        "image-to-image: posterior mean for a sample",
        "posterior_sample(*moments, generator) for generator",
        "posterior_sample(moments[0], moments[1] - 100, generator) for generator",
    ),
    Mutation(
        "pipeline.py",
        "image-to-image: flow's noise drawn before the posterior's",
        "samples = [posterior_sample(*moments, generator) for generator in generators]",
        "early = [torch.randn(1, LATENT_CHANNELS, h, w, generator=g) for g in generators]\n"
        "            samples = [posterior_sample(*moments, one) for one in generators]\n"
        "            return flow.interpolate(torch.cat(samples).float(), torch.cat(early), t)",
    ),
    Mutation(
        "pipeline.py",
        "image-to-image: pixels from 0 to 1",
        'return 2 * rearrange(pixels, "h w c -> 1 c h w") - 1',
        'return rearrange(pixels, "h w c -> 1 c h w")',
    ),
    Mutation(
        "pipeline.py",
        "image-to-image: resized without Lanczos",
        "Image.Resampling.LANCZOS",
        "Image.Resampling.BILINEAR",
    ),
    Mutation(
        "settings.py",
        "image-to-image: started one step late",
        "skipped = int(steps - min(steps * self.strength, steps)) if partly else 0",
        "skipped = int(steps - min(steps * self.strength, steps)) + 1 if partly else 0",
    ),
    Mutation(
        "settings.py",
        "image-to-image: steps rounded as the official code rounds them",
        "skipped = int(steps - min(steps * self.strength, steps)) if partly else 0",
        "skipped = steps - int(steps * self.strength) if partly else 0",
    ),
    Mutation(
        "settings.py",
        "image-to-image: strength counted from the other end",
        "skipped = int(steps - min(steps * self.strength, steps)) if partly else 0",
        "skipped = int(steps * self.strength) if partly else 0",
    ),
    Mutation(
        "settings.py",
        "settings: one seed for all pictures",
        "[seed + i for i in range(count)]",
        "[seed for i in range(count)]",
    ),
    Mutation(
        "settings.py",
        "settings: repeats before prompts",
        "[pair for pair in zip(prompts, negatives, strict=True) for _ in range(num_images)]",
        "[pair for _ in range(num_images) for pair in zip(prompts, negatives, strict=True)]",
    ),
    Mutation(
        "settings.py", "settings: schedule ignored", "self.shift, self.schedule)", "self.shift)"
    ),
    Mutation(
        "settings.py",
        "settings: defaults of the weights above the caller's",
        "dataclasses.asdict(defaults) | given",
        "given | dataclasses.asdict(defaults)",
    ),
]


def copy_project(folder: Path) -> None:
    """Copy what the tests need, and link what they only read."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)


def existing(folder: Path, files: Iterable[str]) -> list[str]:
    """The test files of the mutated files, each once."""
    tests = dict.fromkeys(f"tests/{test}" for file in files for test in TESTS[file])
    return [test for test in tests if (folder / test).exists()]


def first_failure(folder: Path, tests: Sequence[str]) -> str:
    """Run tests in a copy; the name of the first that fails, or nothing."""
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *SMALL, *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed):
        sys.exit(f"the tests {', '.join(tests)} did not run:\n{done.stdout}{done.stderr}")
    return failed[1] if failed else ""


def mutate(folder: Path, mutation: Mutation) -> str:
    """Make one mistake in a copy, run its tests, and undo it; the name of the first that fails."""
    path = folder / "sd3min" / mutation.file
    right = path.read_text()
    path.write_text(right.replace(mutation.old, mutation.new))
    try:
        return first_failure(folder, existing(folder, [mutation.file]))
    finally:
        path.write_text(right)


def check_texts(folder: Path, mutations: Sequence[Mutation]) -> None:
    """Stop where the text that a mutation replaces is not in its file exactly once."""
    for mutation in mutations:
        found = (folder / "sd3min" / mutation.file).read_text().count(mutation.old)
        if found != 1:
            sys.exit(f"{mutation.title}: found {found} times in {mutation.file}: {mutation.old}")


def main() -> None:
    """Check that the tests pass as they are, then print what catches each mutation."""
    parser = argparse.ArgumentParser(description="Do the tests notice mistakes?")
    parser.add_argument("--only", default="", help="those whose file or title contains this text")
    only = parser.parse_args().only
    mutations = [made for made in MUTATIONS if only in f"{made.file} {made.title}"]
    if not mutations:
        sys.exit(f"no mutation's file or title contains {only!r}")
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_project(folder)
        check_texts(folder, mutations)
        tests = existing(folder, [mutation.file for mutation in mutations])
        if failed := first_failure(folder, tests):
            sys.exit(f"{failed} fails without any mutation")
        for mutation in mutations:
            start = time.perf_counter()
            caught = mutate(folder, mutation)
            seconds = time.perf_counter() - start
            survivors += not caught
            row = f"{mutation.file:17} {mutation.title:62} {seconds:4.0f} s  "
            print(row + (caught or "SURVIVED"), flush=True)
    print(f"\n{len(mutations)} mutations, {survivors} survived")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
