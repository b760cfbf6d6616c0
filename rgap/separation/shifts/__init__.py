"""Separation below a convolution: positions are samples, told apart by shifts alone.

``arrangement`` says which taps of the kernel stand in one matrix, and how large a batch that bears;
``relations`` finds what one step along an axis does to the positions; ``positions`` walks them and
gives cotangents and inputs up to one B×B matrix.
"""
