"""The page: what a visitor may set, and what becomes of it.

Nothing is kept between visitors: a drawing belongs to one visit, and goes with it.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import gradio as gr

from sd3min import flow
from sd3min.config import SIZE_STEP, Refusal
from sd3min.explorer import markup
from sd3min.explorer.look import theme
from sd3min.explorer.markup import COLUMNS, Look, Shown
from sd3min.explorer.recipe import as_command, as_python
from sd3min.explorer.studio import MOST_WAITING, Drawing, Glimpse, Studio
from sd3min.explorer.wanted import MOST_SEED, PROMPT, SEED, Wanted, words
from sd3min.parts import TITLES
from sd3min.probes.ablation import ENCODERS

HERE = Path(__file__).parent
SHARED: tuple[str, ...] = ("prompt", "seed", "width", "height", "init_image", "strength")
OWN: tuple[str, ...] = ("negative_prompt", "steps", "guidance_scale", "shift", "sampler", "dropped")
NO_COMMAND = "# No option of the command leaves a CLIP out: the Python above does."
KEPT = 3600  # seconds that a drawing outlives its visit at most
MOST_VISITS = 100

Values = Mapping[str, Any]


def wanted(shared: Values, own: Values) -> Wanted:
    """What one column asks for; an empty seed is a random one, an empty number the weights' own."""
    values = {**shared, **own, "dropped": tuple(own["dropped"] or ())}
    values["negative_prompt"] = own["negative_prompt"] or ""
    for name in ("guidance_scale", "shift", "strength"):
        values[name] = None if values[name] is None else float(values[name])
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(MOST_SEED)
    return Wanted(**values)


