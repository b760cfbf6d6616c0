"""Inputs at B = 1 whatever stands above the lowest fully connected layer; judged on the truth."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from prefix_networks import INPUTS_ONLY, REPLAYED, Convolved, LayerNorm, Residual, TwoHeads, sent
from torch import Tensor, nn
from torch.nn import functional as F

import rgap
from rgap.arithmetic.doubles import Doubles
from rgap.network.prefix import affine_input, find_prefix
from rgap.recovery import Status
from rgap.update.losses import Loss

BOTH = frozenset({"inputs", "targets"})


def drawn(kind: type[nn.Module], dtype: torch.dtype, seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    network = kind().to(dtype)
    network.train(kind.train_on)
    return network, torch.rand(1, *kind.shape, dtype=dtype)


@pytest.mark.parametrize("kind", REPLAYED, ids=lambda k: k.__name__)
def test_inputs_and_label_come_back_from_networks_that_are_no_chain(kind):
    for dtype, seed in ((torch.float64, 0), (torch.float32, 1)):
        network, x = drawn(kind, dtype, seed)
        label = torch.tensor([seed + 1])
        update = rgap.Update(sent(network, x, label), batch_size=1, input_shape=kind.shape)
        found = rgap.invert(network, update)
        assert found.status is Status.EXACT, found.reason
        assert found.certified == BOTH
        assert torch.equal(found.labels, label)
        assert (found.inputs - x).abs().max() <= found.error_bound < 1e-3


@pytest.mark.parametrize("kind", INPUTS_ONLY, ids=lambda k: k.__name__)
def test_inputs_come_back_where_no_replay_tells_the_target(kind):
    for dtype, seed in ((torch.float64, 0), (torch.float32, 1)):
        network, x = drawn(kind, dtype, seed)
        update = rgap.Update(
            sent(network, x, torch.tensor([2])), batch_size=1, input_shape=kind.shape
        )
        found = rgap.invert(network, update)
        assert found.status is Status.UNDERDETERMINED
        assert found.certified == {"inputs"}
        assert found.labels is None
        assert (found.inputs - x).abs().max() <= found.error_bound < 1e-3
        assert found.reason.startswith("the inputs are certified")
        assert "targets not certified" in found.reason
        assert found.summary()["certified"] == ["inputs"]


def test_the_prefix_computes_what_the_layer_takes_in():
    network, x = drawn(Convolved, torch.float64, 3)
    prefix = find_prefix(network, (1, 4, 4), Doubles(dict(network.named_parameters()), "cpu"))
    taken = []
    network.first.register_forward_hook(lambda m, args, out: taken.append(args[0]))
    network(x)
    assert [stage.name for stage in prefix.chain.stages] == ["conv", "first"]
    assert torch.allclose(affine_input(prefix.chain, x), taken[0], rtol=1e-12)


def test_a_value_that_two_layers_read_has_no_cotangent_to_go_on_with():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 16, 3, padding=1)
            self.first = nn.Linear(256, 20)
            self.second = nn.Linear(256, 20)
            self.head = nn.Linear(20, 4)

        def forward(self, x):
            h = torch.tanh(self.conv(x)).flatten(1)
            return self.head(torch.tanh(self.first(h)) * self.second(h))

    torch.manual_seed(0)
    network, x = Forked().double().eval(), torch.rand(1, 1, 4, 4, dtype=torch.float64)
    update = rgap.capture(network, x, torch.tensor([1]))
    found = rgap.invert(network, update)
    assert found.inputs is None or (found.inputs - x).abs().max() <= found.error_bound


def test_several_samples_are_not_taken_for_one():
    network, _ = drawn(Residual, torch.float64, 0)
    x = torch.rand(3, 12, dtype=torch.float64)
    gradients = sent(network, x, torch.tensor([0, 1, 2]))
    for size in (None, 1):
        update = rgap.Update(gradients, batch_size=size, input_shape=(12,))
        found = rgap.invert(network, update)
        assert found.inputs is None and not found.certified
    assert found.status is Status.INCONSISTENT and "rank one" in found.reason


def test_parallel_cotangents_of_an_unknown_batch_certify_nothing():
    # One output above a linear layer: every cotangent is a multiple of its weights, and the
    # gradient of any batch has rank one.
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 7)
            self.last = nn.Linear(7, 1)

        def forward(self, x):
            return self.last(self.first(x)).sin()

    torch.manual_seed(0)
    network, x = Narrow().double().eval(), torch.rand(3, 5, dtype=torch.float64)
    value = network(x).square().sum()
    gradients = dict(
        zip(
            ("first.weight", "first.bias", "last.weight", "last.bias"),
            torch.autograd.grad(value, list(network.parameters())),
            strict=True,
        )
    )
    found = rgap.invert(network, rgap.Update(gradients, loss="unknown", input_shape=(5,)))
    assert found.inputs is None and not found.certified


def test_a_wrong_weight_below_the_layer_is_a_contradiction():
    network, x = drawn(Convolved, torch.float64, 0)
    update = rgap.capture(network, x, torch.tensor([1]))
    with torch.no_grad():
        network.conv.weight += 0.05 * torch.randn_like(network.conv.weight)
    found = rgap.invert(network, update)
    assert found.status is Status.INCONSISTENT
    assert "conv" in found.reason


def test_a_wrong_weight_above_the_layer_leaves_the_inputs():
    network, x = drawn(LayerNorm, torch.float64, 0)
    update = rgap.capture(network, x, torch.tensor([1]))
    with torch.no_grad():
        network.head.weight += 0.05
        network.head.weight[0] -= 0.3
    found = rgap.invert(network, update)
    assert found.certified == {"inputs"} and found.labels is None
    assert (found.inputs - x).abs().max() <= found.error_bound
    assert "no target of cross_entropy reproduces the update" in found.reason


def test_parts_of_the_data_come_back_below_a_barrier():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 12, 3, 2)
            self.first = nn.Linear(108, 20)
            self.norm = nn.LayerNorm(20)
            self.head = nn.Linear(20, 4)

        def forward(self, x):
            h = torch.tanh(self.conv(x)).flatten(1)
            return self.head(torch.tanh(self.norm(self.first(h))))

    torch.manual_seed(0)
    network, x = Strided().double().eval(), torch.rand(1, 1, 8, 8, dtype=torch.float64)
    found = rgap.invert(network, rgap.capture(network, x, torch.tensor([3])))
    assert found.status is Status.UNDERDETERMINED
    assert int(found.determined.sum()) == 49
    assert (found.partial - x)[found.determined].abs().max() <= found.error_bound
    assert found.certified == {"targets"} and found.labels.tolist() == [3]


def half(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(outputs, targets) + 0.01 * outputs.square().sum()


WEIGHTS = [0.5, 1.0, 2.0, 4.0]
DECLARED = [
    (Loss(weight=WEIGHTS), None), (Loss(weight=WEIGHTS, label_smoothing=0.1), None),
    (Loss(reduction="sum", weight=WEIGHTS), None), (Loss("focal_loss", weight=WEIGHTS), None),
    (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHTS)), None),
    (Loss("sigmoid_focal_loss", alpha=0.25), None), (nn.NLLLoss(), nn.LogSoftmax(1)),
    (nn.NLLLoss(torch.tensor(WEIGHTS)), nn.LogSoftmax(1)), (nn.BCELoss(), nn.Sigmoid()),
    (nn.CrossEntropyLoss(), nn.LogSoftmax(1)), (half, None),
    (Loss("cross_entropy", targets="probability", weight=WEIGHTS), None),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "end"), DECLARED, ids=lambda v: Loss.of(v).name if v else "")
def test_every_declared_loss_gives_inputs_and_targets(loss, end, tmp_path):
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(1)
        layers = [nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)]
        network = nn.Sequential(*layers, *([end] if end else [])).to(dtype).eval()
        x, declared = torch.rand(1, 12, dtype=dtype), Loss.of(loss)
        target = torch.tensor([2])
        if declared.targets == "probability":
            target = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=dtype)
        elif declared.name.startswith(("binary", "sigmoid")):
            target = torch.tensor([[1, 0, 1, 1]])
        update = rgap.capture(network, x, target, loss)
        found = rgap.invert(network, update)
        assert found.status is Status.EXACT, found.reason
        assert (found.inputs - x).abs().max() <= found.error_bound < 1e-4
        assert torch.allclose(found.labels.double(), target.double(), atol=1e-4)
        update.save(tmp_path / "update.safetensors")
        again = rgap.Update.load(tmp_path / "update.safetensors")
        assert declared.own or again.loss == update.loss


def test_a_function_is_named_in_a_file_and_declared_again_after_it(tmp_path):
    network, x = drawn(Residual, torch.float64, 0)
    update = rgap.capture(network, x, torch.tensor([2]), half)
    update.save(tmp_path / "update.safetensors")
    loaded = rgap.Update.load(tmp_path / "update.safetensors")
    assert loaded.loss.name == "half" and not loaded.loss.known
    found = rgap.invert(network, loaded)
    assert found.certified == {"inputs"} and "dataclasses.replace(update, loss=" in found.reason
    with pytest.raises(ValueError, match=r"dataclasses\.replace"):
        rgap.capture(network, x, torch.tensor([2]), loaded.loss)
    found = rgap.invert(network, dataclasses.replace(loaded, loss=half))
    assert found.certified == BOTH and found.labels.tolist() == [2]


def test_an_unknown_loss_leaves_the_targets_open():
    network, x = drawn(LayerNorm, torch.float64, 0)
    update = rgap.capture(network, x, torch.tensor([2]), half)
    for unknown in (None, "unknown"):
        found = rgap.invert(network, dataclasses.replace(update, loss=unknown))
        assert found.certified == {"inputs"} and "the loss is not known" in found.reason
        assert (found.inputs - x).abs().max() <= found.error_bound


def test_a_function_takes_what_a_model_with_two_heads_returns():
    network, x = drawn(TwoHeads, torch.float64, 0)

    def both(outputs, targets):
        return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])

    targets = (torch.tensor([1]), torch.zeros(1, 2, dtype=torch.float64))
    update = rgap.capture(network, x, targets, both)
    found = rgap.invert(network, update)
    assert found.certified == {"inputs"}
    assert (found.inputs - x).abs().max() <= found.error_bound


def test_the_model_is_left_as_it_was():
    network, x = drawn(Convolved, torch.float64, 0)
    network.train()
    before = {n: v.clone() for n, v in network.state_dict().items()}
    gradients = sent(network, x, torch.tensor([1]))
    state = torch.get_rng_state()
    find_prefix(network, (1, 4, 4), Doubles(gradients, "cpu"))
    assert network.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not any("_recorded_input" in vars(m) for m in network.modules())


def test_train_mode_without_a_prefix_is_refused_as_before():
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    update = rgap.capture(network, torch.rand(1, 4), torch.tensor([1]))
    with pytest.raises(ValueError, match="train mode"):
        rgap.invert(network.train(), update)


class Pair(nn.Module):
    """Two fully connected layers under a normalisation, with a convolution below them or not."""

    def __init__(self, act, conv: bool, inputs: int = 16, wide: int = 36) -> None:
        super().__init__()
        self.act = act
        self.conv = nn.Conv2d(1, 8, 3, padding=1) if conv else None
        self.a = nn.Linear(8 * inputs if conv else inputs, wide)
        self.b = nn.Linear(wide, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = torch.tanh(self.conv(x))
        h = self.norm(self.b(self.act(self.a(x.flatten(1)))))
        return self.head(h + torch.sin(h))


def matched(found: Tensor, true: Tensor) -> float:
    """Largest error of any entry, each picture beside the one it is; infinite for a lost one."""
    gap = (found[:, None] - true[None]).abs().flatten(2).amax(2)
    best = gap.argmin(1)
    if sorted(best.tolist()) != list(range(len(true))):
        return float("inf")
    return float(gap.amin(1).max())


class PlacePair(Pair):
    """The same with the two layers as convolutions that have one place each."""

    def __init__(self, act, conv: bool) -> None:
        super().__init__(act, conv)
        self.a, self.b = nn.Conv2d(8 if conv else 1, 36, 4), nn.Conv2d(36, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = torch.tanh(self.conv(x))
        h = self.norm(self.b(self.act(self.a(x))).squeeze(-1).squeeze(-1))
        return self.head(h + torch.sin(h))


class TokenPair(Pair):
    """The same along [B, 1, n]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.conv is None else torch.tanh(self.conv(x))
        h = self.norm(self.b(self.act(self.a(x.flatten(1).unsqueeze(1)))))
        return self.head(h + torch.sin(h)).squeeze(1)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("made", "act", "conv"),
    [
        (Pair, torch.tanh, True), (Pair, F.gelu, False), (Pair, F.relu, True),
        (Pair, torch.sin, False), (PlacePair, torch.tanh, True), (TokenPair, F.gelu, False),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)  # fmt: skip
