"""The page of `sd3min explore`: the functions behind it, and the page in a real browser."""

import base64
import inspect
import io
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image

from sd3min import cli, loading, record
from sd3min.config import SD3_MEDIUM, Defaults, Refusal
from sd3min.explorer import heat, markup, recipe, studio, wanted
from sd3min.explorer.commands import given_model
from sd3min.explorer.studio import Drawing, Glimpse, Studio, Waiting
from sd3min.explorer.wanted import Limits, Wanted
from sd3min.pipeline import Pipeline
from sd3min.probes.ablation import without_encoder
from sd3min.probes.attention import attention

CHROMIUM = shutil.which("chromium")
WAIT = 120_000  # milliseconds that a loaded machine may take
THING = re.compile(r"\b(red|green|blue)\s+(\w+)")  # of a prompt: a colour, and what has it


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("small"))


@pytest.fixture
def quiet_studio(pipe):
    made = Studio(pipe)
    yield made
    made.worker.shutdown()


@pytest.fixture(scope="module")
def tiny():
    return loading.load()


def drawn(made, asked):
    """The steps of a run, and its drawing."""
    *steps, last = made.draw(asked)
    assert isinstance(last, Drawing)
    return steps, last


ASKED = Wanted("a red circle above a red square", 5, steps=3, width=48, height=64)


def test_a_watched_picture_is_the_picture_itself(pipe, quiet_studio):
    _, drawing = drawn(quiet_studio, ASKED)
    (plain,) = pipe(**ASKED.call(), progress=False)
    assert drawing.picture.tobytes() == plain.tobytes()
    assert drawing.picture.info == plain.info


def test_every_step_shows_what_it_points_at(pipe, quiet_studio):
    steps, drawing = drawn(quiet_studio, ASKED)
    assert [(seen.step, seen.steps) for seen in steps] == [(1, 3), (2, 3), (3, 3)]
    times = [seen.t for seen in steps]
    assert times[0] == 1 and times == sorted(times, reverse=True)
    assert steps[0].picture.size == (48, 64)
    if steps[-1].picture:  # Euler's last step ends where it points
        assert steps[-1].picture.tobytes() == drawing.picture.tobytes()


def test_previews_take_a_share_of_the_time_at_most(quiet_studio, monkeypatch):
    monkeypatch.setattr(studio, "PREVIEW_SHARE", 0.0)
    steps, _ = drawn(quiet_studio, ASKED)
    assert [seen.picture is None for seen in steps] == [False, True, True]


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_heat_is_the_mean_share_over_heads(pipe, quiet_studio, scale):
    asked = Wanted("a red circle on white", 5, steps=3, width=48, height=64, guidance_scale=scale)
    _, drawing = drawn(quiet_studio, asked)
    call = asked.call()
    _, seen = attention(pipe, call.pop("prompt"), ["red", "white"], **call)
    for number, word in ((1, "red"), (4, "white")):
        assert drawing.words[number].text == word
        expected = seen.heat(word).mean("picture", "head").values
        torch.testing.assert_close(
            drawing.heat[:, :, number].float(), expected, rtol=2e-3, atol=1e-5
        )  # of float16
        torch.testing.assert_close(
            heat.heat(drawing, number, layer=1, step=2), expected[2, 1], rtol=2e-3, atol=1e-5
        )
        torch.testing.assert_close(
            heat.heat(drawing, number), expected.mean(dim=(0, 1)), rtol=2e-3, atol=1e-5
        )


def test_a_word_that_is_there_twice_is_two_words(quiet_studio):
    _, drawing = drawn(quiet_studio, ASKED)
    assert [word.text for word in drawing.words] == ASKED.prompt.split()
    first, second = (heat.heat(drawing, i) for i in (1, 5))
    assert (first - second).abs().max() > 1e-4


def test_words_are_those_that_a_reader_sees():
    found = wanted.words("L'été, a well-known cat's “hat”: 猫 2!")
    assert [word.text for word in found] == ["L'été", "a", "well-known", "cat's", "hat", "猫", "2"]
    assert all("L'été, a well-known cat's “hat”: 猫 2!"[w.start : w.end] == w.text for w in found)


