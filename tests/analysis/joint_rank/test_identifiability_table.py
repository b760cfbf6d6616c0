"""What an identifiability says of itself: masks, pictures, words, frames; and what it refuses."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from cases import picture, small_conv, small_mlp
from graphs import called_twice, seeded, tied
from reference import dense_jacobian
from torch import Tensor, nn
from written import Written

from rgap.analysis import Identifiability, audit, identifiability, largest_identifiable_batch
from rgap.analysis.plots.null_space import null_pictures, nullity_curves, spectra
from rgap.machine import memory

SHAPE = (2, 6, 6)


def network() -> nn.Module:
    return small_conv("tanh", channels=2, size=6, stride=2).double()


@pytest.fixture(scope="module")
def short() -> Identifiability:
    found = identifiability(network(), picture(SHAPE, 3, 2).double())
    assert found.joint_nullity
    return found


@pytest.fixture(scope="module")
def full() -> Identifiability:
    return identifiability(small_mlp("tanh").double(), (2, 4, 4), 2)


# --- what is determined ---------------------------------------------------------------------


def corner() -> nn.Module:
    """A stride that never reads the last row and column, and one pixel that a mask blots out."""
    mask = torch.ones(5, 5)
    mask[0, 1] = 0.0

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.conv(x * m.mask).tanh().flatten(1))  # type: ignore[no-any-return]

    return Written(forward, mask=mask, conv=nn.Conv2d(1, 6, 2, 2), fc=nn.Linear(24, 5))


@pytest.mark.parametrize("method", ["dense", "sketch"])
def test_pixels_that_no_equation_reads_are_the_undetermined_ones(method: str) -> None:
    model = seeded(corner)
    found = identifiability(model, (1, 5, 5), 1, method=method)
    read = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    read[..., 4, :] = read[..., :, 4] = read[..., 0, 1] = False
    assert torch.equal(found.determined, read)
    assert found.joint_nullity == int((~read).sum()) == 10
    assert torch.allclose(found.share, read.double(), atol=1e-10)


def test_the_share_of_a_pixel_is_what_least_squares_keeps_of_it(short: Identifiability) -> None:
    """Diagonal of the projector J⁺J on the row space, by NumPy's pseudo-inverse."""
    model, x = network(), picture(SHAPE, 3, 2).double()
    from rgap.analysis.probe import probe_targets
    from rgap.update.losses import Loss

    labels = probe_targets(model, x, Loss(), None, 0)
    rows = dense_jacobian(model, x, labels, "cross_entropy")
    jacobian = torch.cat([part / part.norm() for part in rows.values()]).numpy()
    kept = np.linalg.pinv(jacobian, rcond=1e-10) @ jacobian
    assert np.allclose(np.diag(kept), short.share.flatten().numpy(), atol=1e-8)


def test_pictures_are_smooth_null_directions_of_unit_peak(short: Identifiability) -> None:
    pictures = short.pictures(3)
    assert pictures.shape == (3, 2, *SHAPE)
    assert torch.allclose(pictures.abs().flatten(1).amax(1), torch.ones(3).double())
    basis = short.null_basis.flatten(1)
    flat = pictures.flatten(1)
    assert torch.allclose(flat @ basis.T @ basis, flat, atol=1e-8)

    def rough(direction: Tensor) -> float:
        steps = [direction.diff(dim=axis).flatten() for axis in (-1, -2)]
        return float(torch.cat(steps).square().sum() / direction.square().sum())

    assert [rough(p) for p in pictures] == sorted(rough(p) for p in pictures)
    assert rough(pictures[0]) <= min(rough(p) for p in short.null_basis)
    with pytest.raises(ValueError, match=r"count >= 1, got 0; write pictures\(count=8\)"):
        short.pictures(0)


def test_full_rank_has_nothing_to_draw(full: Identifiability) -> None:
    assert full.identifiable and full.joint_nullity == 0
    assert full.pictures().shape == (0, 2, 2, 4, 4) and bool(full.determined.all())
    assert full.plot().axes[0].get_yscale() == "log"
    with pytest.raises(ValueError, match="the batch is determined; write spectra"):
        null_pictures(full)


# --- the table ------------------------------------------------------------------------------


