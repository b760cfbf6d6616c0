"""The demonstration: honest about what is given, and everything it names is on disk."""

from __future__ import annotations

import functools
import io
import json

import pytest
import torch
from rich.console import Console

from rgap import capture
from rgap.analysis.discard.audit import audit
from rgap.models import published as models
from rgap.recovery import Status
from rgap.report import demo
from rgap.report.story import tell


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    """The demonstration with a quick network in CNN6's place and the closed-form audit."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(models.fcn3, input_shape=(3, 32, 32))
        patch.setattr(models, "cnn6", quick)
        patch.setattr(demo, "audit", functools.partial(audit, method="formula"))
        patch.setattr(demo, "BATCHES", (1,))
        patch.setattr(demo, "WIDTHS", (4, 8))
        return demo.run(tmp_path_factory.mktemp("demo") / "out")


def told(found: demo.Demo) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(tell(found))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_one_picture_is_recovered_and_certified(found: demo.Demo) -> None:
    assert found.certified
    for case in found.single:
        answer = case.recovery
        assert answer.status is Status.EXACT
        assert answer.labels is not None
        assert answer.labels.flatten().tolist() == list(case.labels)
        assert case.psnr is not None
        assert case.psnr[0] > 75  # what float32 allows on the hardest of these pictures
        assert answer.inputs is not None
        assert answer.error_bound is not None
        assert float((answer.inputs - case.originals).abs().max()) < answer.error_bound


def test_two_pictures_stop_at_the_layer_that_falls_short(found: demo.Demo) -> None:
    answer = found.pair.recovery
    assert answer.status is Status.UNDERDETERMINED
    assert answer.inputs is None
    assert found.pair.psnr is None
    assert (answer.layer("conv2").unknowns, answer.layer("conv2").nullity) == (6144, 1152)
    assert answer.layer("conv3").nullity == 0
    text = told(found)
    assert "Given here, not recovered" in text
    assert "1,152 of 6,144 are missing" in text


def test_what_a_narrow_residual_network_does_not_give_away_is_said(found: demo.Demo) -> None:
    answer = found.residual.recovery
    assert answer.status is Status.UNDERDETERMINED
    assert found.residual.psnr is None
    text = " ".join(told(found).split())
    assert "4 photographs with the label 5" in text
    assert f"UNDERDETERMINED: {answer.reason[:40]}" in text


def test_the_files_are_there_and_named_last(found: demo.Demo) -> None:
    assert [file.name for file in found.files] == ["recovered.png", "discard.png", "demo.json"]
    for file in found.files[:2]:
        assert file.read_bytes().startswith(b"\x89PNG")
    folder = found.files[0].parent
    assert sorted(p.name for p in folder.iterdir()) == sorted(f.name for f in found.files)
    assert str(found.files[-1]) in told(found).strip().splitlines()[-1]
    document = json.loads(found.files[2].read_text())
    assert document["pair"]["recovery"]["status"] == "UNDERDETERMINED"
    assert document["pair"]["psnr"] is None
    assert [case["recovery"]["status"] for case in document["single"]] == ["EXACT", "EXACT"]


def test_head_of_reads_what_the_gradient_is_made_of() -> None:
    model = models.mlp((16,), 5, input_shape=(1, 4, 4), seed=1).double()
    pictures, targets = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 4, 4])
    update = capture(model, pictures, targets)
    head = demo.head_of(model, update, pictures, targets)
    weight, bias = list(update.gradients.values())[-2:]
    torch.testing.assert_close(head.cotangents.T @ head.features, weight)
    torch.testing.assert_close(head.cotangents.sum(0), bias)
    assert not any(module._forward_hooks for module in model.modules())