def test_a_batch_is_told_apart_below_what_no_equation_covers(made, act, conv):
    for size, dtype in ((2, torch.float64), (5, torch.float32)):
        torch.manual_seed(size)
        network = made(act, conv).to(dtype).eval()
        x, labels = torch.rand(size, 1, 4, 4, dtype=dtype), torch.zeros(size, dtype=torch.long)
        update = rgap.capture(network, x, labels, half)
        for loss in (half, "unknown"):
            found = rgap.invert(network, dataclasses.replace(update, loss=loss))
            assert found.certified == {"inputs"}, found.reason
            assert found.status is Status.UNDERDETERMINED and found.labels is None
            assert matched(found.inputs, x) <= found.error_bound < 1e-2
            assert "into both ranges" in found.separation


def test_a_batch_of_unknown_size_is_a_candidate_alone():
    torch.manual_seed(0)
    network, x = Pair(torch.tanh, False).double().eval(), torch.rand(3, 1, 4, 4).double()
    update = rgap.capture(network, x, torch.tensor([0, 1, 1]), share_batch_size=False)
    found = rgap.invert(network, update)
    assert found.inputs is None and not found.certified
    assert matched(found.candidates[0].inputs, x) < 1e-9
    assert "state batch_size" in found.reason


@pytest.mark.parametrize("kind", ["line", "copy", "dependent"])
def test_batches_that_the_pair_leaves_open_certify_nothing_wrong(kind):
    torch.manual_seed(0)
    act = torch.nn.Identity() if kind == "line" else torch.tanh
    network, x = Pair(act, False).double().eval(), torch.rand(3, 1, 4, 4).double()
    if kind == "copy":
        x[1] = x[0]
    if kind == "dependent":
        x[2] = (x[0] + x[1]) / 2
    found = rgap.invert(network, rgap.capture(network, x, torch.tensor([0, 1, 2])))
    due = Status.UNDERDETERMINED if kind == "copy" else Status.UNSUPPORTED
    assert found.status is due and not found.certified and found.inputs is None


@pytest.mark.parametrize("wrong", ["weights", "binary"])
def test_the_inputs_of_a_batch_come_back_beside_targets_that_fail(wrong):
    torch.manual_seed(4)
    network = nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 14)
    ).double()
    x = torch.rand(3, 20, dtype=torch.float64)
    if wrong == "binary":
        update = rgap.capture(
            network.eval(), x, torch.randint(0, 2, (3, 14)), "binary_cross_entropy_with_logits"
        )
    else:
        update = rgap.capture(network.eval(), x, torch.tensor([1, 2, 2]))
    if wrong == "weights":
        with torch.no_grad():
            network[4].bias += 0.1 * torch.randn(14, dtype=torch.float64)
    found = rgap.invert(network, update)
    assert "inputs" in found.certified, found.reason
    apart = (found.inputs[:, None] - x).abs().amax(-1)
    assert apart.amin(1).max() <= found.error_bound < 1e-9
    assert sorted(apart.argmin(1).tolist()) == [0, 1, 2]
    assert ("targets" in found.certified) is (wrong == "binary")
