"""The distance from what a generator draws, as the prior of a completion."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.machine.memory import OutOfMemory
from rgap.priors import prior_of
from rgap.priors.drawn import Drawn
from rgap.priors.generator import Generator, convolutional

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(n: int, d: int) -> tuple[Generator, Tensor]:
    line = nn.Linear(d, n, bias=False).double().requires_grad_(False)
    line.weight.copy_(draw(n, d, seed=3))
    return Generator(nn.Sequential(line), (d,)), line.weight


def curved(seed: int = 0) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = nn.Sequential(
            nn.Sequential(nn.Linear(4, 24), nn.Tanh()),
            nn.Sequential(nn.Linear(24, 36), nn.Sigmoid(), nn.Unflatten(1, (1, 6, 6))),
        )
    with torch.no_grad():
        for p in blocks.parameters():
            p.mul_(2.0)
    return Generator(blocks, (4,))


def sent(generator: Generator, labels: Tensor) -> tuple[nn.Module, Tensor, rgap.Update]:
    """What it drew, through a client that sees means of four pixels."""
    with torch.no_grad():
        picture = generator.blocks(draw(len(labels), 4, seed=8).float()).double()
    layers = nn.AvgPool2d(2), nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(3, 3)
    client = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for seed, p in enumerate(client.parameters()):
            p.copy_(0.5 * draw(*p.shape, seed=seed))
    return client, picture, rgap.capture(client, picture, labels, dtype=F64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_of_a_linear_generator_in_closed_form(spread: float, batch: int) -> None:
    """min_z ‖x − Az‖² + s² ‖z‖² = s² xᵀ (AAᵀ + s²)⁻¹ x."""
    generator, a = linear(9, 4)
    prior, x = Drawn(generator, spread, weight=2.0), draw(batch, 9)
    inner = torch.linalg.inv(a @ a.T + spread**2 * torch.eye(9, dtype=F64))
    expected = (x @ inner * x).sum() / x.numel()
    torch.testing.assert_close(prior.value(x), expected, rtol=1e-6, atol=0.0)
    slope = 2.0 * x @ inner / x.numel()
    torch.testing.assert_close(prior.gradient(x), slope, rtol=1e-5, atol=1e-8)
    v = draw(batch, 9, seed=1)
    bent = 2.0 * v @ inner / x.numel()
    torch.testing.assert_close(prior.curvature(x)(v), bent, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_gradient_is_that_of_the_value(seed: int) -> None:
    generator = curved(seed)
    generator = generator.fitted((1, 6, 6), None, torch.zeros(1, dtype=F64))
    prior = Drawn(generator, 0.1)
    with torch.no_grad():
        drawn = generator.blocks(draw(2, 4, seed=seed))
    x, v = drawn + 0.1 * draw(2, 1, 6, 6, seed=seed + 7), draw(2, 1, 6, 6, seed=seed)
    for _ in range(20):  # until the codes are those of x
        prior.value(x + 1e-9 * v)
        prior.value(x)
    step = 1e-4
    ahead, behind = float(prior.value(x + step * v)), float(prior.value(x - step * v))
    prior.value(x)
    slope = float((prior.gradient(x) * v).sum())
    assert abs((ahead - behind) / (2 * step) - slope) < 1e-3 * abs(slope) + 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_what_is_drawn_is_found_again(seed: int) -> None:
    generator = curved().fitted((1, 6, 6), None, torch.zeros(1, dtype=F64))
    codes = draw(5, 4, seed=seed)
    with torch.no_grad():
        x = generator.blocks(codes)
    fit = Drawn(generator, 1e-4).fit(x)
    off = (fit.drawn - x.flatten(1)).square().mean(1).sqrt()
    assert float(off.max()) < 1e-3


def test_codes_follow_the_data_and_fresh_ones_agree() -> None:
    generator = curved().fitted((1, 6, 6), None, torch.zeros(1, dtype=F64))
    prior, x = Drawn(generator, 0.05), torch.rand(2, 1, 6, 6, dtype=F64)
    first = float(prior.value(x))
    prior.value(x + 0.05)
    again = float(prior.value(x))
    assert again <= first * (1.0 + 1e-2)
    assert float(Drawn(generator, 0.05).value(x)) == pytest.approx(first)
    assert prior.value(torch.rand(3, 1, 6, 6, dtype=F64)).ndim == 0, "another batch size"


def test_a_completion_draws_what_equations_leave_open() -> None:
    """9 numbers of 36 pixels are known: the generator has the rest of what it drew."""
    generator = curved()
    client, picture, update = sent(generator, torch.tensor([1]))
    errors = {}
    for name, prior in (("natural", "natural"), ("drawn", generator)):
        found = rgap.invert(client, update, complete=True, prior=prior, time_limit=30.0)
        assert found.nearest is not None, found.reason
        errors[name] = float((found.nearest - picture).square().mean().sqrt())
        assert found.status is rgap.Status.COMPLETED
    assert errors["drawn"] < 0.6 * errors["natural"], errors


class Twice(torch.autograd.Function):
    """A function that has no forward derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return 2.0 * slope


