"""Every number that decides what may be called exact, with what it is derived from.

Errors travel as an ensemble of S = 24 draws, so a standard error is itself known to ``1/√(2S)``,
some 14%.  Two things make an honest error longer than independent draws predict, and
both are bounded by counting terms: rounding that adds up with one sign over n terms is √n times
as long as with random signs, and the largest of N entries lies at ``√(2 ln N)`` standard errors.
A limit is wide enough for both, and far below what a wrong answer misses by: another label, root,
sign or model changes gradient entries by a share of themselves, ``1/u`` units of rounding u.

"Chance" below is that of a right answer to be refused, or of a wrong one to pass, per decision, if
errors are normal.  Limits of effort (iterations, members, memory, sizes) stay where they are used:
they decide how an answer is looked for, never whether it stands.
"""

from __future__ import annotations

import torch

# --- Residuals, in standard errors -----------------------------------------------------------

# Weighted rms residual of one parameter above which equations, a label, a root or a sign are
# refuted.  The rms of N normal residuals is 1 ± 1/√(2N); even N = 1 is above 100 with chance
# e^-5000, so only coherent rounding gets there: over more than 100² = 10,000 terms of one sign.
REFUTED = 100.0

# The same up to which the update counts as reproduced.  N = 1 exceeds it with chance 2e-23;
# rounding of one sign over 100 terms is allowed for.  Between the two an answer is neither.
FITS = 10.0

# Standard errors in an error bound, and by which a replay may differ.  The largest of N = 10^6
# normal entries exceeds 10 of them, even if these are a third too small (more than twice the
# ensemble's own 14%), with chance N·P(|g| > 6.7) = 3e-5.
SAFETY = 10.0

# Standard errors above 0 from which a unit of a ReLU is on.  A unit that is off seems on with
# chance 1e-9 (one side), any of 10^5 with 1e-4; what follows from it is tested by REFUTED.
ON = 6.0

# Standard errors of a filter's cotangent k, at least, that make its row ``K u = G`` an equation.
# Below them k seems to be there where it is 0 with chance 6e-5, less than FALSELY, and least
# squares shrink what it is multiplied with: by 1/(1 + 4²), 6%, at this limit, towards a u = 0 at
# which k's error counts for nothing.  One such row tells u to a quarter, less than is USEFUL; many
# with independent noise tell more together, which is why the limit is not ON.
HEARD = 4.0

# Units, on average, whose state errors may have turned, from which a contradiction below them
# refutes nothing: one in ten updates has one then.
MISTAKEN = 0.1

# Filters of which a unit was mistaken miss their gradients where all others agree.  Left out
# together are those that miss by this share of the worst: what that one alone does to others,
# through the input that they share, is less in a layer that is wide.  Where a quarter of them has
# to go, fewer equations test what is left, and the contradiction stands.
APART_BY, MOSTLY = 0.5, 0.75

# Share of the largest slope by which that of a unit changes within ON standard errors of a kink:
# all of it for ReLU.  A smooth activation changes as much only where z is known to a tenth of its
# width.
KINK = 0.1

# Standard errors of noise by which an entry of a head's gradient may have the wrong sign before
# the targets that it contradicts are left out: chance 1e-9 an entry, as for ON.
SIGN = 6.0

# Of a sum of squared noise Σe² about Σσ²: in units of √Σσ⁴, of which a standard deviation is √2.
# 10/√2 = 7 of them.  Few entries have the heaviest tail: a single one is beyond with chance 9e-4,
# 100 alike with 1e-8.
SCATTER = 10.0

# Size of a gradient in float64 over that in float32, below which it is what rounding leaves of
# terms that cancel: 2^-29 for those, 1 for all others unless the rounding of float32 is as large as
# they are.  Half way between the two, in powers of 2.
VOID = 2.0**-14

# --- Targets ---------------------------------------------------------------------------------

