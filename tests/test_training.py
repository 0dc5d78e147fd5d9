"""The loop: rates, shares, averages, records, and runs that are killed, refused or filled up."""

import json
import math
import os
import random
import resource
import signal
import time

import pytest
import torch
from hypothesis import given, strategies
from killing import child, killed_after
from PIL import Image
from torch import nn

from sd3min.config import Refusal
from sd3min.training import curves, records, trainer
from sd3min.training.ema import Average
from sd3min.training.recipe import Recipe
from sd3min.training.trainer import Losses, Run, Task, Watch, fit

EXACT = {"rtol": 0, "atol": 0}
ROUNDED = {"rtol": 1e-6, "atol": 1e-7}  # sums of float32 in another order
DRAW = curves.draw
QUICK = Recipe(12, 0.05, batch=6, warmup=2, average=0.9, precision="no", save_every=5)


class Line(Task):
    """A layer that learns the identity, at times drawn by the step."""

    def __init__(self, spoiled=None):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.spoiled = spoiled

    def forward(self, step, part):
        generator = torch.Generator().manual_seed(step)
        x, t = torch.randn(6, 4, generator=generator)[part], torch.rand(6, generator=generator)
        values = (self.layer(x) - x).square().mean(dim=1)
        return Losses(self.spoiled(step, values) if self.spoiled else values, t[part])


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Matplotlib takes most of the time of so short a run."""

    monkeypatch.setattr(curves, "draw", lambda log, path: path.write_text("plot"))


def weights(task):
    return task.layer.weight.detach().clone()


def lines(folder):
    """The log, without what differs from run to run."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "seconds"} for line in found]


def test_rate_rises_then_falls_to_zero():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=10)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:76] == [1.0] * 66
    assert rates[75:] == pytest.approx([(25 - i) / 25 for i in range(25)])


def test_without_warmup_and_decay_the_rate_is_level():
    recipe = Recipe(steps=7, learning_rate=1.0, warmup=0, decay=0.0)
    assert [recipe.rate(step) for step in range(7)] == [1.0] * 7


@given(strategies.integers(1, 4), strategies.integers(1, 5), strategies.integers(1, 3))
def test_shares_are_the_batch_once(processes, accumulation, size):
    recipe = Recipe(1, 1.0, batch=processes * accumulation * size, accumulation=accumulation)
    parts = [part for rank in range(processes) for part in recipe.shares(rank, processes)]
    assert [i for part in parts for i in range(recipe.batch)[part]] == list(range(recipe.batch))
    assert {part.stop - part.start for part in parts} == {size}


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(Refusal, match="a batch of 6 does not divide among 4 processes of 1 parts"):
        Recipe(1, 1.0, batch=6).shares(0, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0}, "steps of 0 must be at least 1"),
        ({"batch": -2}, "batch of -2 must be at least 1"),
        ({"learning_rate": math.nan}, "learning_rate of nan is not a number above 0"),
        ({"clip": 0.0}, r"clip of 0\.0 is not a number above 0"),
        ({"warmup": -1}, "warmup of -1 must be 0 steps or more"),
        ({"decay": 1.5}, r"decay of 1\.5 must be from 0 to 1"),
        ({"average": 1.0}, r"average of 1\.0 must be at least 0 and below 1"),
        ({"precision": "fp8"}, "precision fp8 is not one of bf16, fp16, no"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(given, words):
    with pytest.raises(Refusal, match=words):
        Recipe(**{"steps": 1, "learning_rate": 1.0, **given})


def test_average_follows_the_weights_quickly_at_first_and_steadily_later():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    average, expected = Average({"w": weight}, 0.9), torch.zeros(3, dtype=torch.float64)
    for step in range(1, 200):
        weight.data += torch.tensor([1.0, -2.0, 0.5])
        average.update()
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * weight.data
    torch.testing.assert_close(average.kept["w"], expected)
    kept, live = average.kept["w"].clone(), weight.detach().clone()
    with pytest.raises(KeyError), average.in_place():
        torch.testing.assert_close(weight.data, kept, **EXACT)
        raise KeyError
    torch.testing.assert_close(weight.data, live, **EXACT)
    average.settle()
    torch.testing.assert_close(weight.data, kept, **EXACT)


def test_no_average_leaves_the_weights_alone():
    weight = nn.Parameter(torch.ones(3))
    average = Average({"w": weight}, 0.0)
    average.update()
    weight.data += 1
    average.settle()
    assert average.kept == {} and (weight == 2).all()


def test_loss_by_time_is_the_mean_of_each_bin_and_says_nothing_of_empty_ones():
    times = torch.tensor([0.0, 0.2, 0.25, 0.9, 1.0])
    found = records.by_time(torch.tensor([1.0, 3.0, 5.0, 7.0, 8.0]), times)
    assert found == {"loss_t0": 2.0, "loss_t0.25": 5.0, "loss_t0.75": 7.5}


def by_hand(recipe):
    """The same run, written out with PyTorch alone; its weights' average and its losses."""
    task, losses = Line(), []
    optimizer = torch.optim.AdamW(
        task.parameters(), betas=recipe.betas, eps=1e-15, weight_decay=0.01
    )
    kept = weights(task)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * recipe.rate(step)
        loss = task(step, slice(0, 6)).values.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
        kept = kept.lerp(weights(task), 1 - min(recipe.average, (step + 1) / (step + 11)))
    return kept, losses


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_is_adamw_on_the_mean_loss_however_the_batch_is_cut(accumulation, tmp_path):
    recipe = Recipe(**vars(QUICK) | {"accumulation": accumulation})
    task = Line()
    fit(task, recipe, tmp_path)
    kept, losses = by_hand(recipe)
    torch.testing.assert_close(weights(task), kept, **ROUNDED)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(12))
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-5)
    assert all(any(name.startswith("loss_t") for name in line) for line in found)


