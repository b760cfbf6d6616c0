"""Pictures from updates, files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_inverse import client, smooth
from torch import Tensor, nn

import rgap
from rgap.learned import Design, Inverse, Schedule, adapt, load, train
from rgap.learned.fingerprint import Fingerprint
from rgap.machine import memory
from rgap.update.storage import opened

LABELS = torch.tensor([3, 0])


def sent(size: int = 2, model: nn.Module | None = None, **options: Any) -> rgap.Update:
    return rgap.capture(model or client(), smooth(size, seed=9)[0], LABELS[:size], **options)


def moved(amount: float) -> nn.Module:
    """The client's weights, a little further; every direction is as likely."""
    model, draw = client(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=draw)
    return model


def distance(one: nn.Module, other: nn.Module) -> float:
    ours, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (one, other))
    return float((ours - theirs).norm() / ours.norm())


def test_what_is_saved_is_what_is_loaded(inverse: Inverse, tmp_path: Path) -> None:
    path = tmp_path / "inverse.safetensors"
    inverse.save(path)
    again = load(path)
    assert (again.design, again.client, again.report) == (
        inverse.design, inverse.client, inverse.report,
    )  # fmt: skip
    assert torch.equal(again.pictures(client(), sent()), inverse.pictures(client(), sent()))
    assert again.sizes(client(), sent()) == inverse.sizes(client(), sent())


def test_it_is_in_the_range_of_the_data() -> None:
    pictures, labels = smooth(60)
    short = Schedule(steps=10, updates=8, every=5)
    own = train(
        client(), 4 * pictures - 2, labels, design=Design(hash_size=32, hidden=16), schedule=short,
        value_range=(-2.0, 2.0),
    )  # fmt: skip
    made = own.pictures(client(), sent(1))
    assert float(made.min()) < 0 and -2 <= float(made.min()) <= float(made.max()) <= 2


def test_rows_come_in_the_order_of_stated_labels(inverse: Inverse) -> None:
    model, right = client(), 0
    for seed in range(20):
        x, _ = smooth(2, seed=50 + seed)
        update = rgap.capture(model, x, LABELS)
        made = inverse.pictures(model, update, labels=LABELS)
        turned = inverse.pictures(model, update, labels=LABELS.flip(0))
        assert torch.equal(made, turned.flip(0))
        right += bool((made - x).square().mean() < (made.flip(0) - x).square().mean())
    assert right >= 16


def test_it_is_a_start_of_a_search(inverse: Inverse) -> None:
    model, (x, _) = client(), smooth(1, seed=9)
    update = sent(1)
    start = inverse.pictures(model, update)
    found = rgap.match(model, update, method="ig", start=start, iterations=30, labels=LABELS[:1])
    assert found.nearest is not None
    assert float((found.nearest[0] - x[0]).square().mean()) < 0.02


# --- which model ----------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [1e-3, 1e-1])
def test_moved_weights_are_refused_with_their_distance(inverse: Inverse, amount: float) -> None:
    other = moved(amount)
    with pytest.raises(ValueError, match=r"at a relative distance of .* drift='allow'") as refused:
        inverse.pictures(other, sent(model=other))
    told = float(str(refused.value).partition("distance of ")[2].partition(";")[0])
    assert told == pytest.approx(distance(client(), other), rel=0.25)
    assert len(inverse.pictures(other, sent(model=other), drift="allow")) == 2


def test_running_statistics_are_weights_too() -> None:
    norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    before = Fingerprint.of(norm)
    norm[1].running_mean += 1.0
    assert before.distance(Fingerprint.of(norm)) > 0.1


def test_the_running_statistics_that_a_client_sends_are_its_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 4)).eval()
    x, y = smooth(40)
    short = Schedule(steps=2, updates=4, every=2)
    own = train(model, x, y, design=Design(hash_size=16, hidden=8), schedule=short)
    update = rgap.capture(model, x[:1], y[:1])
    assert own.pictures(model, update).shape == (1, 1, 6, 6)
    update.buffers["1.running_mean"] += 1.0
    with pytest.raises(ValueError, match="at a relative distance of"):
        own.pictures(model, update)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 4)),
            r"2: ReLU\(\), got one with 2: Tanh\(\)",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 5)),
            "out_features=4, .* got one with .*out_features=5",
        ),
        (lambda: nn.Sequential(nn.Flatten()), "got one with"),
    ],
)
def test_another_architecture_is_refused(
    inverse: Inverse, build: Callable[[], nn.Module], line: str
) -> None:
    with pytest.raises(ValueError, match=rf"inverse: trained for a model with .*{line}"):
        inverse.pictures(build().eval(), sent(), drift="allow")


