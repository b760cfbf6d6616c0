"""The published optimisers: what each minimises and how, with the place of every constant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from rgap.plugins import Registry
from rgap.priors.generator import Decoder
from rgap.solvers.first_order import LBFGS, Adam, Cosine, Rule

__all__ = ["PRESETS", "Coordinates", "Domain", "Preset"]

DISTANCES = ("squares", "relative", "cosine")
QUARTER = 0.25  # standard deviation of pictures, in widths of their range, about


@dataclass(frozen=True)
class Coordinates:
    """Rows r of an optimiser and data x: ``x = centre + unit · r``.

    Attributes:
        centre: of the data.
        unit: of the optimiser.
        decoder: makes the data of a row; its terms are in the same units all the same.
    """

    centre: float
    unit: float
    decoder: Decoder | None = None

    def rows(self, value_range: tuple[float, float]) -> tuple[float, float]:
        """A range of the data in the optimiser's units."""
        low, high = ((end - self.centre) / self.unit for end in value_range)
        return low, high


@dataclass(frozen=True)
class Domain:
    """What of a generator is searched, and how.

    Attributes:
        over: ``"latent"``, codes; ``"features"``, what goes into later blocks, one after another;
            ``"weights"``, those of a copy for every sample.
        rule: of the steps.
        iterations: of each block.
        radius: of the ℓ1 ball around where the features of a sample begin.
        growth: of the radius, from block to block.
    """

    over: str
    rule: Rule
    iterations: int
    radius: float = inf
    growth: float = 0.0

    def __post_init__(self) -> None:
        if self.over not in ("latent", "features", "weights"):
            raise ValueError(
                f"over: expected 'latent', 'features' or 'weights', got {self.over!r}; write "
                "over='latent'"
            )


@dataclass(frozen=True)
class Preset:
    """A published optimiser, or one of your own: ``dataclasses.replace(PRESETS["ig"], ...)``.

    Attributes:
        name: what reports call it.
        distance: ``"squares"``, Σ ‖∇ − G‖²; ``"relative"``, the same over Σ ‖G‖²; ``"cosine"``,
            1 − ⟨∇, G⟩/(‖∇‖ ‖G‖).
        rule: of the steps.
        iterations: of the rule.
        normal: the optimiser works on data normalised to mean 0 and deviation 1, as its paper does:
            centre of the value range, a quarter of its width; else on the value range as [0, 1].
        boxed: the data are kept in the value range after every step.
        joint: targets are unknowns too, as logits, unless they are given.
        variation: weight of the total variation, or of the prior that is given instead.
        size: weight of the mean square of the (normalised) data.
        statistics: weight of the distance to the running statistics of batch norms.
        group: weight of the mean squared distance to the registered mean of all starts.
        noise: of a step, in multiples of its rate (Langevin).
        restarts: starts, where nobody says how many.
        labels: method of :func:`rgap.labels.estimate`.
        domains: of a generator, one after another; none: the data themselves are searched.
        evolution: generations of an evolution strategy that finds the first codes (:mod:`cma`,
            ``pip install 'rgap[evolution]'``); 0: they are drawn.
    """

    name: str
    distance: str
    rule: Rule
    iterations: int
    normal: bool
    boxed: bool
    joint: bool = False
    variation: float = 0.0
    size: float = 0.0
    statistics: float = 0.0
    group: float = 0.0
    noise: float = 0.0
    restarts: int = 1
    labels: str = "best"
    domains: tuple[Domain, ...] = ()
    evolution: int = 0

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise ValueError(
                f"distance: expected one of {', '.join(map(repr, DISTANCES))}, got "
                f"{self.distance!r}; write distance='cosine'"
            )
        if isinstance(self.evolution, bool) or not isinstance(self.evolution, int):
            raise TypeError(
                f"evolution: expected a whole number, got {self.evolution!r}; write evolution=50"
            )
        if self.evolution < 0:
            raise ValueError(
                f"evolution: expected at least 0, got {self.evolution!r}; write evolution=50"
            )
        if self.evolution and (not self.domains or self.domains[0].over != "latent"):
            raise ValueError(
                "evolution: expected a preset that begins with codes; write "
                "dataclasses.replace(rgap.matching.PRESETS['latent'], evolution=50)"
            )

    def coordinates(self, value_range: tuple[float, float] | None) -> Coordinates:
        """What the optimiser's numbers mean."""
        if value_range is None:
            return Coordinates(0.0, 1.0)
        low, high = value_range
        if self.normal:
            return Coordinates((low + high) / 2, QUARTER * (high - low))
        return Coordinates(low, high - low)


DLG = Preset("dlg", "squares", LBFGS(1.0, 100), 1200, normal=False, boxed=False, joint=True)
"""Zhu, Liu and Han, *Deep leakage from gradients* (NeurIPS 2019).

Algorithm 1: squared distance of the gradients, data and logits of the labels from N(0, 1), both
optimised.  Section 4: L-BFGS with learning rate 1, history 100, at most 20 steps a call, 1200
calls; pictures in [0, 1].

Checked: distance, starts, soft labels, rate and history against the authors' ``main.py``
(mit-han-lab/dlg, 00d4f86), which makes 300 calls; section 4 as later programs quote it, and
breaching 0.1.2's ``deepleakage``, for 1200.  The paper itself was not at hand.  Ours: an iteration
is one step, not a call of up to 20; ``iterations=24000`` makes as many.
"""