class Page:
    """The page of one model; its parts are attributes, so that what changes them can name them."""

    def __init__(self, studio: Studio, name: str, loaded: Values):
        """`name`: of the model; `loaded`: the arguments of `sd3min.load` that it came from."""
        self.studio, self.name, self.loaded = studio, name, loaded
        self.defaults = studio.pipe.defaults
        with gr.Blocks(
            title="sd3min", analytics_enabled=False, delete_cache=(KEPT, KEPT)
        ) as self.blocks:
            self.state = gr.State(None, time_to_live=KEPT)
            self.build()
            self.connect()

    def build(self) -> None:
        """Lay the parts out: the prompt above, the stage and the settings side by side below."""
        gr.HTML(markup.header(self.studio.pipe, self.name))
        with gr.Row(elem_id="ask"):
            opening = PROMPT if "path" not in self.loaded else ""
            hint = "What should the picture show?"
            self.prompt = gr.Textbox(
                opening, label="Prompt", placeholder=hint, elem_id="prompt", lines=1, max_lines=6
            )
            self.button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="stage", scale=3, min_width=280):
                self.build_stage()
            with gr.Column(elem_id="settings", scale=2, min_width=280):
                self.build_settings()

    def build_stage(self) -> None:
        """The pictures, the words, and what made them."""
        self.pictures = gr.HTML(markup.welcome(self.studio.pipe), elem_id="pictures")
        hint = markup.line(f"This page draws {self.studio.limits}.")
        self.status = gr.HTML(hint, elem_id="status")
        with gr.Column(visible=False, elem_id="inside") as self.inside:
            label = "Click a word to see where it was read"
            self.word = gr.Radio([], label=label, elem_id="words")
            with gr.Row(visible=False, elem_id="depth") as self.depth:
                whole: Any = {"minimum": 0, "maximum": 1, "value": 0, "step": 1, "buttons": []}
                self.layer = gr.Slider(label="Layer: all", elem_id="layer", **whole)
                self.step = gr.Slider(label="Step: all", elem_id="step", **whole)
            self.recipe = gr.HTML(elem_id="recipe", js_on_load=markup.COPY)

    def build_settings(self) -> None:
        """What both columns share, and what each has of its own."""
        defaults = self.defaults
        with gr.Row(elem_id="seeds"):
            self.seed = gr.Number(SEED, label="Seed", precision=0, elem_id="seed", min_width=80)
            self.dice = gr.Button("⚄ Another seed", elem_id="dice", min_width=80)
        with gr.Row():
            sides: Any = {"precision": 0, "step": SIZE_STEP, "min_width": 80}
            self.width = gr.Number(defaults.width, label="Width", elem_id="width", **sides)
            self.height = gr.Number(defaults.height, label="Height", elem_id="height", **sides)
        self.first = self.build_own()
        self.compare = gr.Checkbox(False, label="Compare with other settings", elem_id="compare")
        with gr.Column(visible=False, elem_id="other") as self.other:
            gr.HTML(markup.line("The same prompt, seed and size, with"))
            self.second = self.build_own()
        with gr.Accordion("Start from a picture", open=False, elem_id="start"):
            self.init_image = gr.Image(
                type="pil",
                sources=["upload", "clipboard"],
                show_label=False,
                height=180,
                buttons=[],
            )
            self.strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", buttons=[])

    def build_own(self) -> dict[str, Any]:
        """The settings of one column, by their names in a call."""
        defaults, own = self.defaults, dict[str, Any]()
        small: Any = {"min_width": 80}
        with gr.Row():
            own["steps"] = gr.Number(defaults.steps, label="Steps", precision=0, **small)
            scale = defaults.guidance_scale
            own["guidance_scale"] = gr.Number(scale, label="Guidance", step=0.5, **small)
            own["shift"] = gr.Number(defaults.shift, label="Shift", step=0.5, **small)
        names = list(flow.SAMPLERS)
        own["sampler"] = gr.Radio(names, value=names[0], label="Sampler")
        has_t5 = self.studio.pipe.text_encoders.has_t5
        encoders = [(TITLES[name], name) for name in ENCODERS if has_t5 or name != "t5"]
        own["dropped"] = gr.CheckboxGroup(encoders, label="Leave out")
        own["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=3)
        return own

    def connect(self) -> None:
        """Say what happens when."""
        shared = [getattr(self, name) for name in SHARED]
        columns = [column[name] for column in (self.first, self.second) for name in OWN]
        changed = [self.pictures, self.status, self.inside, self.word, self.depth, self.layer]
        changed += [self.step, self.recipe, self.state]
        asked: Any = {
            "fn": self.draw,
            "inputs": [self.compare, *shared, *columns],
            "outputs": changed,
            "show_progress": "hidden",
            "concurrency_id": "draw",
            "concurrency_limit": MOST_WAITING + 1,
            "trigger_mode": "once",
            "api_visibility": "private",
        }
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([self.button.click, self.prompt.submit], **asked)
        throw = f"() => Math.floor(Math.random() * {MOST_SEED})"
        self.dice.click(None, None, self.seed, js=throw, **quiet).then(**asked)
        self.compare.change(
            lambda on: gr.update(visible=on), self.compare, self.other, queue=False, **quiet
        )
        gr.on(
            [self.word.input, self.layer.input, self.step.input],
            self.look,
            [self.state, self.word, self.layer, self.step],
            [self.pictures, self.depth, self.layer, self.step],
            trigger_mode="always_last",
            concurrency_limit=4,
            **quiet,
        )

    def draw(self, compare: bool, *values: Any) -> Iterator[dict[Any, Any]]:
        """What changes on the page while pictures are drawn, and when they are."""
        shared = dict(zip(SHARED, values, strict=False))
        rest = values[len(SHARED) :]
        columns = [dict(zip(OWN, rest[i:], strict=False)) for i in (0, len(OWN))]
        columns = columns[: 2 if compare else 1]
        try:
            asked = [wanted(shared, columns[0])]
            shared["seed"] = asked[0].seed
            asked += [wanted(shared, own) for own in columns[1:]]
            for one in asked:
                one.check(self.studio.pipe, self.studio.limits)
            yield from self.drawn(asked)
        except Refusal as refusal:
            yield {self.status: markup.line(str(refusal), "refusal")}

    def drawn(self, asked: list[Wanted]) -> Iterator[dict[Any, Any]]:
        """The same, for what was checked."""
        drawings: list[Drawing] = []
        yield self.begun(asked)
        for column, one in zip(COLUMNS, asked, strict=False):
            for seen in self.studio.draw(one):
                if isinstance(seen, Drawing):
                    drawings.append(seen)
                    continue
                title = column if len(asked) > 1 else ""
                change = {self.status: markup.said(seen, title)}
                if isinstance(seen, Glimpse) and seen.picture:
                    change[self.pictures] = markup.formed(drawings, seen.picture)
                yield change
        yield self.finished(Shown(*drawings))

    def begun(self, asked: list[Wanted]) -> dict[Any, Any]:
        """What changes before anything is drawn: words and recipe are those of what was asked."""
        found = words(asked[0].prompt)
        choices = [("whole picture", -1), *((word.text, i) for i, word in enumerate(found))]
        return {
            self.inside: gr.update(visible=True),
            self.word: gr.update(choices=choices, value=-1, interactive=False),
            self.depth: gr.update(visible=False),
            self.recipe: markup.recipe(
                [as_python(one, self.defaults, self.loaded) for one in asked],
                [as_command(one, self.defaults, self.loaded) or NO_COMMAND for one in asked],
            ),
            self.state: None,
        }

    def finished(self, shown: Shown) -> dict[Any, Any]:
        """What changes when all is drawn."""
        steps = max(len(drawing.heat) for drawing in shown.drawings)
        layers = shown.first.heat.shape[1]
        return {
            self.pictures: markup.stage(shown, Look()),
            self.status: markup.done(shown),
            self.word: gr.update(interactive=True),
            self.layer: gr.update(maximum=layers, value=0, label="Layer: all"),
            self.step: gr.update(maximum=steps, value=0, label="Step: all"),
            self.state: shown,
        }

    def look(self, shown: Shown | None, word: int | None, layer: int, step: int) -> list[Any]:
        """The pictures, or a word's heat over them; 0 stands for all layers and all steps."""
        if shown is None:
            return [gr.skip()] * 4
        is_word = word is not None and 0 <= word < len(shown.first.words)
        look = Look(*(word, layer - 1 if layer else None, step - 1 if step else None))
        names = [f"{n}: {i}" if i else f"{n}: all" for n, i in (("Layer", layer), ("Step", step))]
        return [
            markup.stage(shown, look if is_word else Look()),
            gr.update(visible=is_word),
            *(gr.update(label=name) for name in names),
        ]

    def launch(self, host: str, port: int | None, open_browser: bool) -> str:
        """Serve the page from another thread; returns its address. Raises Refusal where the port is
        taken.
        """
        self.blocks.queue(max_size=MOST_WAITING * 4)
        try:
            _, address, _ = self.blocks.launch(
                server_name=host,
                server_port=port,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                footer_links=[],
                ssr_mode=False,
                state_session_capacity=MOST_VISITS,
                max_file_size="20mb",
                favicon_path=HERE / "icon.svg",
                theme=theme(),
                css_paths=HERE / "style.css",
            )
        except OSError:
            at = f"--host {host}" + (f" --port {port}" if port else "")
            raise Refusal(f"{at} cannot be listened on: pass another --port or --host") from None
        return address