class Made(nn.Module):
    """What no generator may do, by name."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.line, self.fault = nn.Linear(5, 16), fault

    def forward(self, z: Tensor) -> object:
        x: Tensor = self.line(z).reshape(-1, 1, 4, 4).sigmoid()
        broken = torch.where(z.flatten(1)[:, 0].gt(0)[:, None, None, None], float("nan"), x)
        half = x.half() if self.fault == "half" else x
        made = {
            "detached": lambda: x.detach(),
            "one": lambda: x[:1],
            "nan": lambda: x * float("nan"),
            "sometimes nan": lambda: broken,
            "flat": lambda: x.flatten(1),
            "larger": lambda: x.repeat(1, 1, 2, 2),
            "tuple": lambda: (x, z),
            "half": lambda: half,
            "random": lambda: x + 0.1 * torch.rand_like(x),
            "dropout": lambda: nn.functional.dropout(x),
            "signed": lambda: 2.0 * x - 1.0,
            "bytes": lambda: 255.0 * x,
            "narrow": lambda: x - 0.5,
            "mixed": lambda: (x - x.mean(0) + 0.5).clamp(0, 1),
            "backward only": lambda: Twice.apply(x / 2.0),
            "raises": lambda: z["data"],  # type: ignore[call-overload]
        }
        return made[self.fault]()


FAULTS = [
    ("detached", "differentiated by their codes"),
    ("one", "a sample of each code, it makes 1 of 16"),
    ("nan", "NaN or infinity of a code of zeros"),
    ("sometimes nan", r"NaN or infinity of a code of N\(0, 1\)"),
    ("flat", r"expected samples of shape \[1, 4, 4\].*write a last block that makes"),
    ("larger", r"it makes \[1, 8, 8\]; write nn.Upsample\(\(4, 4\)\) as its last block"),
    ("tuple", "expected a tensor of data, it makes a tuple"),
    ("half", "it makes torch.float16"),
    ("random", "it makes others every time"),
    ("dropout", "it makes others every time"),
    ("signed", r"of the values that it draws are outside.*value_range=\(-1"),
    ("narrow", r"of the values that it draws are outside.*value_range=\(-0\."),
    ("mixed", "of a code by itself the same data"),
    ("bytes", r"are outside.*value_range=\("),
    ("raises", r"takes codes of shape \[5\], it does not"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_what_no_generator_may_do(fault: str, words: str) -> None:
    generator = Made(fault)
    before = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=words):
        prior_of(generator, (1, 4, 4), (0.0, 1.0))
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_prior_differentiates() -> None:
    with pytest.raises(ValueError, match=r"along directions.*method='gifd'"):
        prior_of(Made("backward only"), (1, 4, 4), (0.0, 1.0))
    wide = nn.Sequential(nn.Linear(513, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
    with pytest.raises(ValueError, match=r"at most 512 numbers.*got 513.*method='gifd'"):
        prior_of(wide, (1, 4, 4), (0.0, 1.0))
    for name, value in (("spread", 0.0), ("spread", float("nan")), ("weight", -1.0)):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
            Drawn(curved(), **{"spread": 0.1, name: value})


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        (("gan", (4,)), TypeError, r"expected a torch\.nn\.Module"),
        ((nn.Identity(), 4), TypeError, "latent_shape: expected the shape"),
        ((nn.Identity(), (4, 0)), ValueError, "latent_shape: expected at least 1"),
        ((nn.Identity(), (4,), (1.0, 0.0)), ValueError, "low < high"),
        ((nn.Identity(), (4,), (0.0, float("nan"))), ValueError, "low < high"),
        ((nn.Identity(), (4,), None), TypeError, "write value_range="),
        ((nn.Identity(), (4,), 1.0), TypeError, "expected \\(low, high\\)"),
    ],
)
def test_fields_of_a_generator(fields: tuple, kind: type, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(kind, match=words):
        Generator(*fields)


def test_a_network_of_any_kind_is_a_block() -> None:
    assert len(Generator(nn.Identity(), (4,)).blocks) == 1  # type: ignore[arg-type]


class Halved(nn.Sequential):
    """Not its children alone."""

    def forward(self, z: Tensor) -> Tensor:
        made: Tensor = super().forward(z)
        return 0.5 * made + 0.5


def test_a_sequential_with_a_forward_of_its_own_is_one_block() -> None:
    layers = nn.Linear(3, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4))
    own, hooked = Halved(*layers), nn.Sequential(*layers)
    hooked.register_forward_hook(lambda module, given, made: 0.5 * made + 0.5)
    for network in (own, hooked):
        generator = Generator.of(network)
        assert len(generator.blocks) == 1 and generator.latent_shape == (3,)
        fitted, z = generator.fitted((1, 4, 4), (0.0, 255.0), torch.zeros(1)), torch.randn(5, 3)
        torch.testing.assert_close(fitted.blocks(z), 255.0 * network(z))


def test_generators_of_low_precision_and_old_norms() -> None:
    made = nn.Sequential(nn.Linear(3, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
    for dtype in (torch.bfloat16, torch.float16):
        prior = prior_of(Generator.of(made).blocks.to(dtype), (1, 4, 4), (0.0, 1.0))
        assert float(prior.value(torch.rand(2, 1, 4, 4, dtype=F64))) > 0.0
    old = nn.utils.spectral_norm(nn.Linear(3, 16))
    old(torch.randn(2, 3))
    spectral = nn.Sequential(old, nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
    with pytest.raises(ValueError, match=r"copied and frozen.*parametrizations"):
        prior_of(spectral, (1, 4, 4), (0.0, 1.0))


def test_a_search_for_codes_ends_with_the_time() -> None:
    generator = curved().fitted((1, 6, 6), None, torch.zeros(1, dtype=F64))
    x = torch.rand(2, 1, 6, 6, dtype=F64)
    late, free = (Drawn(generator, 0.05).cold(at) for at in (0.0, float("inf")))
    assert float(late.value(x)) > float(free.value(x))


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="meta device"):
        prior_of(nn.Linear(4, 6, device="meta"), (6,), None)
    with pytest.raises(ValueError, match="no shape yet"):
        Generator(nn.LazyLinear(6), (4,)).fitted((6,), None, torch.zeros(1))  # type: ignore[arg-type]


def test_a_search_begins_without_what_another_remembers() -> None:
    """The same object gives the same completion twice; so does one that was used elsewhere."""
    generator = curved().fitted((1, 6, 6), None, torch.zeros(1, dtype=F64))
    used = Drawn(generator, 0.05)
    used.value(torch.rand(2, 1, 6, 6, dtype=F64))
    x, first = torch.rand(2, 1, 6, 6, dtype=F64), Drawn(generator, 0.05)
    again = prior_of(used, (1, 6, 6), None)
    assert torch.equal(again.value(x), first.value(x))
    assert again is not used
    assert used.last.fit is not None, "the caller's own is left as it is"


def test_a_search_with_a_generator_goes_on_to_the_same_bits() -> None:
    generator = curved()
    client, _, update = sent(generator, torch.tensor([0, 1]))

    def run(**more: object) -> rgap.Matching:
        return rgap.match(client, update, prior=generator, iterations=12, restarts=2, **more)  # type: ignore[arg-type]

    whole = run()
    for end in (1, 5, 14):
        first = run(callback=lambda point, end=end: point.number >= end)
        assert first.checkpoint is not None
        rest = run(checkpoint=first.checkpoint)
        assert rest.misfit == whole.misfit
        one, other = ((m.nearest if m.inputs is None else m.inputs) for m in (rest, whole))
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["gradinversion", "latent", "gifd", "gias"])
def test_published_searches_with_a_generator_as_prior_go_on_to_the_same_bits(method: str) -> None:
    generator = curved()
    client, _, update = sent(generator, torch.tensor([0, 1]))
    made = {} if method == "gradinversion" else {"generator": curved(1)}

    def run(**more: object) -> rgap.Matching:
        return rgap.match(
            client, update, method=method, prior=generator, iterations=9, seed=1, **made, **more
        )  # type: ignore[arg-type]

    whole = run()
    for end in (2, 6):
        first = run(callback=lambda point, end=end: point.number >= end)
        rest = run(checkpoint=first.checkpoint)
        assert rest.objective == whole.objective
        assert whole.nearest is not None and rest.nearest is not None
        assert torch.equal(rest.nearest, whole.nearest)


def test_a_checkpoint_is_of_one_generator_and_one_model() -> None:
    client, _, update = sent(curved(), torch.tensor([0, 1]))

    def run(prior: Generator, model: nn.Module = client, **more: object) -> rgap.Matching:
        return rgap.match(model, update, prior=prior, iterations=6, **more)  # type: ignore[arg-type]

    held = run(curved(), callback=lambda point: point.number >= 2).checkpoint
    wider = Generator(curved().blocks, (4,), (-0.2, 1.2))
    for other in (curved(1), wider):
        with pytest.raises(ValueError, match="checkpoint: of a call with prior="):
            run(other, checkpoint=held)
    moved = copy.deepcopy(client)
    with torch.no_grad():
        moved[4].weight.mul_(1.5)
    with pytest.raises(ValueError, match="checkpoint: of a call with model="):
        run(curved(), moved, checkpoint=held)


def test_memory_of_the_slopes_is_counted() -> None:
    wide = nn.Sequential(nn.Linear(400, 3 * 64 * 64), nn.Sigmoid(), nn.Unflatten(1, (3, 64, 64)))
    client = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2))
    update = rgap.capture(client, torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))
    with pytest.raises(OutOfMemory, match="the prior of a generator needs 17"):
        rgap.match(client, update, prior=wide, memory_budget=65e6)
    with pytest.raises(OutOfMemory, match="the prior of a generator needs 17"):
        rgap.invert(client, update, complete=True, prior=wide, memory_budget=65e6)


def test_without_a_range_of_data_a_generator_is_taken_as_it_is() -> None:
    signed = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))
    x = signed(torch.zeros(1, 2)).detach().double()
    made = Generator(signed, (2,), (-1.0, 1.0))
    near, natural = prior_of(made, (1, 4, 4), None), prior_of("natural", (1, 4, 4), (-1.0, 1.0))
    assert float(near.value(x)) == pytest.approx(float(natural.value(x)), abs=1e-6)


def test_a_generator_without_parameters() -> None:
    generator = Generator(nn.Sequential(nn.Unflatten(1, (1, 4, 4))), (16,))
    x = torch.rand(2, 1, 4, 4, dtype=F64)
    prior = Drawn(generator.fitted((1, 4, 4), None, generator.like), 1.0)
    expected = x.square().sum() / (4.0 * x.numel())  # min_z (x − z)² + z² = x²/2
    torch.testing.assert_close(prior.value(x), expected, rtol=1e-5, atol=0.0)


def test_a_generator_may_be_given_as_a_prior_anywhere() -> None:
    module = convolutional((1, 8, 8), latent=3, width=2).blocks
    made = prior_of(module, (1, 8, 8), (-1.0, 1.0))
    assert float(made.value(torch.zeros(1, 1, 8, 8, dtype=F64))) >= 0.0
    with pytest.raises(ValueError, match=r"samples of shape \[3, 8, 8\]"):
        prior_of(module, (3, 8, 8), None)
    with pytest.raises(TypeError, match="a generator, or an object"):
        prior_of(3, (1, 8, 8), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of a side that 8 divides"):
        convolutional((1, 28, 28))
