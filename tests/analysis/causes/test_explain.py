"""Why a batch fails: each cause on an update that was made to have it, with its number."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.analysis.causes.explain import Explanation, explain
from rgap.analysis.causes.head import same_class_pairs
from rgap.analysis.causes.remedies import remedies
from rgap.halt import Halt
from rgap.labels import head_features

SHAPE = (3, 16, 16)


def pictures(count: int) -> Tensor:
    return rgap.photos.load(count, 16)


def lenet(**options) -> nn.Module:
    return rgap.models.lenet(input_shape=SHAPE, seed=0, **options)


def update_of(model: nn.Module, x: Tensor, labels: list[int], dtype=torch.float64) -> rgap.Update:
    return rgap.capture(model, x, torch.tensor(labels), dtype=dtype)


def changed(update: rgap.Update, how) -> rgap.Update:
    return replace(update, gradients={name: how(g) for name, g in update.gradients.items()})


def noisy_update(model: nn.Module, level: float) -> rgap.Update:
    """Of one picture, with noise of that standard deviation."""
    generator = torch.Generator().manual_seed(0)
    return changed(
        update_of(model, pictures(1), [3]),
        lambda g: g + level * torch.randn(g.shape, generator=generator, dtype=g.dtype),
    )


def why(model: nn.Module, update: rgap.Update, **options) -> Explanation:
    return explain(rgap.invert(model, update, complete=False), model, update, **options)


def test_an_exact_recovery_has_no_cause_and_says_what_limits_it() -> None:
    model = lenet()
    update = update_of(model, pictures(1), [3], torch.float32)
    found = why(model, update)
    assert found.causes == ()
    assert "condition of 'conv1'" in found.summary
    assert found.text.startswith("EXACT")


def test_missing_equations_are_counted_and_the_changes_recounted() -> None:
    model = lenet(channels=4)
    found = why(model, update_of(model, pictures(1), [3]))
    first = found.causes[0]
    assert (first.kind, first.place, first.number) == ("missing equations", "conv1", 228.0)
    assert "540 independent equations for 768 unknowns" in first.words
    assert "6 output channels (now 4)" in first.changes
    for channels, exact in ((5, False), (6, True)):  # the change is enough, a smaller one is not
        wider = lenet(channels=channels)
        recovery = rgap.invert(wider, update_of(wider, pictures(1), [3]), complete=False)
        assert recovery.exact is exact


def test_a_rank_that_was_not_measured_is_counted_from_the_sizes() -> None:
    model = lenet(channels=4)
    update = update_of(model, pictures(1), [3])
    short = rgap.invert(model, update)
    halt = Halt.unsolved("conv1", 768)  # as LSMR leaves a layer that no matrix fits
    layers = [replace(layer, joint_rank=None, nullity=None) for layer in short.layers]
    recovery = replace(short, halt=halt, reason=halt.reason, layers=tuple(layers))
    (first,) = explain(recovery, model, update).causes
    assert (first.kind, first.place, first.number) == ("missing equations", "conv1", 228.0)
    assert "was not measured" in first.words and "228 of 768 equations are missing" in first.words
    assert any("memory_budget" in change for change in first.changes)
    (alone,) = explain(recovery).causes
    assert (alone.kind, alone.place) == ("uncounted rank", "conv1")
    assert not any("float64" in change for change in (*first.changes, *alone.changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certified_inputs_come_first_where_targets_are_open(dtype: torch.dtype) -> None:
    model = rgap.models.mlp((32, 24), 10, "relu", input_shape=SHAPE, seed=0)
    update = rgap.capture(
        model, pictures(2), torch.tensor([3, 3]), nn.functional.multi_margin_loss, dtype=dtype
    )
    recovery = rgap.invert(model, update)
    assert recovery.certified == {"inputs"} and "multi_margin_loss is a function" in recovery.reason
    found = explain(recovery, model, update)
    assert found.summary.startswith("the inputs are recovered and certified, their targets are not")
    (first,) = found.causes
    assert first.words.startswith("The inputs are certified") and "tells 1 of 2" not in first.words
    assert first.changes == ("a batch of one, whose targets are tried, or cross_entropy",)
    unknown = replace(update, loss=rgap.Loss("unknown"))
    (cause,) = why(model, unknown).causes
    assert cause.changes == ("the loss declared, for the targets",)


def test_a_smaller_batch_is_offered_where_it_is_enough() -> None:
    changes = remedies(lenet(channels=4), SHAPE, 2, "conv2")
    assert "a batch of 1" in changes
    table = rgap.analysis.audit(lenet(channels=4), SHAPE, (1, 2))
    rows = {row.batch_size: row for row in table.rows if row.layer == "conv2"}
    assert rows[1].nullity == 0 < rows[2].nullity


def test_large_layers_are_counted_and_say_so() -> None:
    changes = remedies(rgap.models.lenet(seed=0), (3, 32, 32), 2, "conv2")
    assert changes == (
        "a batch of 1 at most",
        "stride 1 (now 2×2)",
        "16 output channels at least (now 12)",
    )
    audit = rgap.analysis.audit(rgap.models.lenet(channels=12, seed=0), (3, 32, 32), (1,))
    assert {row.layer: row.nullity for row in audit.rows}["conv2"] == 0


def test_no_changes_are_made_up() -> None:
    model = lenet()
    assert remedies(model, SHAPE, 1, "conv2") == ()  # nothing is missing
    assert remedies(model, SHAPE, 1, "nowhere") == ()
    assert remedies(model, (3, 5), 1, "conv2") == ()  # not the model's shape
    twice = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Flatten())
    twice.append(twice[0])
    assert remedies(twice, (6,), 4, "0") == ()
    bottleneck = nn.Sequential(nn.Linear(40, 2), nn.Tanh(), nn.Linear(2, 3))
    (fewer, more) = remedies(bottleneck, (40,), 4, "0")
    assert (fewer, more) == ("a batch of 2", "4 output features (now 2)")


def test_equal_labels_are_told_by_their_singular_value_and_pairs() -> None:
    model, x = lenet(), pictures(2)
    update = update_of(model, x, [3, 3], torch.float32)
    found = why(model, update, inputs=x, labels=torch.tensor([3, 3]))
    first = found.causes[0]
    assert (first.kind, first.place) == ("alike samples", "head")
    values = torch.linalg.svdvals(update.gradients["head.weight"].double())
    assert first.number == pytest.approx(float(values[1] / values[0]))
    assert first.changes[0] == "float64 gradients"
    assert len(found.pairs) == 1
    assert "tells 1 of 2 samples apart" in first.words
    sharp = update_of(model, x, [3, 3], torch.float64).gradients["head.weight"]
    second = float(torch.linalg.svdvals(sharp)[1])  # what float32 could not show
    assert found.pairs[0].value == pytest.approx(second, rel=0.3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_pair_value_is_about_the_second_singular_value(reduction: str) -> None:
    loss = rgap.Loss("cross_entropy", reduction=reduction)
    ratios = []
    for seed in range(5):
        model = rgap.models.mlp((32,), 10, "tanh", input_shape=SHAPE, seed=seed)
        x = pictures(8)[seed : seed + 2]
        update = rgap.capture(model, x, torch.tensor([4, 4]), loss, dtype=torch.float64)
        features = head_features(model, update, x)
        assert features is not None
        predictions = model.double()(x).softmax(1).detach()
        (pair,) = same_class_pairs(features, predictions, torch.tensor([4, 4]), loss)
        second = float(torch.linalg.svdvals(update.gradients["head.weight"])[1])
        ratios.append(pair.value / second)
    assert all(0.5 < ratio < 2 for ratio in ratios)


def test_more_samples_than_a_softmax_head_tells_apart() -> None:
    model = rgap.models.lenet(input_shape=SHAPE, classes=4, seed=0)
    found = why(model, update_of(model, pictures(4), [0, 1, 2, 3]))
    first = found.causes[0]
    assert (first.kind, first.number) == ("head limit", 4.0)
    assert "a batch of 3 at most" in first.changes


def test_steps_without_an_inverse() -> None:
    model = lenet(activation=nn.GELU)
    found = why(model, update_of(model, pictures(1), [3]))
    first = found.causes[0]
    assert (first.kind, first.place, first.number) == ("no inverse", "act3", 3.0)
    assert first.changes[0].startswith("complete=True")  # all equations determine it
    assert first.changes[1].startswith("an activation with an inverse")
    pooled = rgap.models.lenet5(seed=0)
    found = why(pooled, update_of(pooled, rgap.photos.load(1, 32), [3]), time_limit=1.0)
    first = found.causes[0]
    assert (first.kind, first.place) == ("no inverse", "pool2")
    assert first.number in (1.0, 2.0)  # whether winners of the lower one are told within the time
    assert "not counted here" in first.changes[0]  # at 3072 unknowns nobody waits for it
    assert "max-pool" in first.changes[1]


def test_noise_that_nobody_stated_is_estimated() -> None:
    model = lenet()
    first = why(model, noisy_update(model, 1e-3)).causes[0]
    assert (first.kind, first.place) == ("misfit", "head")
    assert first.number == pytest.approx(1e-3, rel=0.1)


def test_stated_noise_that_is_too_large_is_a_matter_of_precision() -> None:
    model = lenet()
    noisy = noisy_update(model, 1e-6)
    recovery = rgap.invert(model, noisy, noise=1e-6, complete=False)
    found = explain(recovery, model, noisy)
    (first,) = found.causes
    assert (first.kind, first.number) == ("precision", recovery.error_bound)
    assert "less noise" in first.changes[0]


def test_compressed_updates_come_first() -> None:
    model = lenet()
    update = update_of(model, pictures(1), [3])
    pruned = changed(update, lambda g: torch.where(g.abs() > g.abs().median(), g, 0 * g))
    found = why(model, pruned)
    assert found.causes[0].kind == "compressed update"
    assert found.causes[0].number == pytest.approx(0.5, abs=0.01)
    signs = why(model, changed(update, torch.sign))
    assert "one magnitude" in signs.causes[0].words


def test_an_update_of_other_weights_is_a_misfit() -> None:
    model = lenet()
    update = update_of(model, pictures(1), [3])
    wrong = dict(update.gradients)
    wrong["conv1.weight"] = 1.5 * wrong["conv1.weight"]
    found = why(model, replace(update, gradients=wrong))
    assert [cause.kind for cause in found.causes] == ["misfit"]
    assert "weights, buffers and loss" in found.causes[0].changes[0]


def test_several_answers() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 20, bias=False), nn.Tanh(), nn.Linear(20, 1, bias=False)
        ).eval()
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    update = rgap.capture(
        model, x, torch.tensor([[1.0]]), "binary_cross_entropy_with_logits", dtype=torch.float64
    )
    found = why(model, update)
    assert [(cause.kind, cause.number) for cause in found.causes] == [("several answers", 2.0)]


def test_a_recovery_alone_is_enough_for_what_it_knows() -> None:
    model = lenet(channels=4)
    recovery = rgap.invert(model, update_of(model, pictures(1), [3]), complete=False)
    found = explain(recovery)
    assert found.causes[0].kind == "missing equations"
    assert "more output channels" in found.causes[0].changes


def test_text_html_and_numbers_agree() -> None:
    model = lenet(channels=4)
    found = why(model, update_of(model, pictures(1), [3]))
    assert str(found) == found.text
    page = found._repr_html_()
    told = json.loads(json.dumps(found.numbers()))
    for cause, numbers in zip(found.causes, told["causes"], strict=True):
        assert cause.words in found.text
        assert cause.words.split("'")[-1] in page
        assert numbers["number"] == cause.number
    assert "<ol>" in page
    assert "<script" not in Explanation(found.status, "<script>", ())._repr_html_()


def test_bad_input() -> None:
    model = lenet()
    x = pictures(2)
    update = update_of(model, x, [3, 5])
    recovery = rgap.invert(model, update)
    with pytest.raises(TypeError, match="expected a Recovery, got dict"):
        explain({})
    with pytest.raises(ValueError, match="model and update together, got no update"):
        explain(recovery, model)
    with pytest.raises(ValueError, match="no model"):
        explain(recovery, update=update)
    with pytest.raises(ValueError, match="missing"):
        explain(recovery, rgap.models.cnn6(seed=0), update)
    with pytest.raises(ValueError, match=r"inputs: expected \[B, 3, 16, 16\]"):
        explain(recovery, model, update, inputs=torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="one target per sample"):
        explain(recovery, model, update, inputs=x, labels=torch.tensor([1, 2, 3]))