def test_an_adapted_inverse_is_nearer_than_one_that_is_not() -> None:
    pictures, labels = smooth(400)
    schedule = Schedule(steps=300, updates=64, rate=2e-3, every=50)
    design = Design(hash_size=256, hidden=128)
    own = train(client(), pictures, labels, design=design, schedule=schedule)
    other = moved(0.05)
    new, (x, y) = adapt(own, client(), other, pictures, labels), smooth(40, seed=9)
    errors = {True: 0.0, False: 0.0}
    for number in range(40):
        update = rgap.capture(other, x[number : number + 1], y[number : number + 1])
        for adapted, made in (
            (True, new.pictures(other, update)),
            (False, own.pictures(other, update, drift="allow")),
        ):
            errors[adapted] += float((made[0] - x[number]).square().mean())
    assert errors[True] < 0.7 * errors[False]
    told = new.report.errors[1]
    assert told != own.report.errors[1], "of the new weights"
    assert told == pytest.approx(errors[True] / 40, rel=0.6)
    assert new.report.steps == own.report.steps
    with pytest.raises(ValueError, match="as many held out, a batch, got 0 and 1"):
        adapt(own, client(), other, pictures[:1], labels[:1])
    with pytest.raises(ValueError, match="targets"):
        adapt(own, client(), other, pictures, labels + 90)
    with pytest.raises(ValueError, match="before: expected the weights that the inverse"):
        adapt(own, other, other, pictures, labels)
    with pytest.raises(ValueError, match=r"pictures: expected samples of shape \[1, 6, 6\]"):
        adapt(own, client(), other, pictures[..., :5], labels)


# --- bad input ------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(inverse: Inverse) -> None:
    update = sent()
    del update.gradients["1.bias"]
    with pytest.raises(ValueError, match=r"'1\.bias' is missing"):
        inverse.pictures(client(), update)


@pytest.mark.parametrize("size", [3, 4])
def test_a_batch_size_that_it_was_not_trained_for(inverse: Inverse, size: int) -> None:
    with pytest.raises(ValueError, match=rf"trained for \(1, 2\), got {size}; write"):
        inverse.pictures(client(), sent(), batch_size=size)