def stopped(step, at=7):
    if step == at:
        raise InterruptedError


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    whole = Line()
    fit(whole, QUICK, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit(Line(lambda step, values: stopped(step) or values), QUICK, tmp_path / "broken")
    assert len(lines(tmp_path / "broken")) == 7
    resumed = Line()
    fit(resumed, QUICK, tmp_path / "broken")
    torch.testing.assert_close(weights(resumed), weights(whole), **EXACT)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_a_run_that_is_done_gives_its_weights_again(tmp_path):
    first, again = Line(), Line()
    fit(first, QUICK, tmp_path)
    fit(again, QUICK, tmp_path)
    torch.testing.assert_close(weights(again), weights(first), **EXACT)


def run_to(folder, recipe=QUICK, task=Line):
    """Train and leave the weights in a file."""
    trained = task()
    fit(trained, recipe, folder)
    torch.save(weights(trained), folder / "weights.pt")


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(times, tmp_path):
    """Over the time that the whole takes: while it starts, learns and writes."""
    recipe = Recipe(**vars(QUICK) | {"steps": 40, "save_every": 2})
    began = time.monotonic()
    os.waitpid(child(lambda: run_to(tmp_path / "whole", recipe)), 0)
    lasts = time.monotonic() - began
    rng = random.Random(0)
    kills = [
        killed_after(rng.uniform(0.02, 1.0) * lasts / 4, lambda: run_to(tmp_path / "a", recipe))
        for _ in range(times)
    ]
    assert any(kills)
    os.waitpid(child(lambda: run_to(tmp_path / "a", recipe)), 0)
    found, expected = (torch.load(tmp_path / name / "weights.pt") for name in ("a", "whole"))
    torch.testing.assert_close(found, expected, **EXACT)
    assert lines(tmp_path / "a") == lines(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["half a checkpoint", "before it is named", "half a log"])
def test_a_run_killed_while_it_writes_goes_on(moment, tmp_path, monkeypatch):
    """The second checkpoint is torn, or whole and without its name; or the log of a resumed run."""
    fit(whole := Line(), QUICK, tmp_path / "whole")
    folder, pid = tmp_path / "torn", os.getpid()

    def die(*_):
        assert os.getpid() != pid
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(state, file):
        if state["step"] == 5:
            return save(state, file)
        file.write(b"half a checkpoint")
        file.flush()
        die()

    save, replace = torch.save, os.replace
    with monkeypatch.context() as patch:
        if moment == "half a checkpoint":
            patch.setattr(torch, "save", torn)
        if moment == "before it is named":
            late = 0 if moment == "half a log" else 2

            def named(source, target, seen=[]):  # noqa: B006
                seen.append(target)
                is_checkpoint = str(target).endswith("checkpoint.pt")
                if is_checkpoint and sum(str(t).endswith(".pt") for t in seen) == late:
                    die()
                replace(source, target)

            patch.setattr(os, "replace", named)
        if moment == "half a log":
            with pytest.raises(InterruptedError):
                fit(Line(lambda step, values: stopped(step) or values), QUICK, folder)
            patch.setattr(os, "replace", die)
        status = os.waitpid(child(lambda: run_to(folder)), 0)[1]
    assert os.WIFSIGNALED(status) and not (folder / "weights.pt").exists()
    assert torch.load(folder / "checkpoint.pt")["step"] == 5
    fit(resumed := Line(), QUICK, folder)
    torch.testing.assert_close(weights(resumed), weights(whole), **EXACT)
    assert lines(folder) == lines(tmp_path / "whole")


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path):
    """A limit on the length of files, as a full disk, comes down once a checkpoint is there."""
    recipe = Recipe(**vars(QUICK) | {"save_every": 1})

    def fill(step, values):
        if step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return values

    def filled():
        try:
            fit(Line(fill), recipe, tmp_path)
        except Refusal as refusal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            (tmp_path / "told.txt").write_text(str(refusal))
            os._exit(0)

    status = os.waitpid(child(filled), 0)[1]
    assert os.WEXITSTATUS(status) == 0
    told = (tmp_path / "told.txt").read_text()
    assert "cannot be written" in told and "\n" not in told and str(tmp_path) in told
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert not list(tmp_path.glob(".*.part"))
    fit(resumed := Line(), recipe, tmp_path)
    fit(whole := Line(), recipe, tmp_path / "whole")
    torch.testing.assert_close(weights(resumed), weights(whole), **EXACT)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with (
        pytest.raises(Refusal, match=r"a cannot be written \(No space left on device\)"),
        records.whole(path) as part,
    ):
        part.write_text("half")
        raise OSError(28, os.strerror(28))
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_checkpoint_that_cannot_be_read_is_refused(content, tmp_path):
    fit(Line(), QUICK, tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(Refusal, match=r"checkpoint\.pt is no checkpoint"):
        fit(Line(), QUICK, tmp_path)


class Other(Line):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)


