"""Closed forms at given sizes: against dense matrices, against exact ranks, and their own words."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from hypothesis import given, settings
from random_layers import RandomLayer, layers, true_joint_rank
from reference import Geometry, dense_blocks, dense_rank
from reference import layers as drawn_layers
from torch import nn

import rgap
from rgap.analysis import ClosedForm, closed_form
from rgap.analysis.closed_forms.residue_classes import axis, bounds, count
from rgap.network.affine import Affine, linear
from rgap.network.chain import parse

SLICE = layers(40)  # of the five hundred of benchmarks/studies/ranks.py


def affine_of(case: Geometry) -> Affine:
    chain = nn.Sequential(case.module, nn.Flatten())
    return parse(chain, case.shape).stages[0].affine


@cache
def form_of(index: int) -> ClosedForm:
    layer = SLICE[index]
    return closed_form(layer.affine, layer.batch, layer.active)


def counted(form: ClosedForm) -> tuple[int, int, int]:
    return form.gradient_rank, form.weight_rank, form.joint_rank


@settings(max_examples=25)
@given(drawn_layers())
def test_counts_bound_the_ranks_of_dense_matrices(case: Geometry) -> None:
    """Random weights and cotangents: no rank above the count, and equal where it says exact."""
    affine = affine_of(case)
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, *affine.out_shape)
    k = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient, weight = dense_blocks(case.module, k, case.shape)
    truth = tuple(map(dense_rank, (gradient, weight, torch.cat([gradient, weight]))))
    form = closed_form(affine, case.batch)
    assert form.unknowns == case.batch * prod(case.shape)
    assert all(c >= t for c, t in zip(counted(form), truth, strict=True)), form
    assert not form.exact or form.joint_rank == truth[2]
    assert not form.gradient_exact or form.gradient_rank == truth[0]
    assert not form.weight_exact or form.weight_rank == truth[1]
    assert form.overlap == form.gradient_rank + form.weight_rank - form.joint_rank
    assert form.nullity == form.unknowns - form.joint_rank


@pytest.mark.cases(20)
@pytest.mark.parametrize("layer", SLICE, ids=lambda layer: f"{layer.index}: {layer.title}")
def test_never_below_the_truth_and_equal_where_exact(layer: RandomLayer) -> None:
    form = form_of(layer.index)
    truth = true_joint_rank(layer)
    assert all(c >= t for c, t in zip(counted(form), truth, strict=True)), (form, truth)
    assert not form.exact or form.joint_rank == truth[2]


def test_exact_nine_times_in_ten() -> None:
    assert sum(form_of(layer.index).exact for layer in SLICE) >= 0.9 * len(SLICE)


@settings(max_examples=25)
@given(drawn_layers())
def test_residue_classes_never_fall_below_the_matchings(case: Geometry) -> None:
    """Both are upper bounds on one rank; the matchings are the sharper one or as sharp."""
    affine = affine_of(case)
    if affine.geometry is None:
        return
    ranks = bounds(affine, case.batch)
    form = closed_form(affine, case.batch)
    assert ranks.weight >= (form.weight_rank if form.weight_exact else 0)
    assert ranks.gradient >= (form.gradient_rank if form.gradient_exact else 0)
    assert ranks.joint >= (form.joint_rank if form.exact else 0)


def test_published_layers_by_residue_classes() -> None:
    """CNN6-d's second convolution: K falls short of its 2160 rows, and 280 unknowns stay open."""
    one = axis(17, 3, 2, (1, 1), 1)
    assert one.classes == ((2, 8), (1, 9))
    ranks = count(1, 20, 12, 1, [one, one])
    assert (ranks.gradient, ranks.weight, ranks.joint) == (1968, 1620, 3188)
    two = axis(16, 5, 2, (2, 2), 1)
    ranks = count(2, 12, 12, 1, [two, two])
    assert (ranks.gradient, ranks.weight, ranks.joint) == (3600, 1536, 4992)


def test_groups_add_up() -> None:
    sizes = [axis(7, 3, 2, (1, 1), 1)] * 2
    alone, four = count(2, 3, 2, 1, sizes), count(2, 3, 2, 4, sizes)
    assert four.joint == 4 * alone.joint
    assert four.gradient == 4 * alone.gradient


def test_a_layer_that_reads_padding_only_has_no_equations() -> None:
    assert axis(1, 1, 3, (1, 1), 1).classes == ()
    assert count(2, 3, 2, 1, [axis(1, 1, 3, (1, 1), 1)]).joint == 0


def test_large_layers_are_counted_by_residue_classes() -> None:
    """36 → 64 filters on 9×9: too many entries for matchings; a rank at a point proves it."""
    conv5 = parse(rgap.models.cnn6d(seed=0), (3, 32, 32)).stages[4].affine
    form = closed_form(conv5, 2)
    assert form.unknowns == 2 * 36 * 81
    assert (form.joint_rank, form.exact) == (form.unknowns, True)
    assert form.reason.startswith("counted by residue classes of the stride, and reached")

    some = torch.ones(2, 64, 5, 5, dtype=torch.bool)
    some[0, 0, 0, 0] = False
    form = closed_form(conv5, 2, some)
    assert not form.exact
    assert form.weight_rank == 3199
    assert form.reason.startswith("upper bound: counted by residue classes")


def test_everything_off_leaves_everything_open() -> None:
    fc = linear("fc", torch.ones(3, 5), None, ("w", None), (5,))
    form = closed_form(fc, 2, torch.zeros(2, 3, dtype=torch.bool))
    assert (form.joint_rank, form.nullity, form.exact) == (0, 10, True)


def test_what_does_not_fit_is_refused() -> None:
    fc = linear("fc", torch.ones(3, 5), None, ("w", None), (5,))
    with pytest.raises(ValueError, match=r"expected batch >= 1, got 0; write batch=1"):
        closed_form(fc, 0)
    with pytest.raises(ValueError, match=r"'fc' \(linear\): expected active of shape \[2, 3\]"):
        closed_form(fc, 2, torch.ones(2, 4, dtype=torch.bool))