def test_updates_that_are_no_gradients_of_its_loss(inverse: Inverse) -> None:
    with pytest.raises(ValueError, match="average over 5 local steps"):
        inverse.pictures(client(), replace(sent(), local_steps=5))
    with pytest.raises(ValueError, match=r"update: expected the loss .*reduction='sum'"):
        inverse.pictures(client(), sent(loss=rgap.Loss(reduction="sum")))
    with pytest.raises(ValueError, match="drift: expected 'refuse' or 'allow', got 'yes'"):
        inverse.pictures(client(), sent(), drift="yes")
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 4)).train()
    with pytest.raises(ValueError, match="in train mode"):
        inverse.pictures(norm, sent())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.index_fill(0, torch.tensor([2]), torch.nan), "pictures has NaN .* 36 of 1440"),
        (lambda x: x[:0], r"pictures: expected at least one, .* got \[0, 1, 6, 6\]"),
        (lambda x: x * 255, r"pictures: expected values in \[0, 1\], got .* write value_range="),
        (lambda x: x[:2], "pictures: expected at least 2 to learn from and as many held out"),
    ],
)
def test_pictures_that_nothing_can_be_learned_from(
    spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    x, y = smooth(40)
    spoiled = spoil(x)
    with pytest.raises(ValueError, match=message):
        train(client(), spoiled, y[: len(spoiled)], design=Design(batch_sizes=(1, 2)))


def test_gradients_that_do_not_fit_are_refused_before_they_are_taken() -> None:
    many = torch.zeros(1, 1, 1, 1).expand(50_000, 1, 6, 6)
    with pytest.raises(memory.OutOfMemory, match=r"hashed gradients of 50,000 pictures needs"):
        train(client(), many, torch.zeros(50_000).long(), design=Design(hash_size=10**8))


def test_a_checkpoint_without_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    x, y = smooth(40)
    with pytest.raises(FileNotFoundError, match=r"no folder .* to write state to"):
        train(client(), x, y, checkpoint=tmp_path / "nowhere" / "state")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no picture in"):
        train(client(), rgap.photos.folder(tmp_path), torch.zeros(0))


def test_arguments_of_a_training() -> None:
    x, y = smooth(40)
    with pytest.raises(TypeError, match=r"pictures: expected a floating tensor .* got torch.uint8"):
        train(client(), (255 * x).byte(), y)
    with pytest.raises(ValueError, match="labels: expected one target per sample"):
        train(client(), x, y[:3])
    with pytest.raises(ValueError, match="loss: expected a named one that weighs samples alike"):
        train(client(), x, y, loss=rgap.Loss(weight=(1.0, 2.0, 3.0, 4.0)))
    with pytest.raises(ValueError, match="conditioned: expected a loss of class indices"):
        train(client(), x, torch.rand(40, 4), loss="mse_loss", design=Design(conditioned=True))
    for bounds in ((0.0, float("inf")), (1.0, 0.0), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="value_range: expected"):
            train(client(), x, y, value_range=bounds)
    with pytest.raises(TypeError, match="value_range: expected the range"):
        train(client(), x, y, value_range=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected parameters that a client trains"):
        train(client().requires_grad_(False), x, y)
    with pytest.raises(ValueError, match="targets"):
        train(client(), x, y + 90)
    with pytest.raises(TypeError, match="labels: expected a target for each picture"):
        train(client(), x, None)  # type: ignore[arg-type]
    flat = nn.Sequential(nn.Linear(36, 4)).eval()
    with pytest.raises(ValueError, match="network: 'convolutional' makes pictures"):
        train(flat, x.flatten(1), y, design=Design(network="convolutional"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Design(batch_sizes=()), "batch_sizes: expected at least one"),
        (lambda: Design(batch_sizes=(0,)), "batch_sizes: expected at least 1, got 0"),
        (lambda: Design(network="unet"), "network: expected one of 'mlp', 'convolutional'"),
        (lambda: Design(batch_sizes=2), "batch_sizes: expected whole numbers, one after another"),
        (lambda: Design(batch_sizes="12"), "batch_sizes: expected whole numbers, one after"),
        (lambda: Schedule(rate=0.0), "rate: expected a number above 0"),
        (lambda: Schedule(held_out=1.0), "held_out: expected a share between 0 and 1"),
    ],
)
def test_designs_and_schedules_that_are_none(build: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_files_that_are_no_inverse(inverse: Inverse, tmp_path: Path) -> None:
    path = tmp_path / "inverse.safetensors"
    inverse.save(path)
    metadata, tensors = opened(path)
    held = load_file(path)
    save_file({n: t for n, t in held.items() if n != "network/2.bias"}, path, metadata)
    with pytest.raises(ValueError, match=r"its tensors are not those of its design .*2\.bias"):
        load(path)
    save_file(tensors, path, {**metadata, "version": "7"})
    with pytest.raises(ValueError, match="expected an inverse of version 1, got version 7"):
        load(path)
    sent().save(path)
    with pytest.raises(ValueError, match="expected an inverse of version 1, got another file"):
        load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated"):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"no such file, expected one that inverse\.save"):
        load(tmp_path / "nope")


@pytest.mark.parametrize("seed", range(20))
def test_a_file_of_which_one_byte_has_changed_is_refused(
    inverse: Inverse, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "inverse.safetensors"
    inverse.save(path)
    held = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(held[:8], "little")
    first, end = ((0, length), (length, len(held)))[seed % 2]  # its header, its numbers
    place = int(torch.randint(first, end, (1,), generator=torch.Generator().manual_seed(seed)))
    held[place] ^= 1 << seed % 7
    path.write_bytes(held)
    with pytest.raises(ValueError, match=str(path.name)):
        load(path)


def test_numbers_that_are_none_are_refused(inverse: Inverse, tmp_path: Path) -> None:
    path = tmp_path / "inverse.safetensors"
    spoiled = replace(
        inverse, standard=replace(inverse.standard, spreads=torch.full((2, 256), torch.nan))
    )
    spoiled.save(path)
    with pytest.raises(ValueError, match="spreads has NaN or infinity in 512 of 512"):
        load(path)
    inverse.save(path)
    metadata, tensors = opened(path)
    header = metadata["inverse"]
    for word in ("batch_sizes", "names", "steps", "norm"):
        save_file(tensors, path, {**metadata, "inverse": header.replace(f'"{word}"', '"other"')})
        with pytest.raises(ValueError, match="are not those of its design"):
            load(path)
    save_file(tensors, path, {**metadata, "inverse": "{"})
    with pytest.raises(ValueError, match="are not those of its design"):
        load(path)


def test_labels_that_are_no_classes(inverse: Inverse) -> None:
    with pytest.raises(ValueError, match="targets"):
        inverse.pictures(client(), sent(), labels=torch.tensor([0, 9]))


def test_a_start_of_another_architecture_is_refused(inverse: Inverse) -> None:
    x, y = smooth(40)
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 4)).eval()
    with pytest.raises(ValueError, match=r"trained for a model with .*ReLU\(\), got one with"):
        train(other, x, y, design=inverse.design, start=inverse)
