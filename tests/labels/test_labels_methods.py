"""Every method on heads whose features, weights and labels are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgap import labels
from rgap.labels import METHODS, HeadGradient, LabelEstimate
from rgap.update.losses import Loss

BINARY = "binary_cross_entropy_with_logits"
COUNTING = ("best", "ilrg", "exact")
SIGNS = ("gradinversion", "llg", "llg_star")


class Client:
    """A batch at a head z = W x + b: its gradient and its truth."""

    def __init__(
        self,
        targets: list[int],
        classes: int,
        *,
        width: int = 40,
        seed: int = 0,
        bias: bool = True,
        signed: bool = False,
        spread: float = 0.3,
        loss: Loss | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        loss = loss or Loss()
        self.classes = max(classes, 2)
        self.labels = torch.tensor(targets)
        self.counts = torch.bincount(self.labels, minlength=self.classes)
        noise = torch.randn(len(targets), width, generator=g, dtype=torch.float64)
        centre = torch.rand(width, generator=g, dtype=torch.float64)
        self.features = centre + spread * noise * centre
        if not signed:
            self.features = self.features.abs()
        else:
            self.features = self.features - 0.6 * centre.mean()
        bound = width**-0.5
        self.weight = bound * (2 * torch.rand(classes, width, generator=g, dtype=torch.float64) - 1)
        self.bias = bound * (2 * torch.rand(classes, generator=g, dtype=torch.float64) - 1)
        if not bias:
            self.bias = torch.zeros_like(self.bias)
        outputs = self.features @ self.weight.T + self.bias
        targets_ = self.labels if classes > 1 else self.labels.double()
        k = loss.cotangent(outputs, targets_)
        self.head = HeadGradient(
            k.T @ self.features,
            k.sum(0) if bias else None,
            len(targets),
            self.weight,
            self.bias if bias else None,
            loss,
            probes=self.features[torch.randperm(len(targets), generator=g)],
        )

    def read(self, method: str, **changes: object) -> LabelEstimate:
        if method == "exact":
            changes.setdefault("features", self.features.flip(0))
        return METHODS[method](replace(self.head, **changes))  # type: ignore[arg-type]

    def right(self, method: str, **changes: object) -> bool:
        found = self.read(method, **changes)
        return found.counts is not None and torch.equal(found.counts, self.counts)


REPEATS = [0, 0, 0, 1, 4, 4, 7]
MORE_THAN_CLASSES = [0] * 9 + [1] * 3 + [2] * 5 + [4]


@pytest.mark.parametrize("method", COUNTING)
@pytest.mark.parametrize("targets", [[3], [0, 1, 2], REPEATS, [5] * 8], ids=len)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_counts_with_repeats(method: str, targets: list[int], signed: bool, reduction: str) -> None:
    client = Client(targets, 10, signed=signed, loss=Loss(reduction=reduction))
    found = client.read(method)
    assert found.labels is not None and found.labels.tolist() == sorted(targets)
    assert found.counts is not None and found.counts.dtype == torch.long
    assert found.present is not None and torch.equal(found.present, client.counts > 0)
    assert found.confidence.shape == (10,) and found.least > 0.5
    assert found.reason == ""


@pytest.mark.parametrize("method", COUNTING)
@pytest.mark.parametrize("smoothing", [0.1, 0.2])
def test_more_samples_than_classes_and_label_smoothing(method: str, smoothing: float) -> None:
    for seed in range(3):
        assert Client(MORE_THAN_CLASSES, 5, seed=seed, spread=0.1).right(method)
        assert Client(
            MORE_THAN_CLASSES, 5, seed=seed, spread=0.05, loss=Loss(label_smoothing=smoothing)
        ).right(method)


@pytest.mark.parametrize("method", [*COUNTING, "llg_star"])
def test_a_single_logit_is_a_head_of_two_classes(method: str) -> None:
    for targets in ([0], [1], [0, 1, 1, 0, 1, 1]):
        client = Client(targets, 1, loss=Loss(BINARY))
        found = client.read(method)
        assert client.head.classes == 2
        assert found.labels is not None and found.labels.tolist() == sorted(targets)


def test_the_identity_gives_whole_numbers_at_exact_features() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, 10, (int(torch.randint(1, 129, (1,), generator=g)),))
        smoothing = 0.2 * (seed % 2)
        client = Client(
            targets.tolist(),
            10,
            seed=seed,
            signed=True,
            spread=2.0,
            loss=Loss(label_smoothing=smoothing),
        )
        found = client.read("exact")
        assert found.estimates is not None
        assert float((found.estimates - client.counts).abs().max()) < 1e-6
        assert found.least > 1 - 1e-6 and client.right("exact")


def test_exact_refuses_features_that_are_not_the_clients() -> None:
    client = Client(REPEATS, 10)
    found = client.read("exact", features=client.features * 30)
    assert found.labels is None and "from counts" in found.reason and found.least == 0.0
    assert "features of the batch are needed" in METHODS["exact"](client.head).reason
    assert "local steps" in client.read("exact", local_steps=3).reason


def test_exact_without_a_bias_needs_independent_features_only() -> None:
    client = Client([0, 0, 3, 3, 3], 4, bias=False, signed=True, spread=2.0)
    found = client.read("exact")
    assert client.right("exact") and found.estimates is not None
    assert float((found.estimates - client.counts).abs().max()) < 1e-6
    narrow = Client([0, 0, 3, 3, 3], 4, bias=False, signed=True, spread=2.0, width=3)
    found = narrow.read("exact")
    assert found.labels is None and "linearly dependent" in found.reason


def test_without_a_bias_the_size_of_features_shows_in_an_absent_class() -> None:
    for seed in range(5):
        client = Client([1, 1, 2, 6, 6, 6], 12, bias=False, seed=seed, spread=0.1)
        for method in ("best", "ilrg"):
            found = client.read(method)
            assert client.right(method), seed
            assert "no bias" in found.reason
    crowded = Client(MORE_THAN_CLASSES, 5, bias=False)
    signed = Client([1, 1, 2], 12, bias=False, signed=True)
    for method in ("best", "ilrg"):
        found = crowded.read(method)
        assert found.labels is None and "expected B < C, got B = 18 and C = 5" in found.reason
        found = signed.read(method)
        assert found.labels is None and "both signs" in found.reason
    # A bias that is all zero but sent is enough.
    assert Client(MORE_THAN_CLASSES, 5).right("best")


@pytest.mark.parametrize("method", SIGNS)
def test_methods_that_read_signs_refuse_features_of_both(method: str) -> None:
    client = Client(REPEATS, 10, signed=True)
    found = client.read(method)
    assert found.labels is None and found.counts is None
    assert "both signs" in found.reason
    found = client.read(method, probes=None)
    assert found.labels is None and "unknown" in found.reason
    found = Client(REPEATS, 10, loss=Loss(label_smoothing=0.1)).read(method)
    assert found.labels is None and "label smoothing" in found.reason


def test_gradinversion_proves_classes_by_a_negative_entry() -> None:
    for seed in range(5):
        assert Client([8, 2, 5, 0], 10, seed=seed, spread=1.0).right("gradinversion")
        # Whatever it chooses, what it proves is so: a negative entry has no other cause.
        client = Client(REPEATS, 10, seed=seed, spread=1.0)
        found = client.read("gradinversion")
        assert found.counts is not None and int(found.counts.sum()) == len(REPEATS)
        proved = (found.confidence == 1) & (found.counts > 0)
        assert bool((client.counts[proved] > 0).all())
        assert "3 of 7 labels without proof" in found.reason
    crowded = Client(MORE_THAN_CLASSES, 5)
    found = crowded.read("gradinversion")
    assert found.labels is None and "repeat" in found.reason and found.present is not None
    assert bool((crowded.counts[found.present] > 0).all())


def test_llg_counts_by_impact() -> None:
    for seed in range(5):
        client = Client([1, 1, 1, 2, 6, 6], 100, seed=seed, spread=0.1, width=200)
        assert client.right("llg") and client.right("llg_star")
        even = Client([c for c in range(10) for _ in range(3)], 10, seed=seed, spread=0.1)
        assert even.right("llg_star"), "offsets make up for classes of equal counts"


def test_llg_star_needs_the_model() -> None:
    client = Client(REPEATS, 10)
    found = client.read("llg_star", weight=None)
    assert found.labels is None and "weight" in found.reason
    with pytest.raises(ValueError, match=r"write HeadGradient\(\.\.\., weight="):
        client.read("best", weight=None)


@pytest.mark.parametrize("bias", [True, False])
def test_rlg_says_which_classes_occur(bias: bool) -> None:
    for seed in range(3):
        client = Client([8, 2, 5, 0], 12, seed=seed, signed=True, spread=1.0, bias=bias)
        assert client.right("rlg")
        client = Client(REPEATS, 60, seed=seed, signed=True, spread=1.0, bias=bias)
        found = client.read("rlg")
        assert found.labels is None and "repeat" in found.reason
        assert found.present is not None and torch.equal(found.present, client.counts > 0)
        # Near B = C - 1 others can be separated as well, but none that occurs is missed.
        client = Client(REPEATS, 9, seed=seed, signed=True, spread=1.0, bias=bias)
        found = client.read("rlg")
        assert found.present is not None and bool(found.present[client.counts > 0].all())
    found = Client(MORE_THAN_CLASSES, 5).read("rlg")
    assert found.present is None and "expected B <= C - 1, got B = 18" in found.reason


@pytest.mark.parametrize(
    "method", ["best", "exact", "ilrg", "rlg", "llg", "llg_star", "gradinversion"]
)
@settings(max_examples=10, deadline=None)
@given(
    targets=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    seed=st.integers(0, 50),
    scale=st.floats(0.01, 100.0),
)
def test_equivariance(method: str, targets: list[int], seed: int, scale: float) -> None:
    """Names of classes do not matter, nor does a factor that moves from features to weights."""
    client = Client(targets, 8, seed=seed, spread=0.5)
    found = client.read(method)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    renamed = client.read(
        method,
        weight_gradient=client.head.weight_gradient[order],
        bias_gradient=_of(client.head.bias_gradient)[order],
        weight=client.weight[order],
        bias=client.bias[order],
    )
    scaled = client.read(
        method,
        weight_gradient=client.head.weight_gradient * scale,
        weight=client.weight / scale,
        probes=_of(client.head.probes) * scale,
        **({"features": client.features * scale} if method == "exact" else {}),
    )
    assert renamed.decided == found.decided == scaled.decided
    if found.counts is not None and found.least > 1e-3:
        assert renamed.counts is not None and scaled.counts is not None
        assert torch.equal(renamed.counts, found.counts[order])
        assert torch.equal(scaled.counts, found.counts)
    elif found.present is not None and not found.decided:
        assert renamed.present is not None and scaled.present is not None
        assert torch.equal(renamed.present, found.present[order])
        assert torch.equal(scaled.present, found.present)


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def test_best_is_ahead_where_counts_are_near_their_expectation() -> None:
    """C = 10 and B = 128 with logits that scatter: db_j is near 0 for several classes."""
    right = {"best": 0, "ilrg": 0}
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, 10, (128,), generator=g).tolist()
        client = Client(targets, 10, seed=seed, spread=0.1)
        for method in right:
            right[method] += client.right(method)
    assert right["best"] == 8 > right["ilrg"]


def test_best_says_when_logits_scatter_too_much() -> None:
    client = Client(list(range(8)) * 4, 10, spread=8.0, signed=True)
    found = client.read("best")
    assert "logits scatter" in found.reason
    assert found.least < 0.9


def test_a_gradient_of_zero_decides_nothing() -> None:
    zero = HeadGradient(
        torch.zeros(4, 3), torch.zeros(4), 2, torch.eye(4, 3), probes=torch.ones(2, 3)
    )
    for name, method in METHODS.items():
        if name != "exact":
            found = method(zero)
            assert found.labels is None and found.reason, name
            assert found.least == 0.0, name


def features(k: Tensor, given: Tensor) -> HeadGradient:
    return HeadGradient(k, None, 2, features=given)


def losing(k: Tensor, loss: Loss) -> HeadGradient:
    return HeadGradient(k, None, 2, loss=loss)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda k: HeadGradient(k, k[:, 0], 0), ValueError, "batch_size: expected at least 1"),
        (lambda k: HeadGradient(k, k[:, 0], 1.5), TypeError, "batch_size: expected whole"),
        (lambda k: HeadGradient(k[:1], None, 2), ValueError, "2 classes for cross_entropy"),
        (lambda k: HeadGradient(k, None, 2, k[:, :1]), ValueError, r"weight: expected \[4, 3\]"),
        (lambda k: features(k, k[:3]), ValueError, r"features: expected \[2, 3\], got \[3, 3\]"),
        (lambda k: features(k, k.long()[:2]), TypeError, "features: expected a floating"),
        (lambda k: HeadGradient(k, None, 2, probes=k[:, :2]), ValueError, r"expected \[N, 3\]"),
        (lambda k: HeadGradient(k * float("inf"), None, 2), ValueError, "NaN or infinity"),
        (lambda k: losing(k, Loss("mse_loss")), ValueError, "continuous targets"),
        (lambda k: losing(k, Loss(BINARY)), ValueError, "expected one logit"),
        (lambda k: losing(k, Loss(targets="probability")), ValueError, "continuous targets"),
        (lambda k: HeadGradient(k, None, 2).sums, ValueError, "a head without a bias"),
    ],
)
def test_bad_input(build: Callable[[Tensor], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build(torch.rand(4, 3) + 0.1)


def test_an_estimate_speaks_plainly() -> None:
    found = Client([3, 1, 3], 4).read("best")
    assert repr(found) == "LabelEstimate('best', labels=[1, 3, 3])"
    plain = found.summary()
    assert plain["counts"] == [0, 1, 0, 2] and plain["labels"] == [1, 3, 3]
    assert set(METHODS) == {*COUNTING, *SIGNS, "rlg", "idlg"} and labels.METHODS is METHODS
