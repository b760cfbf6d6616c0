"""What is determined of the data comes back, whatever is open: judged on the true data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from random_geometry import chain_of
from safetensors.torch import load_file
from torch import nn

import rgap
from rgap.inversion.places import described
from rgap.recovery import Status
from rgap.report.results import write_recovery

WHOLE = (2, 4)  # everything is determined
GENERIC = (16, 21)  # the null space of their first layer touches every entry


@pytest.mark.parametrize("seed", [*WHOLE, 7, 12, *GENERIC])  # more: benchmarks/sweeps/parts.py
def test_random_geometry_gives_what_is_determined_and_nothing_else(seed):
    net, x = chain_of(seed)
    dtype = torch.float64 if seed % 2 else torch.float32
    net, x = net.to(dtype), x.to(dtype)
    found = rgap.invert(net, rgap.capture(net, x, torch.tensor([2])))
    read = _influence(net, x) > 0
    if seed in WHOLE:
        assert found.exact and bool(read.all())
        assert (found.inputs - x).abs().max() <= found.error_bound
        return
    assert found.status is Status.UNDERDETERMINED
    assert found.inputs is None
    mask = found.determined
    if seed in GENERIC:  # directions are open that every entry is a part of
        assert mask is None and found.halt.missing > 0
        return
    assert mask.shape == found.partial.shape == x.shape
    assert torch.equal(mask, ~found.partial.isnan())
    assert (found.partial - x)[mask].abs().max() <= found.error_bound
    assert not bool((mask & ~read).any())  # nothing is claimed of what nothing reads
    assert found.labels is None or found.labels.tolist() == [2]
    assert found.summary()["determined"] == int(mask.sum())
    assert f"{int(mask.sum())} of {mask.numel()} values are determined" in found.explain()


def _influence(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Which entries the update depends on at all, by its derivative along random directions."""
    target = torch.tensor([2])

    def update(x: torch.Tensor) -> torch.Tensor:
        value = nn.functional.cross_entropy(net(x), target)
        parts = torch.autograd.grad(value, list(net.parameters()), create_graph=True)
        return sum((p * torch.ones_like(p).cumsum(-1)).sum() for p in parts)

    x = x.double().clone().requires_grad_()
    dtype = next(net.parameters()).dtype
    (slope,) = torch.autograd.grad(update(x.to(dtype)), x)
    return slope.abs()


def test_the_row_that_no_kernel_reads_is_named_and_all_others_come_back():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, (5, 3), (4, 2), (2, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(4096, 10)
    ).eval()
    x = rgap.photos.load(count=1, dtype=torch.float32)
    found = rgap.invert(net, rgap.capture(net, x, torch.tensor([3])))
    assert found.status is Status.UNDERDETERMINED
    assert int(found.determined.sum()) == 2976
    assert not bool(found.determined[:, :, 31].any())
    assert (found.partial - x)[found.determined].abs().max() <= found.error_bound < 1e-4
    assert found.labels.tolist() == [3]
    assert "the last row" in found.reason
    assert found.layers[0].unread == 96
    assert found.layers[0].unknowns == found.layers[0].joint_rank == 2976
    space = found.null_space("0", count=1)  # the directions that are open are those of the row
    assert len(space) == 1
    assert space[:, :, :, :31].abs().max() < 1e-7


def test_a_batch_gives_its_parts_picture_by_picture():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(216, 64), nn.Tanh(),
        nn.Linear(64, 8),
    ).double().eval()  # fmt: skip
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([5, 1, 3])
    found = rgap.invert(net, rgap.capture(net, x, labels))
    assert found.status is Status.UNDERDETERMINED
    assert found.determined[..., :7, :7].all()
    assert not found.determined[..., 7, :].any()
    assert found.labels.tolist() == [1, 3, 5]
    true = x[[1, 2, 0]]
    assert (found.partial - true)[found.determined].abs().max() <= found.error_bound
    assert "the last row and the last column" in found.reason


def test_entries_orthogonal_to_the_null_space_are_those_of_the_dense_reference():
    # Five filters of six read channel 0 alone: of channel 1 the equations fix sums only.
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(2, 6, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 4))
    net = net.double().eval()
    with torch.no_grad():
        net[0].weight[:5, 1] = 0.0
    x = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    update = rgap.capture(net, x, torch.tensor([0]))
    found = rgap.invert(net, update)
    jacobian = torch.autograd.functional.jacobian(lambda v: _update(net, v), x)
    values, vectors = torch.linalg.svd(jacobian.reshape(-1, x.numel()))[1:]
    rank = int((values > 1e-9 * values[0]).sum())
    fixed = vectors[rank:].norm(dim=0) < 1e-6
    assert found.status is Status.UNDERDETERMINED and 0 < int(fixed.sum()) < x.numel()
    assert torch.equal(found.determined.flatten(), fixed)
    assert (found.partial - x)[found.determined].abs().max() <= found.error_bound


