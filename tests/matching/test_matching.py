"""Matching on small networks: each method lowers its objective and finds a small picture."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import picture, small_conv, small_mlp
from torch import Tensor, nn

import rgap
from rgap.jacobian.module_update import ClientLoss
from rgap.labels.result import LabelEstimate
from rgap.matching.objective import Objective
from rgap.matching.presets import PRESETS
from rgap.matching.search import Checkpoint, Ended, Progress
from rgap.solvers.first_order import LBFGS, Adam, Rule
from rgap.solvers.registration import registered_mean

DIRECT = [name for name, preset in PRESETS.items() if not preset.domains]  # no generator
F64 = torch.float64
X = picture((2, 4, 4), 1)
LABEL = torch.tensor([3])


def client() -> tuple[nn.Module, rgap.Update]:
    model = small_mlp("sigmoid", widths=(12,)).double()
    return model, rgap.capture(model, X, LABEL, dtype=F64, share_labels=True)


class Residual(nn.Module):
    """No chain: a block with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.nn.functional.silu(self.first(x))
        return self.head((z + torch.tanh(self.second(z))).flatten(1))


def loss_gradients(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    loss = torch.nn.functional.cross_entropy(model(x), target)
    return list(torch.autograd.grad(loss, list(model.parameters()), create_graph=True))


@pytest.mark.parametrize("name", DIRECT)
def test_an_objective_is_the_formula(name: str) -> None:
    """Term by term, written down again with plain autograd; its slope by finite differences."""
    preset = replace(PRESETS[name], group=0.0)
    model = small_conv("sigmoid", size=4, channels=3, norm=True).double()
    update = rgap.capture(model, X, LABEL, dtype=F64)
    labels = None if preset.joint else LABEL
    where = preset.coordinates((0.0, 1.0))
    objective = Objective(
        model, update.gradients, ClientLoss(update.loss, labels), (1, 2, 4, 4), preset, where
    )
    rows = torch.rand(2, objective.unknowns, dtype=F64, generator=torch.Generator().manual_seed(0))
    values, slopes = objective(rows)
    statistics: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, args: statistics.extend(_apart(m, args[0])))
    for row, value, slope in zip(rows, values, slopes, strict=True):
        statistics.clear()
        r = row[:32].reshape(1, 2, 4, 4)
        x = r if name == "dlg" else 0.5 + 0.25 * r
        target = torch.softmax(row[32:][None], 1) if labels is None else LABEL
        own, sent = loss_gradients(model, x, target), list(update.gradients.values())
        a, b = (torch.cat([t.flatten() for t in ts]) for ts in (own, sent))
        # The kinks of the total variation are rounded off at 1e-3.
        variation = (r.diff(dim=2).abs().sum() + r.diff(dim=3).abs().sum()) / r.numel()
        expected = {
            "dlg": (a - b).square().sum(),
            "ig": 1 - torch.cosine_similarity(a, b, 0) + 1e-4 * variation,
            "gradinversion": (a - b).square().sum() / b.square().sum() + 1e-4 * variation
            + 1e-6 * r.square().mean() + 0.1 * sum(statistics),
        }[name]  # fmt: skip
        assert torch.allclose(value, expected, atol=1e-6)
        one, slope_alone = objective(row[None])
        assert torch.allclose(one[0], value) and torch.allclose(slope_alone[0], slope)
        moved = objective(torch.stack([row + 1e-6 * slope, row - 1e-6 * slope]))[0]
        assert torch.allclose((moved[0] - moved[1]) / 2e-6, slope.square().sum(), rtol=1e-4)


def _apart(norm: nn.BatchNorm2d, u: Tensor) -> list[Tensor]:
    mean, var = u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0)
    assert norm.running_mean is not None and norm.running_var is not None
    return [(mean - norm.running_mean).norm(), (var - norm.running_var).norm()]


