"""Searches over codes, features and weights of a generator."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.jacobian.module_gradient import ClientLoss
from rgap.matching.generative import within
from rgap.matching.objective import Objective
from rgap.matching.presets import PRESETS, Preset
from rgap.priors.generator import Decoder, FromBlock, FromWeights, Generator, untrained
from rgap.update.losses import Loss

SHAPE = (1, 8, 8)


def generator(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Sequential(nn.Linear(6, 32), nn.ReLU()),
            nn.Sequential(nn.Unflatten(1, (2, 4, 4)), nn.ConvTranspose2d(2, 3, 2, 2), nn.ReLU()),
            nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Sigmoid()),
        )


def client(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 5))
            .to(dtype)
            .eval()
        )


def made(seed: int, batch: int = 2) -> Tensor:
    codes = torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return generator()(codes)


def short(name: str, count: int) -> Preset:
    preset = PRESETS[name]
    domains = tuple(replace(domain, iterations=count) for domain in preset.domains)
    return replace(preset, domains=domains, restarts=2)


def sent(batch: int = 2) -> tuple[nn.Module, Tensor, rgap.Update]:
    model, x = client(), made(1, batch)
    return model, x, rgap.capture(model, x, torch.arange(batch))


@pytest.mark.parametrize("kind", ["block", "weights"])
def test_slopes_of_rows_against_autograd(kind: str) -> None:
    """Of all terms: distance, total variation, norm."""
    blocks = Generator.of(generator()).fitted(SHAPE, (0.0, 1.0), torch.zeros(1).double()).blocks
    codes = torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    decoder: Decoder = FromBlock(blocks, (2, 6)) if kind == "block" else FromWeights(blocks, codes)
    row = codes.flatten() if kind == "block" else FromWeights(blocks, codes).begin()
    model, targets = client(torch.float64), torch.tensor([0, 1])
    update = rgap.capture(model, made(1).double(), targets, dtype=torch.float64)
    preset = replace(PRESETS["latent"], variation=0.3, size=0.2)
    function = Objective(
        model, update.gradients, ClientLoss(Loss("cross_entropy"), targets), (2, *SHAPE), preset,
        replace(preset.coordinates((0.0, 1.0)), decoder=decoder),
    )  # fmt: skip
    with function.kernels():
        value, slope = function(row[None])
        torch.testing.assert_close(function.values(row[None]), value)
        for seed in range(3):
            way = torch.randn(row.shape, generator=torch.Generator().manual_seed(seed)).double()
            way *= 1e-5 / way.norm()
            ahead, behind = (float(function((row + s * way)[None])[0]) for s in (1.0, -1.0))
            expected = (ahead - behind) / 2.0
            assert abs(float(slope[0] @ way) - expected) < 1e-4 * abs(expected) + 1e-12
    assert torch.isfinite(value).all()


def test_codes_find_what_the_generator_made() -> None:
    model, x, update = sent(1)
    preset = replace(PRESETS["latent"], variation=0.0, size=0.0)
    found = rgap.match(model, update, method=preset, generator=generator(), iterations=600)
    assert found.nearest is not None
    assert float((found.nearest - x).square().mean()) < 0.1 * float((x - 0.5).square().mean())


@pytest.mark.parametrize("name", ["gias", "gifd"])
def test_later_domains_never_lose_what_was_found(name: str) -> None:
    model, _, update = sent()
    first = rgap.match(model, update, method=short("latent", 40), generator=generator())
    whole = rgap.match(model, update, method=short(name, 40), generator=generator())
    assert whole.objective <= first.objective
    blocks = 2 if name == "gifd" else 1
    assert whole.iterations == 40 * (1 + blocks) and whole.method == name


def test_weights_reach_what_codes_cannot() -> None:
    """A picture of another kind: the generator's copies bend to it."""
    model = client()
    x = rgap.photos.load(1, 8, dtype=torch.float32).mean(1, keepdim=True)
    update = rgap.capture(model, x, torch.tensor([2]))
    codes = rgap.match(model, update, method=short("latent", 300), generator=generator())
    gias = replace(PRESETS["gias"].domains[1], iterations=600)
    preset = replace(short("gias", 300), domains=(short("gias", 300).domains[0], gias))
    copies = rgap.match(model, update, method=preset, generator=generator())
    assert copies.objective < 0.5 * codes.objective


