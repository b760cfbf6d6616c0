"""What a training learns, when it ends, and that it goes on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_inverse import QUICK, client, smooth

import rgap
from rgap.learned import Design, Inverse, Schedule, train
from rgap.matching.checkpoint import Ended
from rgap.progress import Report

SMALL = Design(hash_size=64, hidden=32)
SHORT = Schedule(steps=60, updates=16, rate=1e-3, every=10)


class KilledError(Exception):
    """What ends a process in the middle."""


def trained(schedule: Schedule = SHORT, **options: object) -> Inverse:
    pictures, labels = smooth(100)
    return train(client(), pictures, labels, design=SMALL, schedule=schedule, **options)


def equal(one: Inverse, other: Inverse) -> bool:
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_unseen_batches_come_back_far_better_than_their_mean(inverse: Inverse) -> None:
    model, (x, y) = client(), smooth(60, seed=9)
    learned = smooth(600)[0].mean(0)
    errors = []
    for number in range(0, 60, 2):
        update = rgap.capture(model, x[number : number + 1], y[number : number + 1])
        errors.append((inverse.pictures(model, update)[0] - x[number]).square().mean())
    mean_picture = float((x[::2] - learned).square().mean())
    assert float(torch.stack(errors).mean()) < 0.25 * mean_picture
    assert inverse.report.errors[1] < 0.25 * inverse.report.mean_picture
    assert inverse.report.errors[2] < 0.8 * inverse.report.mean_picture


def test_the_pictures_of_another_gradient_are_other_pictures(inverse: Inverse) -> None:
    """What comes back is read off the gradient: of another picture it is no better than a mean."""
    model, (x, y) = client(), smooth(40, seed=9)
    learned = smooth(600)[0].mean(0)
    others = [
        inverse.pictures(model, rgap.capture(model, x[at : at + 1], y[at : at + 1]))[0]
        for at in range(1, 40)
    ]
    error = (torch.stack(others) - x[:-1]).square().mean()
    assert 10 * torch.log10((x[:-1] - learned).square().mean() / error) < 1.0  # dB


def test_the_size_of_a_batch_is_guessed(inverse: Inverse) -> None:
    model, (x, y) = client(), smooth(40, seed=9)
    right = 0
    for first in range(20):
        size = 1 + first % 2
        update = rgap.capture(
            model, x[first : first + size], y[first : first + size], share_batch_size=False
        )
        odds = inverse.sizes(model, update)
        assert sum(odds.values()) == pytest.approx(1.0)
        right += max(odds, key=odds.__getitem__) == size
        assert len(inverse.pictures(model, update)) in (1, 2)
    assert right >= 15
    assert inverse.report.counted is not None and inverse.report.counted > 0.75


def test_a_convolutional_decoder_learns_too() -> None:
    pictures, labels = smooth(300)
    design = Design(hash_size=128, hidden=64, network="convolutional")
    schedule = replace(QUICK, steps=150, updates=32)
    report = train(client(), pictures, labels, design=design, schedule=schedule).report
    assert report.errors[1] < 0.6 * report.mean_picture


def test_a_factor_drops_out_of_a_scale_free_design() -> None:
    model, (x, y) = client(), smooth(100)
    own = train(model, x, y, design=replace(SMALL, scale_free=True), schedule=SHORT)
    update = rgap.capture(model, x[:1], y[:1])
    times = replace(update, gradients={n: 0.1 * g for n, g in update.gradients.items()})
    torch.testing.assert_close(
        own.pictures(model, times), own.pictures(model, update), atol=1e-5, rtol=0
    )


def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rgap.learned.training.SAVED", 0.0)
    state, last = tmp_path / "state.safetensors", 37

    def killed(report: Report) -> None:
        if report.what == "step" and report.number == last:
            raise KilledError

    with pytest.raises(KilledError):
        trained(checkpoint=state, progress=killed)
    told: list[Report] = []
    resumed = trained(checkpoint=state, progress=told.append)
    assert next(report.number for report in told if report.what == "step") == 31
    assert equal(resumed, trained())
    assert resumed.report.steps == SHORT.steps


def test_a_finished_training_is_not_taken_up_again(tmp_path: Path) -> None:
    state, told = tmp_path / "state.safetensors", list[Report]()
    first = trained(checkpoint=state)
    assert equal(first, trained(checkpoint=state, progress=told.append))
    assert not any(report.what == "step" for report in told)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    trained(checkpoint=state)
    with pytest.raises(ValueError, match=r"checkpoint: .* with schedule="):
        trained(replace(SHORT, rate=2e-3), checkpoint=state)


def test_it_stops_where_nothing_gets_better() -> None:
    still = replace(SHORT, steps=5000, rate=1e-12, every=2, patience=3)
    report = trained(still).report
    assert report.ended is Ended.STILL
    assert report.steps == 6


def test_it_stops_at_its_time_limit() -> None:
    report = trained(replace(SHORT, steps=10**9, time_limit=0.5, patience=None)).report
    assert report.ended is Ended.TIME
    assert report.steps < 10**9


def test_the_best_weights_are_kept() -> None:
    """Of a training whose last steps ruin it."""
    ruined = trained(replace(SHORT, rate=0.3, steps=40, every=5, patience=None)).report
    assert ruined.errors[1] <= 1.6 * ruined.mean_picture


def test_seeds_decide_it_and_the_random_state_is_left() -> None:
    before = torch.get_rng_state()
    short = replace(SHORT, steps=10)
    assert equal(trained(short), trained(short))
    assert not equal(trained(short), trained(replace(short, seed=1)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_from_an_inverse_begins_where_it_ended() -> None:
    first = trained()
    again = trained(replace(SHORT, steps=1, every=1), start=first)
    assert again.report.errors[1] == pytest.approx(first.report.errors[1], rel=0.1)
    with pytest.raises(ValueError, match="start: expected an inverse of the same design"):
        trained(replace(SHORT, seed=3), start=first)


def test_how_far_it_is() -> None:
    told: list[Report] = []
    trained(progress=told.append)
    assert [r.number for r in told if r.what == "step"] == list(range(1, SHORT.steps + 1))
    assert told[0].words == "gradients of pictures: 1 of 100"
    assert "held out" in told[-1].words


def test_what_is_no_network() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        rgap.learned.train(3, torch.rand(9, 1, 4, 4), torch.zeros(9))  # type: ignore[arg-type]


def test_a_layer_that_is_frozen_now_is_refused() -> None:
    inverse, frozen = trained(), client()
    next(frozen.parameters()).requires_grad_(False)
    x, _ = smooth(2)
    update = rgap.capture(frozen, x[:1], torch.tensor([0]))
    with pytest.raises(ValueError, match="frozen in one and not in the other"):
        inverse.pictures(frozen, update)