# Times the largest entry of an ensemble that a target may be off by.  The largest of S·C draws
# with S = 24 and C = 2 to 100 is at 2.5 to 3.7 standard errors (mean of the largest), so 75 to 110
# of them: REFUTED, for one entry.
ENSEMBLE = 30.0

# Tolerance of a target, in units of what tells two targets apart (1 for classes), above which it
# is open.  Half way to the next label, 0.5, is then 0.5·30/8 = 1.9 times the largest draw, 4.7 to
# 6.9 standard errors: chance of reading the wrong one at most 3e-6.
UNTOLD = 8.0

# Distance from the nearest target, in the same units: at 0.5 the next is as near.  Half of that,
# so that the right one is at least three times as near as any other.
NEAREST = 0.25

# Share of themselves, or of 1, by which stated real-valued targets may differ from those that are
# read: what is typed in has three digits.
STATED = 1e-3

# Two cotangents are told apart if their distance is above this many tolerances: both have one.
APART = 2.0

# Rounding units of a logit, relative to the largest of them, of sums of up to 16² = 256 terms
# with random signs, and of a softmax that is fed with it: no ensemble draws the head's forward.
LOGIT = 16.0

# Rounding units of a softmax beside p ≤ 1: exponential, sum, quotient, difference.
PROBABILITY = 4.0

# Rows of soft targets that a client stored in float32 sum to 1 up to 8 rounding units.
NORMALISED = 8 * torch.finfo(torch.float32).eps

# --- Rounding --------------------------------------------------------------------------------

# Times the rounding of a tensor, measured by one draw or counted as one unit an entry, that what
# is made of an answer may differ from what was sent: the coherent sum of 10,000 terms.
ROUNDED = 100.0
# Units of rounding by which a sample may be too long where the update contradicts its declaration
# and another layer hears a change: SAFETY times what a replay allows, once for G and once for ∂b.
UNHEARD = 2000.0
# Members of an answer's ensemble that are replayed at most, those after the first two in the
# client's own arithmetic.  Where m units lie within rounding of a kink, each of six draws has none
# on the other side with e^-m: all have none with e^-6m.
REPLAYS = 8

# Share of ‖G u‖ by which α k(α) may miss where rounding says less: α is a root of one entry, found
# to 1e-15 of itself, and where the loss is flat k is known to the square root of that only.
ROOT = 1e-9

# Share of itself to which a root of one equation is narrowed down, and its standard error at least:
# a tenth more than 4 eps, the least that the search takes.  Features of exactly 1 are else told
# from the asymptote of a sigmoid by what the search has left.
FOUND = 1e-15

# Rounding units of float64 that can gather in one entry behind a decomposition: SAFETY times the
# three passes (projection, factor, substitution) that each add one.
PASSES = 3.0

# Share of the client's rounding to which layers are solved: what that leaves of an entry, beside
# the largest one, counts as its error: nothing beside the rounding of any sum but one of zeros.
SOLVED = 1e-3

# --- Directions ------------------------------------------------------------------------------

# Standard error of a direction, in units of the data, above which it is open.  A certificate
# needs CLEAR times less, so that SAFETY·DETERMINED/CLEAR = USEFUL: the worst direction alone
# cannot use up the error bound.
DETERMINED = 0.1
CLEAR = 10.0

# Error bound, in widths of the value range, above which an answer certifies nothing.
USEFUL = 0.1

# Standard error of a direction, in units of a sample's norm, from which a separation is given up.
# A threshold of effort with a margin: the certificate asks DETERMINED/CLEAR, 30 times less.
SEPARABLE = 0.3

# Difference of two least-squares runs, of that of their starts, up to which a matrix-free solve is
# gone on with: runs end at 1e-13 of how far they started, times a condition of up to 10^10.
AGREE = 1e-3

# Chance that two random starts would end this near although one direction is open, up to which
# their agreement is a certificate.  See :class:`rgap.solvers.rank.Evidence`.
UNSEEN = 1e-3

