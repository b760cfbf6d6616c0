"""Every number by which linear algebra decides a rank or trusts a factorisation, with its source.

All of it computes in float64, eps = 2.2e-16.  n counts the terms of a sum; where a bound needs one,
n = 4500 stands for the largest matrices that are formed, so that n·eps = 1e-12.

Limits of effort (iterations, block sizes, sizes from which another route pays) stay where they are
used: they decide how a number is computed, never what it says.
"""

from __future__ import annotations

# --- Ranks -----------------------------------------------------------------------------------

# Ratio σ_r/σ_{r+1} from which a rank is clear: it is then the same for every cutoff within a factor
# of √10 = 3 on either side of the middle, and a cutoff is an estimate of an error to about that.
SMALL_GAP = 10.0

# Times the expected norm of noise, up to which singular values are noise.  The largest of random
# noise is its expected norm within a few per cent (it scatters by n^(−2/3)); the expectation, from
# the rounding that was stated, is trusted to a factor of three.
ABOVE = 3.0

# Times eps and the condition of what was decided, by which the basis of what is left open is off:
# one each for the product with it, the triangular factor, the singular values, the next product.
BASIS = 4.0

# --- Angles between row spaces ---------------------------------------------------------------

# Sine below which s² = 1 − c² is not used: s² is known to about eps, s to eps/s² = 2e-10 of itself.
SUSPECT = 1e-3

# Times the cutoff of the blocks, below which a sine is 0: orthonormal bases are off by their cutoff
# times the condition of the rows that they were made of, 100 where these were told apart well.
# The least of it is that of n·eps.
INHERITED, LEAST_SINE = 100.0, 1e-10

# σ/σ_1 down to which directions known to be shared span a space: ten times GRAM.
INDEPENDENT = 1e-5

# Rounding units of a unit direction that a projector may leave of what it removes: it is a sum of
# up to 64² = 4096 terms of random signs.
PROJECTED = 64.0

# ‖A‖ ≤ 10 √(2/π) max ‖A g‖ over 10 normal vectors g, but for a chance of 10^-10 (Halko, Martinsson
# and Tropp 2011, lemma 4.1).
PROBES, BEYOND = 10, 10.0

# --- Factorisations --------------------------------------------------------------------------

# σ/σ_1 down to which AᵀA tells a direction from none: it is known to n·eps σ_1², so σ to √(n·eps).
GRAM = 1e-6

# σ/σ_1 from which σ is read off AAᵀ, and eigenvalue/largest below which one is 0 there: 450 eps.
# A kept eigenvalue, 1e-8 of the largest or more, is then known to 1e-5 of itself.
CLEAR, NOTHING = 1e-4, 1e-13

# Times √n·eps, by which AᵀA of n columns of length one is off, from which its smallest eigenvalue
# is known: to a few per cent, with four sums an entry that round alike.
SQUARED = 100.0

# Condition up to which normal equations solve as well as any: one solve errs by κ² n·eps = 1e-4,
# and two steps of refinement leave the cube of that.
NORMAL = 1e4

# Times the cutoff that an estimated σ_n must exceed for full rank.  Three inverse iterations
# from a random start give about 1.7 times the true σ_n at n = 4500 where the spectrum is worst (all
# others at 1.9 σ_n): 10 is six times that, for a matrix that is then factored.  Where all of space
# is put in place of a row space nothing measures it again, hence more.
MARGIN, SURE = 10.0, 1e3

# ‖I − QᵀQ‖ of a first pass of Cholesky QR up to which a second one repairs it: the condition of Q
# is then below √(1.1/0.9), which costs no digit.
NEAR = 0.1

# --- Iterations that must not see a null space ------------------------------------------------

# Where LSMR ends, relative to its start: 450 eps.  Condition from which A counts as singular.
ENDS, SINGULAR = 1e-13, 1e14

# Length of a random unit vector's projection from which it shows an open direction.  One of
# n = 10^5 has 3e-3 in a single such direction, less than this with chance 3e-4; LSMR leaves ENDS
# times the condition of what is determined, 1e-7 at 10^6.
OPEN = 1e-6
# What must be left of such a projection after those before: ENDS times a condition of 10^4.
DEPENDENT = 1e-9

# --- Noise -----------------------------------------------------------------------------------

# Relative difference up to which variances are one: they are sums of squares, far above eps.
EQUAL = 1e-12