@pytest.mark.parametrize("prompt", ["", "?!"])
def test_a_prompt_without_words_is_drawn(quiet_studio, prompt):
    _, drawing = drawn(quiet_studio, Wanted(prompt, 1, steps=2))
    assert drawing.words == [] and drawing.heat.shape[2] == 0


def test_large_maps_are_pooled_and_keep_their_mean():
    maps = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    small_maps = studio.cells(maps).float()
    assert small_maps.shape == (2, 3, 32, 32)
    torch.testing.assert_close(
        small_maps.mean(dim=(2, 3)), maps.mean(dim=(2, 3)), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        small_maps[0, 0, 3, 5], maps[0, 0, 9:12, 10:12].mean(), rtol=1e-3, atol=0
    )


def test_the_map_is_warmest_where_the_word_was_read_most():
    values = torch.zeros(4, 6)
    values[1, 4] = 3.0
    shown = heat.over(Image.new("RGB", (96, 64), "gray"), values)
    assert shown.size == (480, 320)
    light = np.asarray(shown.convert("L"), dtype=float)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert (y // 80, x // 80) == (1, 4)
    assert light[1 * 80 + 40, 4 * 80 + 40] > 200 > 100 > light[300, 40]


@pytest.mark.parametrize("dropped", [("clip_l",), ("clip_g", "t5")])
def test_dropped_encoders_say_nothing_and_leave_no_record(pipe, quiet_studio, dropped):
    asked = Wanted("a red circle", 5, steps=2, dropped=dropped)
    _, drawing = drawn(quiet_studio, asked)
    with without_encoder(pipe, *dropped):
        (expected,) = pipe(**asked.call(), progress=False)
    assert drawing.picture.tobytes() == expected.tobytes()
    assert drawing.picture.info == {}
    _, whole = drawn(quiet_studio, Wanted("a red circle", 5, steps=2))
    assert drawing.picture.tobytes() != whole.picture.tobytes()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"steps": 101},
            "101 steps are beyond this page: ask for at most 100 steps and 192",
        ),
        ({"width": 208}, "pass at most 192 pixels a side"),
        ({"width": 60}, "width 60 is not a multiple of 16 pixels; the nearest is 64"),
        ({"steps": 0}, "steps 0 is not a whole number from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan is not a number"),
        ({"seed": -1}, "seed -1 is not a whole number"),
        ({"sampler": "heun"}, "sampler heun is not one of euler, dpmpp_2m"),
    ],
)
def test_what_makes_no_sense_or_goes_too_far_is_refused(quiet_studio, change, sentence):
    with pytest.raises(Refusal, match=re.escape(sentence)):
        next(quiet_studio.draw(Wanted(**{"prompt": "a red circle", "seed": 1} | change)))
    assert quiet_studio.asked == []


def test_limits_hold_the_size_of_the_model_itself():
    for side, steps, most in ((64, 20, (100, 512)), (1024, 150, (150, 1024))):
        defaults = Defaults(width=side, height=side, steps=steps)
        assert Limits.of(SD3_MEDIUM, defaults) == most


def test_a_size_beyond_the_page_is_refused_though_the_model_could(tiny):
    limits = Limits(100, 32)
    with pytest.raises(Refusal, match="32x48 is beyond this page: ask for at most 100 steps"):
        Wanted("a red circle", 1, width=32, height=48).check(tiny, limits)
    Wanted("a red circle", 1, width=32, height=32).check(tiny, limits)


class Held(Pipeline):
    """A pipeline whose steps wait until they are let go, and that counts who is inside."""

    def __init__(self, pipe):
        super().__init__(pipe.mmdit, pipe.autoencoder, pipe.text_encoders, pipe.defaults)
        self.go, self.inside, self.most, self.steps = threading.Semaphore(0), 0, 0, 0

    def __call__(self, *args, on_step, **kwargs):
        self.inside += 1
        self.most = max(self.most, self.inside)

        def held(step):
            assert self.go.acquire(timeout=60)
            self.steps += 1
            on_step(step)

        try:
            return super().__call__(*args, on_step=held, **kwargs)
        finally:
            self.inside -= 1