# Condition up to which a Cholesky factor proves full rank: it exists for singular matrices once
# rounding, n·eps of σ₁² with n = 4000, lifts the zero to σ/σ₁ = 1e-6.
TRUSTED = 1e6
# Condition beyond which rounding of the normal matrix leaves its factor nothing of the smallest
# directions: refinement gains 1/(κ² n·eps) a step on the equations themselves.
HOPELESS = 1e10

# σ/σ₁ of a matrix of slopes, computed in float64 with up to 1000 rows, below which a direction is
# taken away: 1000·eps = 2e-13, and 500 times that for the slopes' own rounding.
VANISHING = 1e-10
# The same for cotangents of targets that differ by rounding of their sums, m = 4096 of them.
FREE = 1e-9

# Norm of an entry's row of the open directions' basis up to which it is determined: rows are 0 up
# to n·eps/(relative gap of the eigenvalues, 1e-6 at least); what is left is part of its error.
ROW = 1e-6
# Times the rounding of the largest eigenvalue from which an eigenvalue is told from 0.
EIGENVALUE = 100.0

# Share of ‖∂b‖² that must be signal for x = Gᵀ∂b/‖∂b‖² to say anything: below a half the
# correction for the noise is larger than what it corrects.
DROWNED = 0.5

# --- Samples of a batch ----------------------------------------------------------------------

# Share of a cotangent outside the range of the gradient that an admitted target may have: random
# ones have √(1 − R/m), rounding σ₁u/σ_R; a rival must miss by BETTER times as much.  Candidates
# only: every one of them is polished, and refuted by REFUTED, before it is reported.
OUTSIDE = 0.05
BETTER = 3.0
# The same where κ may be anything: the weakest of C directions of a wrong root comes far nearer
# (0.014 with C = 8, R = 6, m = 24) than a class does, and one wrong root takes others with it.
CERTAIN = 1e-3
# Times the weight of a root's cotangent, or its inverse, that a rival's may have: weights are 1/m
# with whole m, and those of other samples of the batch are 0.
RIVAL = 4.0

# Share outside the range at which a root is a sample beyond doubt, and the factor by which the
# next class must miss: only such roots may contradict a stated batch size.
SURE = 1e-4
SURELY = 100.0
# Standard errors of the range by which the cotangent of such a root may be outside it: one entry of
# a sample's is with chance 3e-3, and then refutes nothing.  Pictures whose probabilities are alike
# have roots further out that are no sample (tests/separation/test_two_labels.py).
OUTLYING = 3.0
# Copies of such a root that contradict: a saturated softmax fits too, with hardly any weight.
LEAST = 0.25
# ε of the client, relative to σ₁, above which a weight is more than rounding.
LAW = 100.0
# Pictures shown as one of which a single one stands apart from the others: the mean is then off by
# √(pictures − 1) times as much as in a pair.  15 for up to sixteen.
MERGED = 15.0
# How much less visible a difference of pictures may be than the least visible of 32 that were
# drawn.  In the worst case, one direction seen, the least of 8 alike is near 0.15 of the root mean
# square; 16 times less has a chance of 0.8%, where two are seen 0.004%.
LEANING = 16.0
# Rounding units of G that are taken for noise beside what is measured: of product and sums.
ROUNDING_SHARE = 4.0
# Relative difference of cotangents in float64 that may be all rounding: 1000 eps.
ALIKE = 2e-13

# Share of its weight by which a sample may seem off while others are to be found, and times its
# weight before all are polished together: looked at again after the polish, by WHOLE.
SIMILAR = 0.5
ROUGH = 20.0
# Distance from a whole number up to which factors of samples are taken for copies in a larger
# batch.  Factors of a clipping, or weights, are that near in all of B samples with chance
# (2e-3)^(B - 1).
COPIED = 1e-3
# Distance from a whole number at which a count of copies is refused: half way to the middle.
WHOLE = 0.25