IG = Preset(
    "ig", "cosine", Adam(0.1, signed=True), 4000, normal=True, boxed=True, variation=1e-4
)  # fmt: skip
"""Geiping et al., *Inverting gradients* (NeurIPS 2020).

Equation 4: one minus the cosine of the gradients, plus total variation; data kept in the range of
pictures.  Adam on the signs of the gradient, rate 0.1, a tenth after 3/8, 5/8 and 7/8 of the
iterations, starts from N(0, 1) on normalised pictures, labels known.  4000 iterations and the
weight 1e-4 are the defaults of the authors' script ``reconstruct_image.py``.

Checked: all of these against the authors' code (JonasGeiping/invertinggradients, 0356675:
``reconstruct_image.py``, ``options.py``, ``reconstruction_algorithms.py``, ``metrics.py``); the
search also by what breaching 0.1.2 finds from the same starts, which is the same to 0.12 dB
(``benchmarks/timing/breaching.py``).  Ours: differences are averaged over all pixels, not over all
but a row or column (a factor 31/32 for pictures of 32), and their kinks are rounded off at 1e-3.
Breaching's later configuration has the weight 0.2, 24,000 iterations, and pixels beyond two borders
for 0.
"""

GRADINVERSION = Preset(
    "gradinversion",
    "relative",
    Adam(0.1, Cosine(50)),
    20000,
    normal=True,
    boxed=True,
    variation=1e-4,
    size=1e-6,
    statistics=0.1,
    group=0.01,
    noise=0.2,
    restarts=4,
    labels="gradinversion",
)
"""Yin et al., *See through gradients* (CVPR 2021), no code published.

Section 3: squared distance, total variation, l2 norm, batch-norm statistics, group consistency over
seeds with registration, noise at every step, labels by the column rule.  Section 4.1: Adam, rate
0.1, 50 iterations of warm-up, cosine decay, 20,000 iterations; weights 1e-4, 1e-6, 0.1, 0.01 and
noise 0.2.

Checked: rate, warm-up, decay, iterations and the weights of total variation, norm and statistics
against breaching 0.1.2's ``seethroughgradients`` and a reimplementation by others, which agree;
noise 0.2 times the rate against the latter, and breaching says that the paper has it, though it
takes 0.01 itself; the weight of the group against breaching's configuration alone, where it stands
as a comment, for it has no such term.  The paper itself was not at hand.  They do not agree on the
distance: breaching has 5e-5 Σ ‖∇ − G‖², the other 1e-3.  Breaching also
takes the first batch norm ten times.

Ours: the distance is taken relative to the update (a weight of ‖∇ − G‖² means another thing for
every network) and image terms are means over entries, so that the weights mean the same for every
network and size; the registration is a shift instead of an optical flow; four seeds.
"""

CODES = Domain("latent", Adam(0.03), 1000)

LATENT = Preset(
    "latent", "cosine", CODES.rule, CODES.iterations, normal=True, boxed=False, variation=1e-4,
    size=1e-6, restarts=4, domains=(CODES,),
)  # fmt: skip
"""Codes of a generator alone, the first part of the two that follow."""

GIAS = replace(LATENT, name="gias", domains=(CODES, Domain("weights", Adam(1e-3), 8000)))
"""Jeon et al., *Gradient inversion with generative image prior* (NeurIPS 2021).

Codes, then the weights of one copy of the generator for every picture, each from where the codes
ended.  Adam, rate 0.03 for codes and 1e-3 for weights, a tenth after 3/8, 5/8 and 7/8 of the
iterations; one minus the cosine of the gradients, total variation 1e-4.

Checked: both domains, the copies, rates and decay against the authors' code
(ml-postech/gradient-inversion-generative-image-prior, 5154dc1: ``reconstruction_algorithms.py``);
rate of the codes, 1000 and 8000 iterations, four starts and the weight 1e-6 of the norm against the
configuration that the authors of the next have for it.  The paper itself was not at hand.  Ours:
codes are kept while the weights move.
"""

GIFD = replace(
    LATENT, name="gifd", domains=(CODES, Domain("features", Adam(0.1), 1000, 2000.0, 1000.0))
)
"""Fang et al., *GIFD: a generative gradient inversion method with feature domain optimization*
(ICCV 2023).

Codes, then what goes into one block after another, inside an l1 ball around where it begins, of
radius 2000 and 1000 more from block to block; of all domains the batch of the lowest objective is
kept.  Adam, rate 0.1, 1000 iterations a block.

Checked: domains, their order, radii, rates and iterations against the authors' configuration for
StyleGAN2 (ffhibnese/GIFD_Gradient_Inversion_Attack, 02d13de: ``configs_stylegan2.yml``).  The paper
itself was not at hand.  Ours: rate 0.03 of the codes, as for GIAS; noises of a StyleGAN are no
unknowns; every block but the first is searched.
"""

UNTRAINED = replace(
    LATENT, name="untrained", restarts=1, domains=(Domain("weights", Adam(1e-3), 5000),)
)
"""Weights of a generator that was trained on nothing, from random codes that are held.

Source: Ulyanov, Vedaldi and Lempitsky, *Deep image prior* (CVPR 2018).  Its constants are ours.
"""

PRESETS: Registry[Preset] = Registry(
    "rgap.presets", "preset", "a Preset", lambda value: isinstance(value, Preset)
)
"""The published optimisers by name, and those that installed distributions offer."""

for _preset in (DLG, IG, GRADINVERSION, LATENT, GIAS, GIFD, UNTRAINED):
    PRESETS.register(_preset.name, _preset)