def test_an_untrained_generator_needs_no_network() -> None:
    model, _, update = sent(1)
    few, more = (rgap.match(model, update, method="untrained", iterations=n) for n in (1, 60))
    assert more.objective < few.objective and more.nearest is not None
    assert more.nearest.shape == (1, *SHAPE)
    assert float(more.nearest.min()) >= 0.0 and float(more.nearest.max()) <= 1.0


@pytest.mark.parametrize("name", ["gias", "gifd"])
@pytest.mark.parametrize("stop", [7, 33])
def test_it_goes_on_to_the_same_end(name: str, stop: int) -> None:
    """From the middle of the first domain and of the second."""
    model, _, update = sent()
    preset, seen = short(name, 20), []

    def watch(point: rgap.matching.Progress) -> bool:
        seen.append(point)
        return len(seen) == stop

    whole = rgap.match(model, update, method=preset, generator=generator())
    part = rgap.match(model, update, method=preset, generator=generator(), callback=watch)
    assert part.ended is rgap.matching.Ended.STOPPED
    again = rgap.match(
        model, update, method=preset, generator=generator(), checkpoint=part.checkpoint
    )
    assert again.objective == whole.objective and again.iterations == whole.iterations
    assert torch.equal(again.nearest, whole.nearest)
    with pytest.raises(ValueError, match="generator"):
        rgap.match(model, update, method=preset, generator=generator(3), checkpoint=part.checkpoint)


@pytest.mark.parametrize("seed", range(5))
def test_the_ball_against_its_definition(seed: int) -> None:
    """The nearest point: no other of the ball is nearer, and points inside stay."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    kept = within(rows, 1.5)
    assert bool((kept.abs().sum(1) <= 1.5 + 1e-12).all())
    others = torch.randn(200, 3, 6, generator=draw, dtype=torch.float64)
    others = others / others.abs().sum(2, keepdim=True) * 1.5
    assert bool(((kept - rows).norm(dim=1) <= (others - rows).norm(dim=2) + 1e-12).all())
    assert torch.equal(within(0.01 * rows, 1.5), 0.01 * rows)


def test_features_stay_in_their_ball() -> None:
    model, _, update = sent()
    preset = short("gifd", 30)
    tight = replace(preset.domains[1], radius=1e-9, growth=0.0)
    held = rgap.match(
        model, update, method=replace(preset, domains=(preset.domains[0], tight)),
        generator=generator(),
    )  # fmt: skip
    codes = rgap.match(model, update, method=short("latent", 30), generator=generator())
    assert torch.allclose(held.nearest, codes.nearest, atol=1e-5)


def test_the_range_of_values_is_that_of_the_data() -> None:
    wide = Generator(nn.Sequential(*generator(), nn.Tanh()), (6,), (-1.0, 1.0))
    fitted = wide.fitted(SHAPE, (0.0, 255.0), torch.zeros(1))
    codes = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    expected = 127.5 * (wide.blocks(codes) + 1.0)
    assert torch.allclose(fitted.blocks(codes), expected.detach(), atol=1e-3)
    assert all(p.requires_grad for p in wide.blocks.parameters()), "a copy"


def test_untrained_generators_have_the_shape_of_the_data() -> None:
    for shape in ((3, 32, 32), (1, 28, 28), (2, 5, 9)):
        own = untrained(shape, 0)
        with torch.no_grad():
            assert own.blocks(torch.zeros(2, *own.latent_shape)).shape == (2, *shape)
    state = torch.random.get_rng_state()
    one, two = (untrained((1, 8, 8), 4).blocks[0][0].weight for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.random.get_rng_state())


def test_bad_input_is_named() -> None:
    model, x, update = sent()
    with pytest.raises(ValueError, match="got none; write generator="):
        rgap.match(model, update, method="gifd")
    with pytest.raises(ValueError, match="write method='gifd'"):
        rgap.match(model, update, method="ig", generator=generator())
    with pytest.raises(ValueError, match="begins with codes"):
        rgap.match(model, update, method="gias", generator=generator(), start=x.double())
    with pytest.raises(ValueError, match=r"shape \[1, 8, 8\], the data's, it makes \[1, 16, 16\]"):
        rgap.match(model, update, method="gias", generator=nn.Sequential(
            *generator(), nn.Upsample(scale_factor=2)
        ))  # fmt: skip
    with pytest.raises(ValueError, match="does not say what shape"):
        rgap.match(model, update, method="gias", generator=nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        rgap.match(model, update, method="gias", generator="gan")
    with pytest.raises(ValueError, match=r"takes codes of shape \[7\]"):
        rgap.match(model, update, method="gias", generator=Generator(generator(), (7,)))
    broken = generator()
    with torch.no_grad():
        broken[2][0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 1"):
        rgap.match(model, update, method="gias", generator=broken)


def test_weights_that_are_not_there_cannot_be_searched() -> None:
    model, _, update = sent()
    fixed = Generator(nn.Sequential(nn.Sigmoid(), nn.Unflatten(1, SHAPE)), (64,))
    with pytest.raises(ValueError, match="searches its weights, it has none"):
        rgap.match(model, update, method="gias", generator=fixed)


def test_copies_of_a_generator_keep_to_the_memory_that_is_given() -> None:
    model, _, update = sent()
    wide = nn.Sequential(
        nn.Linear(6, 40000), nn.Linear(40000, 64), nn.Sigmoid(), nn.Unflatten(1, SHAPE)
    )
    with pytest.raises(ValueError, match="2 copies of a generator"):
        rgap.match(model, update, method="gias", generator=wide, memory_budget=1e8)
    latent = rgap.match(
        model, update, method="latent", generator=wide, memory_budget=1e8, iterations=1
    )
    assert latent.iterations == 1


# --- an evolution strategy for the first codes ------------------------------------------------


def numpy_state() -> bytes:
    """NumPy's global one, which is to be left as it is."""
    return np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002