# Length of a last Gauss–Newton step, in standard errors, up to which a root has settled (see
# ENSEMBLE), or as a share of the root: 10^7 eps, where the rounding of ours is the limit.
SETTLED = 30.0
STILL = 1e-9
# Distance of two roots that are one, as a share of their norm.
CLOSE = 1e-3
# Times √n·eps, which the entries of n columns of length one round by, from which a singular value
# says how well its direction is known: to a tenth, with four roundings an entry.
CANCELLED = 40.0

# Largest standard error, in units of the input, of a full gradient block that does without a dear
# joint factor.  A thousandth of DETERMINED: the weight rows would sharpen what is already known to
# USEFUL/CLEAR² of the range, and the polish on the whole update takes them in all the same.
SHARP = 1e-4

# Relative difference of two entries of k from which their rows of G test each other: far above the
# rounding of a float32 gradient (6e-8), far below what different logits give (of order one).
ROWS = 1e-4

# Chance that errors are longer than a bound of few tests says, and all of them look honest: that of
# the other decisions that are made once an answer (see ON, SCATTER).
FALSELY = 1e-4
# Times that SAFETY is wider than the largest of 10^6 normal entries, at 5 standard errors.
SPARE = 2.0
# Ratio of the largest to the smallest entry of k from which zeros of x are its own: none of n
# values spread over [0, 1] is between a half and that over 4 with chance (5/8)^n, n = 12: 0.4%.
PARTED = 4.0

# Distance from 0 or 1 at which an entry of a mask is neither: half way to the middle, as WHOLE.
MASKED = 0.25
# Standard errors of a unit that is off, at least: of 10^5 normal ones three are further above 0.
# Times the most negative value of all units, in standard errors, up to which one is off and from
# which it is on: errors are symmetric, so that units that are off end as far above 0 as below, to a
# few per cent for 10^3 of them.  What lies between is settled by the layer below.
OFF_LEAST, OFF, SURELY_ON = 4.0, 1.25, 4.0
# Share of channels whose sum a subset of units makes, below which the bias is another's: by chance
# one of 512 units makes it to 1e-4 of a typical one, as float32 rounds, in 5 of 100 channels.
SUMMED = 0.25

# Share of a random x that may be lost on the way through a Jacobian of full rank and back, and how
# many have to come back: a null direction holds more of one of these normal vectors of n entries,
# but with chance (0.8 BACK √n)^PROBES: 10^-5 at n = 3072.
BACK, PROBES = 5e-4, 3
# Relative change of values, over that of a picture whose entries change places, up to which the
# picture may be another that gives them, and Gauss–Newton begins there: no symmetry leaves nothing,
# or what errors of the picture do, and ordinary layers a third and more of it.
UNMOVED = 0.03
# Rounding of our own arithmetic in values of a network, in units of eps of the largest of them: the
# square root of a thousand terms a layer.
OWN = 32.0
# Rounding of the client's arithmetic in a value, a layer below it, in units of roundoff times the
# largest entry: 0.5 for a ResNet-18 in float32, whose 18 layers leave 9 (rms; the worst entry 90).
CLIENT = 1.0

# Equations beyond the unknowns, at least and as a share of them, from which a solution is the only
# one: another batch would have to meet as many independent equations by chance.
SURPLUS, SURPLUS_SHARE = 16, 0.01

# Share of the units of a mask that the layer's own input has to decide.  One in four may lie
# within its error of a kink, or at it (a black border below a layer without bias); of these only
# the gradient speaks.  A wrong input turns half of the units, so that 14 of them refute it but
# with chance FALSELY, but a map that shrinks its values, or one huge bias, may leave none to say.
TOLD = 0.75

# Distance of a cotangent from the span of a place, over its length, up to which it belongs there,
# and times as far that every other place has to be.  One of F filters is by chance that near to
# another place's span of B directions with 0.1^(F - B): 1e-8 for 9 filters more than samples.
FITTED, AHEAD = 0.1, 4.0
