"""The networks for ImageNet: the sizes that are published, and what they are used for here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rgap
from rgap import models
from rgap.models.imagenet import skeleton
from rgap.models.spec import expected, resolve

COUNTS = {
    "resnet18": (11_689_512, 60),
    "resnet34": (21_797_672, 108),
    "resnet50": (25_557_032, 159),
    "vgg11": (132_863_336, 0),
    "vgg11_bn": (132_868_840, 24),
    "vgg13": (133_047_848, 0),
    "vgg13_bn": (133_053_736, 30),
    "vgg16": (138_357_544, 0),
    "vgg16_bn": (138_365_992, 39),
    "vgg19": (143_667_240, 0),
    "vgg19_bn": (143_678_248, 48),
    "mobilenet_v2": (3_504_872, 156),
    "densenet121": (7_978_856, 363),
    "convnext_tiny": (28_589_128, 0),
}
NAMES = {
    "resnet18": "layer2.0.downsample.1.running_mean",
    "resnet50": "layer1.0.conv3.weight",
    "vgg16": "classifier.6.bias",
    "vgg16_bn": "features.41.running_var",
    "mobilenet_v2": "features.17.conv.1.0.weight",
    "densenet121": "features.denseblock4.denselayer16.norm2.num_batches_tracked",
    "convnext_tiny": "features.7.2.layer_scale",
}
EVERY = pytest.mark.parametrize("name", COUNTS)


@EVERY
def test_parameters_and_buffers_are_as_many_as_published(name: str) -> None:
    model = skeleton(name)
    buffers = len(dict(model.named_buffers()))
    assert (sum(p.numel() for p in model.parameters()), buffers) == COUNTS[name]
    assert NAMES.get(name) in {None, *model.state_dict()}
    assert expected(name) == ((3, 224, 224), "cross_entropy")


def test_every_network_is_counted() -> None:
    assert models.IMAGENET.keys() == COUNTS.keys()
    assert not models.IMAGENET.keys() & models.BUILTIN.keys()


@pytest.mark.cases(7)
@EVERY
def test_every_network_computes_on_a_small_picture(name: str) -> None:
    """Weights are filled, not drawn: a hundred million random numbers take a while."""
    model = skeleton(name, classes=3).to_empty(device="cpu").eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        for parameter in model.parameters():
            parameter.fill_(1 / parameter[0].numel() if parameter.ndim > 1 else 0.5)
        outputs = model(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert tuple(outputs.shape) == (2, 3) and bool(outputs.isfinite().all())


def test_a_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = models.mobilenet_v2(classes=5, seed=4)
    assert torch.equal(torch.get_rng_state(), before) and not first.training
    torch.set_default_dtype(torch.float64)
    try:
        again = models.mobilenet_v2(classes=5, seed=4).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.state_dict().items())
    other = models.mobilenet_v2(classes=5, seed=5)
    assert not torch.equal(other.classifier[1].weight, first.classifier[1].weight)
    linear = first.classifier[1].weight.detach()
    assert float(linear.abs().max()) <= 1280**-0.5  # as nn.Linear draws it


def test_a_state_dict_comes_back_through_a_file(tmp_path: Path) -> None:
    state = models.resnet18(classes=5, seed=1).state_dict()
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    loaded = (
        resolve("resnet18:classes=5", file),
        models.resnet18(classes=5, seed=0, weights=state),
    )
    for model in loaded:
        found = model.state_dict()
        assert list(found) == list(state)
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_counters_of_batch_norm_may_be_missing_and_nothing_else() -> None:
    state = models.densenet121(classes=2, seed=1).state_dict()
    older = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    found = models.densenet121(classes=2, seed=0, weights=older).state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)
    del older["features.norm5.running_var"]
    with pytest.raises(ValueError, match=r"the state dict does not .* lacks 'features\.norm5\.run"):
        models.densenet121(classes=2, seed=0, weights=older)


def test_pictures_are_large_enough_and_of_any_channels() -> None:
    assert models.resnet18(2, input_shape=(1, 28, 28), seed=0).conv1.in_channels == 1
    with pytest.raises(ValueError, match=r"too small for vgg11, which takes pictures from 32×32"):
        models.vgg11(input_shape=(3, 31, 40))
    with pytest.raises(ValueError, match=r"expected \[C, H, W\]"):
        models.resnet18(input_shape=(784,))


def test_the_audit_says_up_to_which_batch_its_layers_tell_samples_apart() -> None:
    model = models.resnet18(seed=0)
    rows = rgap.analysis.audit(model, (3, 32, 32), (1,), method="formula").rows
    shifts = {row.layer: row.by_shifts for row in rows}
    assert shifts["conv1"] == 0 and shifts["layer2.0.downsample.0"] is None
    assert [shifts[f"layer{group}.1.conv2"] for group in (1, 2, 3, 4)] == [1, 8, 64, 512]
