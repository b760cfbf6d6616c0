"""Public entry points on networks in many idioms: an answer or one sentence, and no traceback.

``benchmarks/sweeps/idioms.py`` runs every entry point on every idiom; here each idiom meets the
cheap ones, and every third one of the others in turn.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from idioms import IDIOMS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from written import Written

import rgap
from benchmarks.sweeps.idioms import POINTS, sent, verdict
from rgap.labels import estimate, head_features
from rgap.network.running import run

CHEAP = ("capture", "labels exact")
EVERY = 3  # idiom meets one of the dear ones
DEAR = ("invert", "match", "audit", "match ig", "match dlg", "symbolic", "identifiability", "noise",
        "generic_ranks", "explain", "harden", "complete")  # fmt: skip
LABELLED = (
    "mlp", "residual", "dense", "vit", "transformer layer", "lstm", "tokens", "bag", "positions",
    "language model", "checkpoint", "reentrant checkpoint", "matmul", "own linear", "temperature",
    "learned temperature", "tuple", "dict", "dataclass", "heads", "len", "by shape", "assert",
    "branching", "float", "in place", "half", "double", "weight norm", "experts",
)  # fmt: skip
FINE = ("answer", "sentence")


def test_there_are_enough_idioms() -> None:
    assert len(IDIOMS) >= 60


@pytest.mark.parametrize(("place", "name"), list(enumerate(IDIOMS)), ids=list(IDIOMS))
@pytest.mark.filterwarnings("ignore")
def test_every_idiom_gets_an_answer_or_a_sentence(place: int, name: str) -> None:
    idiom = IDIOMS[name]
    model = idiom.network()
    truth, update = sent(idiom, model, 2)
    dear = () if place % EVERY else (DEAR[place // EVERY % len(DEAR)],)
    for point in (*CHEAP, *dear):
        found = verdict(partial(POINTS[point], idiom, model, update), truth)
        assert found in FINE, f"{point}: {found}"


@pytest.mark.parametrize(
    ("name", "point"),
    [("meta", "symbolic"), ("meta", "generic_ranks"), ("broken", "symbolic"),
     ("segmentation", "match dlg")],
)  # fmt: skip
def test_no_values_a_foreign_error_and_a_label_a_pixel(name: str, point: str) -> None:
    """What the turns of the test above leave out, and once let a traceback through."""
    idiom = IDIOMS[name]
    model = idiom.network()
    truth, update = sent(idiom, model, 2)
    found = verdict(partial(POINTS[point], idiom, model, update), truth)
    assert found == ("answer" if name == "segmentation" else "sentence")


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.filterwarnings("ignore")
def test_the_labels_need_the_last_layer_only(name: str) -> None:
    idiom = IDIOMS[name]
    model = idiom.network()
    found = estimate(model, sent(idiom, model, 2)[1])
    assert found.labels is not None and found.labels.tolist() == [0, 1]


def net(forward: object) -> nn.Module:
    torch.manual_seed(0)
    return Written(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 3)).eval()  # type: ignore[arg-type]


def test_a_failing_forward_is_named_by_its_line() -> None:
    model = net(lambda m, x: m.b(m.a(x))["logits"])
    with pytest.raises(ValueError, match=r"failed in Written at test_idioms\.py:\d+ `model = net"):
        run(model, torch.rand(2, 6))
    with pytest.raises(ValueError, match=r"failed in a \(Linear\(.*inputs of shape \(2, 4\)"):
        rgap.capture(net(lambda m, x: m.b(m.a(x))), torch.rand(2, 4), torch.tensor([0, 1]))


def test_wrapped_models_are_refused_by_name() -> None:
    inner = nn.Sequential(nn.Linear(6, 3)).eval()
    data, targets = torch.rand(2, 6), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"DataParallel.*write model\.module"):
        rgap.capture(nn.DataParallel(inner), data, targets)
    with pytest.raises(ValueError, match=r"scripted.*torch\.jit was given"):
        rgap.capture(torch.jit.script(inner), data, targets)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_changes_nothing(reentrant: bool) -> None:
    def part(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(checkpoint(lambda t: torch.tanh(m.a(t)), x, use_reentrant=reentrant))

    plain = net(lambda m, x: m.b(torch.tanh(m.a(x))))
    data, targets = torch.rand(2, 6), torch.tensor([0, 1])
    one = rgap.capture(net(part), data, targets)
    other = rgap.capture(plain, data, targets)
    for name, gradient in other.gradients.items():
        torch.testing.assert_close(one.gradients[name], gradient)
    one, other = (rgap.match(m, other, method="ig", iterations=3) for m in (net(part), plain))
    assert one.objective == pytest.approx(other.objective, rel=1e-5)


def test_a_constant_factor_behind_the_head_is_part_of_it() -> None:
    plain, scaled = (net(f) for f in (lambda m, x: m.b(m.a(x)), lambda m, x: m.b(m.a(x)) / 0.07))
    data, targets = torch.rand(5, 6), torch.tensor([0, 1, 1, 2, 2])
    update = rgap.capture(scaled, data, targets, dtype=torch.float64)
    features = head_features(plain, update, data)
    assert features is not None
    found = estimate(scaled, update, method="exact", features=features)
    assert found.counts is not None and found.counts.tolist() == [1, 2, 2]


def test_a_factor_that_depends_on_the_batch_is_refused() -> None:
    model = net(lambda m, x: m.b(m.a(x)) * x.mean())
    update = rgap.capture(model, torch.rand(2, 6), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"a number that depends on the batch|expected logits"):
        estimate(model, update)


def test_a_tied_head_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).eval()
    model[2].weight = model[0].weight
    update = rgap.capture(model, torch.rand(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="are used elsewhere as well"):
        estimate(model, update)