def test_two_visitors_are_served_in_turn_and_each_gets_their_own(pipe):
    held = Held(pipe)
    made = Studio(held)
    asked = [Wanted("a red circle", seed, steps=3) for seed in (1, 2)]
    first, second = (made.draw(one) for one in asked)
    held.go.release()
    assert isinstance(next(first), Glimpse)
    assert next(second) == Waiting(1)
    results = {}

    def read(name, run):
        *_, results[name] = run

    readers = [threading.Thread(target=read, args=pair) for pair in ((2, second), (1, first))]
    for reader in readers:
        reader.start()
    held.go.release(20)
    for reader in readers:
        reader.join(60)
    for one in asked:
        (expected,) = pipe(**one.call(), progress=False)
        assert results[one.seed].picture.tobytes() == expected.tobytes()
        assert results[one.seed].wanted == one
    assert held.most == 1
    made.worker.shutdown()


def test_who_leaves_in_mid_picture_takes_the_run_along(pipe):
    held = Held(pipe)
    made = Studio(held)
    run = made.draw(Wanted("a red circle", 1, steps=50))
    held.go.release()
    next(run)
    run.close()
    held.go.release(60)
    made.worker.submit(int).result(60)
    assert made.asked == []
    assert held.steps < 50
    _, drawing = drawn(made, Wanted("a red circle", 1, steps=2))
    assert drawing.heat.shape[0] == 2
    hooks = [m for m in pipe.mmdit.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    made.worker.shutdown()


def test_too_many_at_once_are_refused(pipe, monkeypatch):
    monkeypatch.setattr(studio, "MOST_WAITING", 1)
    held = Held(pipe)
    made = Studio(held)
    run = made.draw(Wanted("a red circle", 1, steps=2))
    held.go.release(10)
    next(run)
    made.asked.append(studio.Run())
    with pytest.raises(Refusal, match="asked for already: try again"):
        next(made.draw(Wanted("a red circle", 2, steps=2)))
    made.asked.pop()
    assert isinstance(list(run)[-1], Drawing)
    made.worker.shutdown()


def test_an_error_in_a_run_reaches_its_reader_and_the_next_run_works(pipe):
    class Broken(Held):
        def __call__(self, *args, **kwargs):
            raise RuntimeError("broken")

    made = Studio(Broken(pipe))
    with pytest.raises(RuntimeError, match="broken"):
        list(made.draw(Wanted("a red circle", 1, steps=2)))
    assert made.asked == []
    made.pipe = pipe
    drawn(made, Wanted("a red circle", 1, steps=2))
    made.worker.shutdown()


def test_what_was_cut_of_a_prompt_is_told(quiet_studio):
    long = " ".join(["a red circle above a blue square"] * 5)
    _, drawing = drawn(quiet_studio, Wanted(long, 1, steps=1))
    assert any("did not see" in text for text in drawing.warnings)
    assert not drawing.heat[:, :, -1].any()
    last = markup.Look(len(drawing.words) - 1)
    assert "“square” was cut off" in markup.stage(markup.Shown(drawing), last)
    assert "did not see" in markup.done(markup.Shown(drawing))


def test_a_saved_picture_carries_its_record(quiet_studio):
    _, drawing = drawn(quiet_studio, ASKED)
    picture = decoded(markup.data_address(drawing.picture))
    assert picture.tobytes() == drawing.picture.tobytes()
    made = record.parse(picture.info[record.KEY], "the page")
    assert made.call["prompt"] == ASKED.prompt and made.call["steps"] == 3


def test_nothing_that_is_typed_becomes_html(quiet_studio):
    asked = Wanted('<img src=x onerror="alert(1)">', 1, steps=1)
    _, drawing = drawn(quiet_studio, asked)
    shown = markup.Shown(drawing)
    text = markup.stage(shown, markup.Look()) + markup.done(shown)
    text += markup.stage(shown, markup.Look(0)) + markup.said(Glimpse(1, 2, 0.5), "<b>")
    text += markup.recipe([recipe.as_python(asked, small.DEFAULTS, {})], [asked.prompt])
    assert "onerror=" not in re.sub(r"&[a-z#0-9]+;[^<>]*", "", text)
    assert "<b>" not in text


def test_two_drawings_are_shown_with_their_difference(quiet_studio):
    pair = [drawn(quiet_studio, Wanted("a red circle", 5, steps=n))[1] for n in (2, 3)]
    text = markup.stage(markup.Shown(*pair), markup.Look())
    shown = [decoded(address) for address in re.findall(r'src="([^"]+)"', text)]
    assert [picture.tobytes() for picture in shown[:2]] == [d.picture.tobytes() for d in pair]
    levels = [np.asarray(d.picture, dtype=int) for d in pair]
    gap = np.abs(levels[0] - levels[1])
    assert (np.asarray(shown[2]) == gap * (255 // gap.max())).all()
    assert f"difference: {gap.mean():.1f} of 255 levels on average" in text


def decoded(address):
    assert address.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    image.load()
    return image


RECIPES = [
    Wanted("a red circle", 7, steps=2),
    Wanted(
        "--'\"$X`x`\na",
        7,
        width=48,
        height=64,
        negative_prompt="--grey",
        steps=2,
        guidance_scale=2.5,
        shift=1.0,
        sampler="dpmpp_2m",
    ),
    Wanted("a red circle", 3, steps=2, dropped=("t5",)),
    Wanted("a red circle", 3, steps=3, strength=0.5, init_image=Image.new("RGB", (48, 32), "red")),
    Wanted("a red circle", 3, steps=2, dropped=("clip_l", "clip_g")),
]


@pytest.mark.parametrize("asked", RECIPES)
def test_the_recipes_make_the_picture(whole, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    if asked.init_image:
        asked.init_image.save(recipe.START)
    loaded = {"path": [whole]}
    pipe = loading.load(**loaded)
    made = Studio(pipe)
    _, drawing = drawn(made, asked)
    made.worker.shutdown()

    exec(recipe.as_python(asked, pipe.defaults, loaded), {})
    assert Image.open("picture.png").tobytes() == drawing.picture.tobytes()
    Path("picture.png").unlink()

    command = recipe.as_command(asked, pipe.defaults, loaded)
    if set(asked.dropped) - {"t5"}:
        assert command == ""
        return
    split = subprocess.run(
        ["sh", "-c", f"sd3min() {{ printf '%s\\0' \"$@\"; }}; {command}"], capture_output=True
    ).stdout.decode()
    assert cli.main(split.split("\0")[:-1]) == 0
    assert Image.open("picture.png").tobytes() == drawing.picture.tobytes()


def test_recipes_load_what_the_page_had_loaded(tmp_path):
    line = "explore --weights a.safetensors b.safetensors --tokenizers t --no-t5 --dtype float32"
    lora = ["--lora", "c.safetensors:0.5"]
    loaded = given_model(cli.make_parser().parse_args([*line.split(), *lora]))
    asked = Wanted("a red circle", 1)
    command = recipe.as_command(asked, small.DEFAULTS, loaded)
    again = cli.make_parser().parse_args(command.split()[1:-3])
    assert [str(path) for path in again.weights] == ["a.safetensors", "b.safetensors"]
    assert again.lora == [(Path("c.safetensors"), 0.5)]
    assert (again.no_t5, again.dtype, str(again.tokenizers)) == (True, "float32", "t")
    python = recipe.as_python(asked, small.DEFAULTS, loaded)
    assert "path=['a.safetensors', 'b.safetensors'], t5=False" in python
    assert "lora=[('c.safetensors', 0.5)]" in python


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--port 70000", "--port 70000 is not a port: pass a number from 1 to 65535"),
        ("--weights nowhere.safetensors", "nowhere.safetensors"),
    ],
)
def test_a_bad_command_ends_in_one_sentence(capsys, line, sentence):
    assert cli.main(["explore", "--no-browser", *line.split()]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "sd3min.explorer.page", raising=False)
    assert cli.main(["explore", "--no-browser"]) == 2
    assert 'pip install "sd3min[explore]"' in capsys.readouterr().err


# The page itself.


@pytest.fixture(scope="module")
def page(tiny):
    """The page of sd3-tiny, served."""
    pytest.importorskip("gradio", reason="the extra `explore` is not installed")
    from sd3min.explorer.page import Page

    Page.draw = inspect.unwrap(Page.draw)  # one whose types are checked is no generator to gradio
    made = Page(Studio(tiny), "sd3-tiny", {})
    made.address = made.launch("127.0.0.1", None, open_browser=False)
    yield made
    made.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of the system."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH")
    with sync_api.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"], "timeout": WAIT}
        with driver.chromium.launch(**options) as chromium:
            yield chromium


class Visit:
    """A visitor's tab, which notes what it asks of the network and what it complains of."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(WAIT)
        self.tab, self.requests, self.errors = self.context.new_page(), [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("websocket", lambda socket: self.requests.append(socket.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", self.heard)
        self.tab.goto(address, timeout=WAIT)
        self.tab.locator("#draw").wait_for()

    def heard(self, message):
        if message.type == "error":
            self.errors.append(message.text)

    def draw(self, prompt, **numbers):
        self.tab.locator("#prompt textarea").fill(prompt)
        for label, value in numbers.items():
            self.tab.locator("#settings").get_by_label(label).first.fill(str(value))
        self.tab.locator("#draw").click()

    def drawn(self):
        """The picture, once it is there."""
        self.tab.locator("#status a[download]").first.wait_for()
        return self.picture("figure.picture")

    def picture(self, selector):
        return decoded(self.tab.locator(f"#pictures {selector} img").first.get_attribute("src"))

    def click_word(self, word):
        self.tab.get_by_role("radio", name=word, exact=True).first.check()

    def beyond_the_edge(self):
        """Parts that reach beyond the screen's sides, whether it scrolls there or cuts them off."""
        return self.tab.evaluate("""() => [document.documentElement, ...document.querySelectorAll(
            "main button, main input, main textarea, main label, main img, main p, main summary"
          )].filter((part) => {
            const box = part.getBoundingClientRect(), wide = document.documentElement;
            return part === wide ? wide.scrollWidth > wide.clientWidth
              : box.width && (box.right > wide.clientWidth + 1 || box.left < -1);
          }).map((part) => part.outerHTML.slice(0, 80))""")


@pytest.fixture
def visit(browser, page):
    """Opens visitors' tabs; at the end none may have left the machine or complained."""
    visits = []

    def open_one(**options):
        visits.append(Visit(browser, page.address, **options))
        return visits[-1]

    yield open_one
    for each in visits:
        away = [
            url
            for url in each.requests
            if not url.startswith(
                (page.address, page.address.replace("http", "ws"), "data:", "blob:")
            )
        ]
        assert each.requests and away == []
        assert each.errors == []
        each.context.close()


def test_a_visitor_draws_and_sees_where_a_word_was_read(visit, page, tiny):
    colour, word = THING.search(wanted.PROMPT).groups()
    tab = visit()
    assert tab.tab.locator("#prompt textarea").input_value() == wanted.PROMPT
    tab.draw(wanted.PROMPT, Seed=wanted.SEED)
    picture = tab.drawn()
    (expected,) = tiny(wanted.PROMPT, seed=wanted.SEED, progress=False)
    assert picture.tobytes() == expected.tobytes()

    tab.click_word(word)
    tab.tab.locator("#pictures figure.heat").wait_for()
    shown = tab.picture("figure.heat")
    grey = np.asarray(shown.convert("L").resize(picture.size), dtype=float)
    assert np.abs(grey - np.asarray(picture.convert("L"), dtype=float)).mean() > 10
    levels = np.asarray(picture, dtype=int)
    channel = ["red", "green", "blue"].index(colour)
    others = np.delete(levels, channel, axis=2).max(axis=2)
    thing = levels[..., channel] - others > 60
    assert 0.02 < thing.mean() < 0.5
    assert grey[thing].mean() > 1.5 * grey[~thing].mean()

    whole = shown.tobytes()
    tab.tab.locator("#layer input[type=range]").focus()
    tab.tab.keyboard.press("ArrowRight")
    tab.tab.locator("#layer").get_by_text("Layer: 1").wait_for()
    assert tab.picture("figure.heat").tobytes() != whole
    assert "sd3min.load()" in tab.tab.locator("#recipe code").first.text_content()


def test_a_picture_is_seen_as_it_forms(visit):
    tab = visit()
    tab.draw(wanted.PROMPT, Steps=40)
    tab.tab.locator("#status progress").wait_for()
    tab.tab.locator("#pictures figure.glimpse").wait_for()
    tab.drawn()


def test_a_reload_in_mid_picture_ends_the_run_and_the_page_works_on(visit, page):
    tab = visit()
    tab.draw(wanted.PROMPT, Steps=100)
    tab.tab.locator("#pictures figure.glimpse").wait_for()
    tab.tab.reload(timeout=WAIT)
    tab.tab.locator("#draw").wait_for()
    left = [text for text in tab.errors if "abort" in text.lower() or "errored out" in text]
    assert tab.errors == left  # by the page that was left, whose stream was cut
    tab.errors.clear()
    tab.draw(wanted.PROMPT, Steps=2)
    tab.drawn()
    deadline = time.monotonic() + WAIT / 1000
    while page.studio.asked and time.monotonic() < deadline:
        time.sleep(0.1)
    assert page.studio.asked == []


def test_two_visitors_at_once_see_their_own_pictures(visit, tiny):
    expected = [
        tiny(wanted.PROMPT, seed=seed, steps=6, progress=False)[0].tobytes() for seed in range(2)
    ]
    tabs = [visit(), visit()]
    for seed, tab in enumerate(tabs):
        tab.draw(wanted.PROMPT, Seed=seed, Steps=6)
    assert [tab.drawn().tobytes() for tab in tabs] == expected


def test_a_refusal_is_a_sentence_on_the_page(visit, page):
    tab = visit()
    tab.draw(wanted.PROMPT, Steps=page.studio.limits.steps + 1)
    told = tab.tab.locator("#status .refusal").text_content()
    assert f"ask for {page.studio.limits}" in told


def test_other_settings_stand_beside_with_the_difference(visit, tiny):
    tab = visit()
    tab.tab.get_by_label("Compare with other settings").check()
    other = tab.tab.locator("#other")
    other.get_by_label("CLIP-G").check()
    tab.draw(wanted.PROMPT, Steps=4)
    tab.tab.locator("#pictures figure.difference").wait_for()
    sources = tab.tab.locator("#pictures img").evaluate_all("all => all.map(img => img.src)")
    first, second, gap = map(decoded, sources)
    (expected,) = tiny(wanted.PROMPT, seed=wanted.SEED, steps=4, progress=False)
    with without_encoder(tiny, "clip_g"):
        (dropped,) = tiny(wanted.PROMPT, seed=wanted.SEED, progress=False)
    assert first.tobytes() == expected.tobytes()
    assert second.tobytes() == dropped.tobytes()
    assert np.asarray(gap).max() > 127
    assert "without_encoder" in tab.tab.locator("#recipe").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_one_way_and_the_dark_is_dark(visit, scheme):
    tab = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    tab.draw("a green circle below a red heart on white and a very long word " + "x" * 60, Steps=1)
    tab.drawn()
    assert tab.beyond_the_edge() == []
    ground = tab.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    light = np.mean([int(value) for value in re.findall(r"\d+", ground)[:3]])
    assert (light > 200) == (scheme == "light") and (light < 60) == (scheme == "dark")


def test_the_page_listens_on_this_machine_alone(page):
    port = int(page.address.rstrip("/").rpartition(":")[2])
    listening = [
        bytes.fromhex(fields[1].partition(":")[0])[::-1]
        for path in ("/proc/net/tcp",)
        for fields in map(str.split, Path(path).read_text().splitlines()[1:])
        if fields[3] == "0A" and int(fields[1].partition(":")[2], 16) == port
    ]
    assert listening == [socket.inet_aton("127.0.0.1")]


def test_a_taken_port_is_refused(page, capsys):
    port = page.address.rstrip("/").rpartition(":")[2]
    assert cli.main(["explore", "--no-browser", "--port", port]) == 2
    assert f"--port {port} cannot be listened on" in capsys.readouterr().err