def test_an_evolution_strategy_finds_better_codes_to_begin_with() -> None:
    model, _, update = sent()
    plain = replace(PRESETS["latent"], restarts=1)
    evolved = replace(plain, evolution=30)
    before, state = torch.get_rng_state(), numpy_state()
    firsts = {}
    for name, preset in (("plain", plain), ("evolved", evolved)):
        found = rgap.match(model, update, method=preset, generator=generator(), iterations=1)
        firsts[name] = found.objective
    assert firsts["evolved"] < 0.5 * firsts["plain"]
    again = rgap.match(model, update, method=evolved, generator=generator(), iterations=1)
    assert again.objective == firsts["evolved"], "the same seed, the same codes"
    other = rgap.match(model, update, method=evolved, generator=generator(), iterations=1, seed=1)
    assert other.objective != firsts["evolved"]
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_state() == state


def test_an_evolution_can_be_stopped_and_begun_anew() -> None:
    model, _, update = sent()
    preset = replace(PRESETS["latent"], evolution=20)
    told: list[str] = []

    def stop(point: rgap.matching.Progress) -> bool:
        told.append(point.what)
        return len(told) == 3

    kwargs = {"method": preset, "generator": generator(), "iterations": 3}
    first = rgap.match(model, update, callback=stop, **kwargs)  # type: ignore[arg-type]
    assert told == ["generation"] * 3 and first.ended.name == "STOPPED" and first.inputs is None
    again = rgap.match(model, update, checkpoint=first.checkpoint, **kwargs)  # type: ignore[arg-type]
    assert again.objective == rgap.match(model, update, **kwargs).objective  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 2.5, "50", True, float("inf")])
def test_generations_are_whole_numbers(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match="evolution: expected"):
        replace(PRESETS["latent"], evolution=wrong)  # type: ignore[arg-type]


def test_an_evolution_begins_with_codes_and_needs_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for preset in (PRESETS["ig"], PRESETS["untrained"]):
        with pytest.raises(ValueError, match="begins with codes"):
            replace(preset, evolution=5)
    model, _, update = sent()
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"pip install 'rgap\[evolution\]'"):
        rgap.match(
            model, update, method=replace(PRESETS["latent"], evolution=5), generator=generator()
        )