@pytest.mark.parametrize(
    ("task", "change"), [(Other, {}), (Line, {"average": 0.0}), (Line, {"average": 0.5})]
)
def test_another_runs_checkpoint_is_refused(task, change, tmp_path):
    began = QUICK if change != {"average": 0.5} else Recipe(**vars(QUICK) | {"average": 0.0})
    fit(Line(), began, tmp_path)
    with pytest.raises(Refusal, match=r"checkpoint\.pt is of another run: name another folder"):
        fit(task(), Recipe(**vars(QUICK) | change), tmp_path)


def test_a_run_that_went_too_far_is_refused(tmp_path):
    fit(Line(), QUICK, tmp_path)
    with pytest.raises(Refusal, match="has gone 12 steps, and 4 are asked for"):
        fit(Line(), Recipe(**vars(QUICK) | {"steps": 4}), tmp_path)


def test_a_checkpoint_has_what_a_run_needs(tmp_path):
    fit(Line(), QUICK, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt")
    assert state.keys() == {"trained", "optimizer", "average", "scaler", "step"}
    assert state["trained"].keys() == {"layer.weight", "layer.bias"} and state["scaler"] is None


class Scaler:
    """Where float16 scales its losses; a stand-in, since there is none on a CPU."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


def test_the_scale_of_float16_is_in_the_checkpoint(tmp_path):
    run = Run(Line(), QUICK, tmp_path / "checkpoint.pt")
    run.scaler = Scaler(4096.0)
    run.save()
    other = Run(Line(), QUICK, tmp_path / "none")
    other.scaler, other.path = Scaler(65536.0), run.path
    other._resume()
    assert other.scaler.scale == 4096.0


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (0.5, True)])
def test_under_float16_a_gradient_that_is_no_number_stops_a_run_when_no_scale_helps(
    scale, stops, tmp_path
):
    run = Run(Line(lambda step, values: values * 1e30 * 1e30), QUICK, tmp_path / "checkpoint.pt")
    run.scaler, run.accelerator.clip_grad_norm_ = Scaler(scale), lambda *_: math.inf
    run.check = lambda what, value, check=run.check: None if what == "loss" else check(what, value)
    if stops:
        with pytest.raises(Refusal, match="the gradient's norm is inf at step 0"):
            run.advance()
    else:
        run.advance()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(bad, tmp_path):
    def spoil(step, values):
        return values * (bad if step == 7 else 1)

    with pytest.raises(Refusal, match=f"the loss is {bad} at step 7, on batch 7: lower the rate"):
        fit(Line(spoil), QUICK, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 5


def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path):
    """√|v| at v = 0: the loss is a number and its gradient none."""
    task = Line(lambda step, v: v + ((v - v.detach()).abs().sqrt() if step == 4 else 0))
    with pytest.raises(Refusal, match="the gradient's norm is nan at step 4, on batch 4"):
        fit(task, QUICK, tmp_path)
    assert weights(task).isfinite().all()


def test_watches_see_the_average_at_their_steps_and_at_the_end(tmp_path):
    seen, task = [], Line()

    def look(step):
        seen.append((step, weights(task)))
        return {"validation": float(step)}

    fit(task, QUICK, tmp_path, [Watch(5, look)])
    assert [step for step, _ in seen] == [5, 10, 12]
    told = {line["step"]: line["validation"] for line in lines(tmp_path) if "validation" in line}
    assert told == {4: 5.0, 9: 10.0, 11: 12.0}
    torch.testing.assert_close(seen[-1][1], weights(task), **EXACT)
    run = Run(Line(), QUICK, tmp_path / "checkpoint.pt")
    assert not torch.equal(run.trained["layer.weight"], seen[-1][1])  # which was put back


def test_watching_changes_nothing_of_a_run(tmp_path):
    fit(plain := Line(), QUICK, tmp_path / "a")
    fit(seen := Line(), QUICK, tmp_path / "b", [Watch(1, lambda step: {})])
    torch.testing.assert_close(weights(seen), weights(plain), **EXACT)


def test_stages_may_have_another_precision_each(tmp_path):
    for name in ("bf16", "no"):
        fit(Line(), Recipe(**vars(QUICK) | {"precision": name, "steps": 2}), tmp_path / name)
    losses = [lines(tmp_path / name)[0]["loss"] for name in ("bf16", "no")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_tensorboard_gets_every_figure_once_though_a_run_was_resumed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(InterruptedError):
        fit(Line(lambda s, v: stopped(s) or v), QUICK, tmp_path, tensorboard=True)
    fit(Line(), QUICK, tmp_path, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Scalars("loss")
    assert [event.step for event in events] == list(range(12))
    expected = [line["loss"] for line in lines(tmp_path)]
    assert [event.value for event in events] == pytest.approx(expected)


def test_a_log_forgets_what_is_done_again_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with records.Log(tmp_path, 1) as log:
        log.write({"step": 1, "loss": 5})
    assert path.read_text() == '{"step": 0, "loss": 1}\n{"step": 1, "loss": 5}\n'


def test_curves_are_a_picture(tmp_path):
    with records.Log(tmp_path, 0) as log:
        for step in range(3):
            log.write({"step": step, "loss": 2.0 - step / 4, "loss_t0.5": 1.0, "validation": 1.5})
    DRAW(tmp_path / "metrics.jsonl", tmp_path / "metrics.part")
    assert Image.open(tmp_path / "metrics.part").size == (960, 480)


def test_smoothed_curves_are_means_of_the_last_steps(monkeypatch):
    monkeypatch.setattr(curves, "WINDOW", 3)
    assert curves.smoothed([1, 2, 6, 10]).tolist() == [1, 1.5, 3, 6]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"the folder .*file/a cannot be made \(Not a directory\)"):
        fit(Line(), QUICK, tmp_path / "file" / "a")


def test_a_task_says_what_its_losses_are():
    with pytest.raises(TypeError, match="Task does not say what its losses are"):
        trainer.Task()(0, slice(0, 1))