def _update(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    value = nn.functional.cross_entropy(net(x), torch.tensor([0]))
    parts = torch.autograd.grad(value, list(net.parameters()), create_graph=True)
    return torch.cat([p.flatten() for p in parts])


def test_a_dead_input_of_a_fully_connected_layer_is_determined_by_its_gradient():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double().eval()
    with torch.no_grad():
        net[0].weight[:, 2] = 0.0
    x = torch.rand(1, 6, dtype=torch.float64)
    found = rgap.invert(net, rgap.capture(net, x, torch.tensor([1])))
    assert found.exact
    assert (found.inputs - x).abs().max() <= found.error_bound


def test_a_relu_of_the_data_gives_back_what_is_positive():
    torch.manual_seed(4)
    net = nn.Sequential(nn.ReLU(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double().eval()
    x = torch.randn(1, 8, dtype=torch.float64)
    update = rgap.capture(net, x, torch.tensor([1]), value_range=None)
    found = rgap.invert(net, update)
    assert found.status is Status.UNDERDETERMINED
    assert torch.equal(found.determined, x > 0)
    assert (found.partial - x)[x > 0].abs().max() <= found.error_bound


def test_unread_values_of_normalised_data_stay_open():
    torch.manual_seed(5)

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 12, 3, 2)
            self.fc = nn.Linear(108, 4)

        def forward(self, x):
            return self.fc(torch.tanh(self.conv((x - 0.5) / 0.25)).flatten(1))

    net, x = Normalised().double().eval(), torch.rand(1, 1, 8, 8, dtype=torch.float64)
    found = rgap.invert(net, rgap.capture(net, x, torch.tensor([1])))
    assert int(found.determined.sum()) == 49
    assert (found.partial - x)[found.determined].abs().max() <= found.error_bound


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ((slice(None), slice(None), slice(None), slice(-2, None)), "the last two columns"),
        ((slice(None), slice(3, 6)), "channels 3 to 5"),
        ((slice(None), slice(None), slice(None, None, 2)), "every second row from 0 to 6"),
        ((0, 2, slice(1, 3), 4), "2 values within channels 2 to 2, rows 1 to 2, columns 4 to 4"),
        ((0, slice(None), 7), "the last row of 1 pictures"),
    ],
)
def test_what_is_open_is_said_in_words(where, words):
    mask = torch.zeros(2 if words.endswith("pictures") else 1, 8, 8, 8, dtype=torch.bool)
    mask[where] = True
    assert described(mask) == words


def test_a_border_is_named_as_one():
    mask = torch.ones(1, 3, 9, 9, dtype=torch.bool)
    mask[..., 1:-1, 1:-1] = False
    assert described(mask) == "a border of 1 pixel"


def test_parts_are_written_with_a_mask_and_hatching(tmp_path):
    from PIL import Image

    net, x = chain_of(12)
    found = rgap.invert(net, rgap.capture(net, x, torch.tensor([2])))
    assert found.partial is not None
    json.dumps(found.summary(), allow_nan=False)
    folder = write_recovery(found, tmp_path / "out", (0.0, 1.0))
    kept = load_file(folder / "recovery.safetensors")
    assert torch.equal(kept["determined"], found.determined)
    assert torch.equal(kept["partial"].isnan(), ~found.determined)
    with (
        Image.open(folder / "determined-0.png") as mask,
        Image.open(folder / "picture-0.png") as picture,
    ):
        white = torch.from_numpy(np.array(mask)).flatten() == 255
        shown = torch.from_numpy(np.array(picture.convert("L"))).flatten()
    assert torch.equal(white, found.determined[0].all(0).flatten())
    assert set(shown[~white].tolist()) == {89, 166}


def test_a_completion_of_unread_values_is_never_exact():
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(1, 12, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(108, 4)).eval()
    x = torch.rand(1, 1, 8, 8)
    update = rgap.capture(net, x, torch.tensor([1]))
    found = rgap.invert(net, update, complete=True, time_limit=3.0)
    assert found.status is Status.COMPLETED
    assert bool(found.inputs.isfinite().all())
    assert torch.equal(found.inputs[found.determined], found.partial[found.determined])
    assert (found.partial - x)[found.determined].abs().max() <= found.error_bound
    again = rgap.capture(net, found.inputs.float(), found.labels)
    for name, sent in update.gradients.items():
        assert torch.allclose(again.gradients[name], sent, rtol=1e-3, atol=1e-6)


def test_the_causes_name_what_is_open():
    net, x = chain_of(12)
    update = rgap.capture(net, x, torch.tensor([2]))
    told = rgap.analysis.explain(rgap.invert(net, update), net, update)
    assert [one.kind for one in told.causes] == ["missing equations"]
    assert "read" in told.causes[0].words


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy_with_logits"])
def test_a_layer_of_another_model_above_unread_pixels_is_said_so(loss):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 64), nn.Tanh()),
        *(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 4)),
    ).eval()
    target = torch.tensor([1]) if loss == "cross_entropy" else torch.eye(4)[:1]
    update = rgap.capture(net, torch.rand(1, 1, 5, 5), target, loss=loss)
    with torch.no_grad():
        net[5].weight.add_(1e-2 * torch.randn_like(net[5].weight))
    found = rgap.invert(net, update)
    assert found.status is Status.INCONSISTENT and found.partial is None
    assert "is the update from another model" in found.reason


@pytest.mark.cases(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("labels", "seed"), [([1, 1, 1, 1], 0), ([1, 1, 1, 1], 2), ([1, 3, 1], 1)])
def test_samples_that_the_head_tells_apart_come_back_without_what_nothing_reads(
    labels, seed, dtype
):
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 1, 2, 1), nn.Tanh()),
        *(nn.Conv2d(6, 8, 2, padding=1, dilation=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(72, 10)),
    )
    net, x = net.to(dtype).eval(), torch.rand(len(labels), 3, 4, 4, dtype=dtype)
    found = rgap.invert(net, rgap.capture(net, x, torch.tensor(labels)))
    assert found.partial is not None, found.reason
    known = found.determined
    assert int(known.sum()) == len(labels) * 12 and "no kernel of '0' reads" in found.reason
    off = (found.partial[:, None] - x[None])[:, :, known[0]].abs().amax(2)
    assert float(off.amin(1).max()) <= found.error_bound
    assert len(set(off.argmin(1).tolist())) == len(labels)