def test_a_group_pulls_to_its_registered_mean() -> None:
    model, update = client()
    alone, group = (replace(PRESETS["gradinversion"], group=g) for g in (0.0, 0.01))
    rows = torch.rand(3, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = []
    for preset in (alone, group):
        where = preset.coordinates((0.0, 1.0))
        one = Objective(
            model, update.gradients, ClientLoss(update.loss, LABEL), (1, 2, 4, 4), preset, where
        )
        found.append(one(rows))
    gap = rows - registered_mean(rows.reshape(3, 1, 2, 4, 4)).flatten()
    assert torch.allclose(found[1][0] - found[0][0], 0.01 * gap.square().mean(1))
    assert torch.allclose(found[1][1] - found[0][1], 0.02 * gap / 32)


def test_registration_undoes_shifts() -> None:
    x = rgap.photos.load(2, 8)
    versions = torch.stack([x, x, x, x.roll((1, -2), (2, 3))])
    assert torch.allclose(registered_mean(versions), x)
    assert torch.equal(registered_mean(torch.stack([X, X]).flatten(2)), X.flatten(1))


def test_deep_leakage_finds_a_picture_and_its_label() -> None:
    model, _ = client()
    update = rgap.capture(model, X, LABEL, dtype=F64)
    found = rgap.match(model, update, method="dlg", iterations=100, restarts=4)
    assert found.inputs is not None and found.labels is not None
    assert found.status is rgap.Status.COMPLETED, "a match is no certificate"
    assert found.labels.tolist() == [3] and found.iterations <= 100
    assert float((found.inputs - X).square().mean()) < 1e-6


def test_inverting_gradients_lowers_its_objective_and_nears_the_picture() -> None:
    model, update = client()
    seen: list[Progress] = []
    found = rgap.match(
        model, update, method="ig", iterations=150, restarts=2, callback=lambda p: seen.append(p)
    )
    assert found.ended is Ended.DONE and len(seen) == 151 and found.nearest is not None
    assert found.objective == min(float(p.values.min()) for p in seen) < 0.05 * seen[0].best
    assert float(found.nearest.min()) >= 0 and float(found.nearest.max()) <= 1
    assert float((found.nearest - X).square().mean()) < 0.3 * float((X - 0.5).square().mean())


def test_gradinversion_nears_the_picture_with_a_group() -> None:
    model, _ = client()
    update = rgap.capture(model, X, LABEL, dtype=F64)
    found = rgap.match(model, update, method="gradinversion", iterations=150, restarts=2)
    assert found.nearest is not None and found.nearest_labels is not None
    assert float((found.nearest - X).square().mean()) < 0.3 * float((X - 0.5).square().mean())
    assert found.nearest_labels.tolist() == [3], "by the column rule"
    assert found.summary()["method"] == "gradinversion"


def test_statistics_of_batch_norms_choose_between_batches() -> None:
    """With weight on nothing else, the batch whose statistics were kept is the better one."""
    model, own = (
        small_conv("sigmoid", size=4, norm=True).double(),
        picture((2, 4, 4), 7, 6).double(),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(own)
    model.eval()
    labels = torch.arange(6) % 5
    update = rgap.capture(model, own, labels, dtype=F64)
    preset = replace(PRESETS["gradinversion"], group=0.0, variation=0.0, size=0.0)
    shape, where = tuple(own.shape), preset.coordinates((0.0, 1.0))
    objective = Objective(
        model, update.gradients, ClientLoss(update.loss, labels), shape, preset, where
    )
    rows = torch.stack([(own - 0.5) / 0.25, (own.flip(3) * 0.5 - 0.5) / 0.25]).flatten(1)
    values = objective(rows)[0]
    assert values[0] < 0.3 < values[1], "biased and unbiased variances differ a little"


def test_gauss_newton_needs_no_chain() -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    update = rgap.capture(model, X, LABEL, dtype=F64)
    found = rgap.match(model, update)
    assert found.inputs is not None and found.labels is not None
    assert found.labels.tolist() == [3], "read off the update"
    assert found.residual is not None and found.residual < 1e-4
    assert found.status is rgap.Status.COMPLETED and "certifies nothing" in found.reason
    assert float((found.inputs - X).square().mean()) < 1e-4


@pytest.mark.parametrize("method", ["gauss_newton", *DIRECT])
def test_an_interrupted_run_goes_on_to_the_same_result(method: str, tmp_path: Path) -> None:
    """Also through a file, and for gauss_newton in the middle of annealing kinks."""
    model, update = client()
    settings = {"method": method, "iterations": 12, "restarts": 2, "seed": 5}
    if method == "gauss_newton":
        model = small_mlp("relu", widths=(8, 6)).double()
        update = rgap.capture(model, X, LABEL, dtype=F64, share_labels=True)
        settings = {**settings, "iterations": 4, "restarts": 1}
    whole = rgap.match(model, update, **settings)
    stop = whole.iterations // 2
    part = rgap.match(model, update, **settings, callback=lambda p: p.number == stop)
    assert part.ended is Ended.STOPPED and part.iterations == stop > 2
    assert part.checkpoint is not None
    part.checkpoint.save(tmp_path / "run.safetensors")
    held = Checkpoint.load(tmp_path / "run.safetensors")
    rest = rgap.match(model, update, **settings, checkpoint=held)
    assert whole.nearest is not None and rest.nearest is not None
    assert torch.equal(whole.nearest, rest.nearest) and whole.objective == rest.objective
    assert whole.iterations == rest.iterations
    with pytest.raises(ValueError, match="begin without checkpoint="):
        rgap.match(model, update, **{**settings, "seed": 3}, checkpoint=part.checkpoint)
    other = rgap.capture(model, X.flip(2), LABEL, dtype=F64, share_labels=True)
    with pytest.raises(ValueError, match="of a call with update="):
        rgap.match(model, other, **settings, checkpoint=part.checkpoint)
    update.save(tmp_path / "update.safetensors")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        Checkpoint.load(tmp_path / "update.safetensors")


def test_it_stops_early_and_in_time() -> None:
    model, update = client()
    still = rgap.match(model, update, method="ig", start=X.double(), patience=5)
    assert still.ended is Ended.STILL and still.iterations < 100
    for method in ("ig", "gauss_newton"):
        late = rgap.match(model, update, method=method, time_limit=0.0)
        assert late.ended is Ended.TIME and late.iterations == 0 and late.nearest is not None


@pytest.mark.parametrize("method", ["gauss_newton", *DIRECT])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_start_never_comes_back_worse(method: str, dtype: torch.dtype) -> None:
    model, _ = client()
    update = rgap.capture(model, X, LABEL, dtype=dtype, share_labels=True)
    start = X.double() + 1e-3 * picture((2, 4, 4), 5)
    kept = rgap.match(model, update, method=method, start=start, time_limit=0.0)
    assert kept.nearest is not None and torch.equal(kept.nearest, start)
    found = rgap.match(model, update, method=method, start=start, iterations=3, restarts=1)
    assert found.objective <= kept.objective
    if method in ("dlg", "gauss_newton"):  # their objectives have nothing but the update in them
        assert found.residual is not None and kept.residual is not None
        assert found.residual <= kept.residual * (1 + 1e-6)


def test_a_recovery_is_a_start() -> None:
    model, update = client()
    recovery = rgap.invert(model, update)
    assert recovery.inputs is not None
    found = rgap.match(model, update, method="ig", start=recovery, iterations=1)
    assert found.nearest is not None
    assert float((found.nearest - X).abs().max()) < 0.2
    with pytest.raises(ValueError, match="start: expected a batch of 1, samples of shape"):
        rgap.match(model, update, start=torch.zeros(1, 2, 3, 3))
    conv = small_conv("sigmoid", size=4, channels=1, stride=2).double()
    sent = rgap.capture(conv, X, LABEL, dtype=F64)
    with pytest.raises(ValueError, match="complete=True"):
        rgap.match(conv, sent, start=rgap.invert(conv, sent))


@pytest.mark.parametrize("method", ["ig", "gauss_newton"])
@pytest.mark.parametrize("size", [None, 1])
def test_several_local_steps_are_followed(method: str, size: int | None) -> None:
    """An average over local steps, of which no single gradient says what its data are."""
    model, x = small_mlp("sigmoid", widths=(20,)).double(), picture((2, 4, 4), 3, 2).double()
    labels, local = torch.tensor([1, 4]), rgap.LocalTraining(rate=0.5, size=size)
    after = copy.deepcopy(model)
    for step in range(4):
        rows = slice(None) if size is None else slice(step % 2, step % 2 + 1)
        loss = torch.nn.functional.cross_entropy(after(x[rows]), labels[rows])
        found = torch.autograd.grad(loss, list(after.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(after.parameters(), found, strict=True):
                parameter -= 0.5 * slope
    update = rgap.Update.from_delta(
        model, after, lr=0.5, steps=4, batch_size=2, labels=labels, input_shape=(2, 4, 4)
    )
    with pytest.raises(ValueError, match="write local="):
        rgap.match(model, update, method=method)
    at_truth = rgap.match(model, update, method=method, local=local, start=x, time_limit=0.0)
    assert at_truth.residual is not None and at_truth.residual < 1e-12
    unstated = replace(update, labels=None)
    read = rgap.match(model, unstated, method=method, local=local, time_limit=0.0)
    assert any("order over the steps" in note for note in read.warnings) == (size == 1)
    assert not at_truth.warnings
    if method == "gauss_newton":
        found_by = rgap.match(model, update, local=local)
        assert found_by.inputs is not None
        assert float((found_by.inputs - x).abs().max()) < 1e-2
    else:
        moved = rgap.match(model, update, method=method, local=local, iterations=60)
        assert moved.nearest is not None
        assert float((moved.nearest - x).square().mean()) < 0.7 * float((x - 0.5).square().mean())


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 1.0)


@pytest.mark.parametrize("method", ["gauss_newton", "ig"])
def test_not_a_number_ends_in_a_stated_way(method: str) -> None:
    model = nn.Sequential(Log(), *small_conv("sigmoid", size=4, channels=2)).double().eval()
    update = rgap.capture(model, X + 1.01, LABEL, dtype=F64, share_labels=True, value_range=None)
    update = replace(update, value_range=(0.0, 1.0))
    found = rgap.match(model, update, method=method, iterations=3)
    assert found.ended is Ended.NOT_FINITE and found.inputs is None and found.residual is None
    assert found.status is rgap.Status.UNDERDETERMINED and "not finite" in found.reason


def test_steps_that_explode_end_in_a_stated_way() -> None:
    model, update = client()
    wild = replace(PRESETS["dlg"], name="wild", rule=Adam(rate=1e200), joint=False, size=1.0)
    found = rgap.match(model, update, method=wild, iterations=20, restarts=2)
    assert found.method == "wild"
    assert found.ended is Ended.EXPLODED and found.iterations < 20
    assert found.nearest is not None and bool(found.nearest.isfinite().all())


def test_a_start_that_is_right_does_not_count_as_explosion() -> None:
    model, update = client()
    found = rgap.match(model, update, method="dlg", start=X.double(), iterations=3)
    assert found.ended is Ended.DONE and found.residual is not None and found.residual < 1e-12


def test_too_few_numbers_are_said() -> None:
    model = small_conv("sigmoid", size=8, channels=1, depth=1, stride=4).double()
    update = rgap.capture(model, picture((2, 8, 8), 1), LABEL, dtype=F64, share_labels=True)
    found = rgap.match(model, update, iterations=5)
    assert found.warnings and "for 128 unknowns" in found.warnings[0]


def test_bad_input_is_refused_with_what_to_write() -> None:
    model, update = client()
    with pytest.raises(ValueError, match="write method='ig'"):
        rgap.match(model, update, method="adam")
    with pytest.raises(ValueError, match="write distance='cosine'"):
        replace(PRESETS["ig"], distance="l1")
    with pytest.raises(ValueError, match="time_limit"):
        rgap.match(model, update, time_limit=-1.0)
    with pytest.raises(ValueError, match="restarts: expected at least 1"):
        rgap.match(model, update, restarts=0)
    with pytest.raises(ValueError, match="leave it out"):
        rgap.match(model, update, patience=3)
    with pytest.raises(ValueError, match="write batch_size=1"):
        rgap.match(model, replace(update, batch_size=None, labels=None))
    with pytest.raises(ValueError, match="9"):
        rgap.match(model, update, labels=torch.tensor([9]))
    with pytest.raises(ValueError, match="rate"):
        rgap.LocalTraining(rate=-1.0)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    sent = rgap.capture(normed.eval(), X, LABEL)
    for method in ("gauss_newton", "ig"):
        with pytest.raises(ValueError, match=r"more than 1 value.*write a batch of B >= 2"):
            rgap.match(normed.train(), sent, method=method, labels=LABEL)


@pytest.mark.parametrize("rule", [Adam(signed=True), Adam(), LBFGS(), LBFGS(history=3)])
def test_rules_follow_pytorch(rule: Rule) -> None:
    """Rows stepped together are those that torch.optim steps one by one."""
    matrix = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=F64))
    rows = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    x, state = rows.clone(), rule.begin(rows)
    for _ in range(8):
        x, state = rule.step(x, x @ matrix, state, rule.length(0, 8))
    for row, mine in zip(rows, x, strict=True):
        p = row.clone().requires_grad_()
        if isinstance(rule, LBFGS):
            torch_rule: torch.optim.Optimizer = torch.optim.LBFGS(
                [p], max_iter=8, max_eval=100, tolerance_grad=0, tolerance_change=0,
                history_size=rule.history,
            )  # fmt: skip
        else:
            torch_rule = torch.optim.Adam([p], lr=0.1)

        def closure(p: Tensor = p) -> Tensor:
            p.grad = None
            value = 0.5 * p @ matrix @ p
            value.backward()
            if isinstance(rule, Adam) and rule.signed:
                assert p.grad is not None
                p.grad.sign_()
            return value

        for _ in range(1 if isinstance(rule, LBFGS) else 8):
            torch_rule.step(closure)  # type: ignore[arg-type]
        assert torch.allclose(p, mine, atol=1e-9)


def test_a_completion_matches_where_no_closed_form_begins() -> None:
    """As many samples as classes: the head cannot tell them apart."""
    model, x = small_conv("tanh", size=4, channels=4, classes=2, depth=1), picture((2, 4, 4), 3, 2)
    update = rgap.capture(model.double(), x, torch.tensor([0, 1]), dtype=F64)
    alone = rgap.invert(model, update)
    assert alone.inputs is None and alone.nearest is None
    found = rgap.invert(model, update, complete=True)
    assert found.status is rgap.Status.COMPLETED and "matched instead" in found.reason
    assert found.inputs is not None and found.residual is not None and found.residual < 1e-3
    assert found.reason.startswith(alone.reason.split(";")[0])
    late = rgap.invert(model, update, complete=True, time_limit=1e-6)
    assert late.status is alone.status and late.inputs is None and late.nearest is not None


@pytest.mark.parametrize("labels", [[7, 2], [3, 3]])
def test_gradinversion_reads_labels_that_its_own_rule_does_not_decide(labels: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(256, 10)
    ).eval()
    update = rgap.capture(model, torch.rand(2, 3, 8, 8), torch.tensor(labels))
    found = rgap.match(model, update, method="gradinversion", iterations=1, restarts=1)
    assert found.nearest_labels.tolist() == sorted(labels)
    assert any("the labels were read off by" in warning for warning in found.warnings)


def test_labels_that_nothing_reads_are_asked_for_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model, update = client()
    unread = LabelEstimate.undecided(10, "best", (), "nothing says so")
    monkeypatch.setattr("rgap.matching.problem.estimate", lambda *_, **__: unread)
    with pytest.raises(ValueError, match="the client's own, one class index a sample") as refused:
        rgap.match(model, replace(update, labels=None), method="gradinversion", iterations=1)
    assert "tensor(" not in str(refused.value) and "nothing says so" in str(refused.value)