def test_the_sequential_nullity_is_the_audits(short: Identifiability) -> None:
    table = audit(network(), SHAPE, (2,), inputs=picture(SHAPE, 3, 2).double())
    own = {row.layer: (row.unknowns, row.nullity) for row in table.rows}
    assert {row.layer: (row.own_unknowns, row.own_nullity) for row in short.rows} == own
    assert short.sequential_nullity == sum(nullity for _, nullity in own.values())


def test_words_frames_html_and_json(short: Identifiability, full: Identifiability) -> None:
    words = short.explain()
    assert f"{short.joint_nullity} directions (" in words and "singular values" in words
    assert "That is local" in full.explain()
    frame = short.to_frame()
    assert list(frame["layer"]) == ["conv0", "conv1", "fc"]
    assert list(frame["rank"]) == [row.rank for row in short.rows]
    shown = short._repr_html_()
    for row in short.rows:
        assert f"<td>{row.layer}</td>" in shown and f"<td>{row.rank}</td>" in shown
    document = json.loads(json.dumps(short.summary(), allow_nan=False))
    assert document["joint_nullity"] == short.joint_nullity == 144 - document["joint_rank"]
    assert document["identifiable"] is False


def test_without_pandas_the_message_says_what_to_install(
    short: Identifiability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'rgap\[frames\]'.*summary\(\)"):
        short.to_frame()


def test_figures_state_the_counts(short: Identifiability, full: Identifiability) -> None:
    drawn = null_pictures(short, 2)
    assert len(drawn.axes) == 2 * 3 + 2, "a row per sample, two directions and the share, two bars"
    assert f"{short.joint_nullity:,} of 144 directions" in drawn.get_suptitle()
    share = drawn.axes[2].images[0].get_array()
    assert np.allclose(share, short.share[0].mean(0).numpy())
    assert f"rank {full.joint_rank:,} of 64" in spectra(full).axes[0].get_title()
    one = identifiability(network(), picture(SHAPE, 3, 1).double())
    lines = {line.get_label(): line for line in nullity_curves([short, one]).axes[0].lines}
    assert list(lines["jointly"].get_ydata()) == [one.joint_nullity, short.joint_nullity]
    sequential = [one.sequential_nullity, short.sequential_nullity]
    assert list(lines["layer by layer"].get_ydata()) == sequential
    with pytest.raises(ValueError, match="one per batch size, got 2"):
        nullity_curves([short, short])


# --- the largest batch ----------------------------------------------------------------------


def test_the_largest_batch_is_found_by_trying_them_all() -> None:
    model = small_conv("tanh", channels=3, size=4, stride=2).double()
    found = largest_identifiable_batch(model, (2, 4, 4), largest=12)
    pictures = torch.rand(12, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    full = [
        b
        for b in range(1, 12)
        if identifiability(model, pictures[:b], sequential=False).identifiable
    ]
    assert full and found.batch_size == max(full) < found.counting_bound
    assert full == list(range(1, max(full) + 1)), "full rank at B implies it below"
    assert not found.limited and f"B = {found.batch_size}." in found.explain()
    assert "directions are missing" in found.explain()


def test_a_search_that_was_stopped_says_so() -> None:
    found = largest_identifiable_batch(small_mlp("tanh").double(), (2, 4, 4), largest=1)
    assert (found.batch_size, found.limited) == (1, True)
    assert "the largest that was allowed" in found.explain()


@pytest.mark.parametrize("largest", [0, -1, 1.5, "4"])
def test_a_limit_that_is_no_number_is_refused(largest: Any) -> None:
    with pytest.raises(ValueError, match=f"whole number >= 1, got {largest!r}; write 64"):
        largest_identifiable_batch(small_mlp("tanh"), (2, 4, 4), largest=largest)


# --- frozen, shared, absent parameters ------------------------------------------------------


def test_frozen_parameters_give_no_equations() -> None:
    model, x = small_conv("sigmoid", channels=3, size=5).double(), picture((2, 5, 5), 3, 2).double()
    labels = torch.tensor([0, 1])
    model.conv0.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    rows = dense_jacobian(model, x, labels, "cross_entropy")
    assert set(rows) == {"conv1.weight", "conv1.bias", "fc.weight"}
    scaled = torch.cat([part / part.norm() for part in rows.values()])
    rank = int(torch.linalg.matrix_rank(scaled))
    for method in ("dense", "sketch", "structured"):
        found = identifiability(model, x, labels=labels, method=method)
        assert (found.joint_rank, found.equations) == (rank, len(scaled))
        assert found.sequential_nullity is None
        assert "the gradients of all parameters" in found.explain()


@pytest.mark.parametrize("build", [tied, called_twice])
def test_structure_is_not_claimed_where_a_parameter_serves_twice(build: Any) -> None:
    """The update holds the sum of both uses: two layers' equations would count it twice."""
    with pytest.raises(ValueError, match="write method='sketch'"):
        identifiability(seeded(build), (6,), 2, method="structured")


def train_mode() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (nn.ReLU(), ((6,),), "ReLU has no parameters.*write identifiability"),
        (nn.Linear(6, 3).requires_grad_(False), ((6,),), r"frozen.*requires_grad_\(True\)"),
        (train_mode(), ((6,), 1), r"failed in 1 .BatchNorm1d.*write a batch of B >= 2"),
        (nn.Linear(6, 3), ((7,),), r"forward pass.*\(1, 7\).*the shape the model was built for"),
        (nn.Linear(6, 3), ((),), r"numbers >= 1.*write identifiability\(model, \(3, 32, 32\), 2\)"),
        (nn.Linear(6, 3), ((6,), 0), "batch_size >= 1, got"),
        (nn.Linear(6, 3), (torch.rand(6),), r"batch \[B, \*input_shape\].*unsqueeze\(0\)"),
        (nn.Linear(6, 3), (torch.rand(2, 6), 3), "expected batch_size=2.*got 3"),
        (nn.Linear(6, 3), (torch.full((1, 6), float("nan")),), "inputs has NaN or infinity"),
        (
            Written(lambda m, x: (m.fc(x), x), fc=nn.Linear(6, 3)),
            ((6,),),
            "returned a tuple.*wrap it",
        ),
    ],
)
def test_models_and_inputs_that_are_refused(model: nn.Module, arguments: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        identifiability(model, *arguments)


def test_options_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mlp("tanh")
    with pytest.raises(ValueError, match="got 'fast'; write method='auto'"):
        identifiability(model, (2, 4, 4), method="fast")
    monkeypatch.setattr(memory, "LEAST", 1.0)
    with pytest.raises(ValueError, match=r"the Jacobian of .*, or method='sketch', or a smaller"):
        identifiability(model, (2, 4, 4), method="dense", memory_budget=1e5)
    monkeypatch.undo()
    with pytest.raises(
        TypeError, match=r"got torch.uint8; for pictures write inputs.float\(\) / 255"
    ):
        identifiability(model, torch.zeros(1, 2, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="whole batch_size, got"):
        identifiability(model, (2, 4, 4), 1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        identifiability("lenet", (2, 4, 4))  # type: ignore[arg-type]


def test_model_and_random_state_are_left_as_they_were() -> None:
    model = small_conv("softplus", channels=2, size=4, norm=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = picture((2, 4, 4), 0, 2)
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), x]
    before = [t.clone() for t in tensors]  # type: ignore[union-attr]
    states = torch.get_rng_state(), random.getstate()
    first = identifiability(model, x)
    again = identifiability(model, x)
    assert first.joint_rank == again.joint_rank and torch.equal(first.null_basis, again.null_basis)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_equal_pictures_are_singular_and_the_words_do_not_call_them_lost() -> None:
    x = picture((2, 4, 4), 5, 1).double().repeat(2, 1, 1, 1)
    found = identifiability(small_mlp("tanh").double(), x, labels=torch.tensor([1, 1]))
    assert found.joint_nullity >= 32, "x + d and x − d send what x and x send, to first order"
    assert "equal pictures in a batch make the Jacobian singular" in found.explain()


@pytest.mark.parametrize("loss", ["mse_loss", "binary_cross_entropy_with_logits"])
def test_other_losses(loss: str) -> None:
    model, x = small_mlp("elu", widths=(12, 9)).double(), picture((2, 4, 4), 3, 2).double()
    targets = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)).double().round()
    rows = dense_jacobian(model, x, targets, loss)
    rank = int(torch.linalg.matrix_rank(torch.cat([p / p.norm() for p in rows.values()])))
    for method in ("dense", "structured", "sketch"):
        found = identifiability(model, x, loss=loss, labels=targets, method=method)
        assert (found.joint_rank, found.loss) == (rank, loss)
