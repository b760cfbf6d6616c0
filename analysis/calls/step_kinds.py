"""What is known of a function by its name: whether it chooses, mixes, bends, or only moves entries.

Names are those of `torch`, `torch.nn.functional` and the methods of a tensor.  A name that stands
nowhere here is taken for the worst: nonlinear, and reading all of its input.
"""

from __future__ import annotations

# Give every entry of a product a parameter of its own, and keep what they are given.
POINTWISE = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu",
             "add", "sub", "mul", "div", "__add__", "__radd__", "__mul__", "__rmul__", "__sub__",
             "__rsub__", "__truediv__", "__iadd__", "__imul__", "add_", "mul_", "cat",
             "concat"}  # fmt: skip

# Choose by the values that they are given.
CHOOSE = {"max", "min", "topk", "sort", "maximum", "minimum", "median", "kthvalue", "fmax",
          "max_unpool2d", "argsort", "unique"}  # fmt: skip

# Choose by a mask or an index, which may come from the data.
CHOOSE_BY_INDEX = {"gather", "where", "masked_fill", "masked_fill_", "masked_select",
                   "index_select", "take_along_dim", "take", "__getitem__",
                   "__setitem__"}  # fmt: skip

# Can switch entries off: the derivative is zero on a part of all inputs.
OFF = {"relu", "relu_", "relu6", "hardtanh", "hardswish", "hardsigmoid", "clamp", "clip",
       "threshold", "clamp_min", "clamp_max", "hardshrink", "softshrink", "hardtanh_", "clamp_",
       "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
       "adaptive_max_pool3d", "amax", "amin", "max", "min", "maximum", "minimum", "topk", "where",
       "median", "kthvalue", "sort", "masked_fill", "gather"}  # fmt: skip

# Are linear, or affine, on parts of all inputs.
PIECES = OFF | {"leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "selu", "celu", "rrelu",
                "abs"}  # fmt: skip

# Are analytic, entry by entry, with φ' ≠ 0 and φ'' ≠ 0 almost everywhere.
CURVED = {"tanh", "sigmoid", "softplus", "gelu", "silu", "mish", "logsigmoid", "atan", "sin", "cos",
          "exp", "erf", "sigmoid_", "tanh_"}  # fmt: skip

# Hand every entry on by itself, up to a scale and a shift that do not depend on the data.
PASSING = {"batch_norm", "dropout", "reshape", "view", "flatten", "contiguous", "clone", "to"}

# Change the shape alone.
PLAIN = {"flatten", "reshape", "view", "squeeze", "contiguous", "float", "double", "to"}

# Are affine in the data.
AFFINE = PASSING | PLAIN | {
    "mean", "sum", "__getitem__", "select", "narrow", "permute", "transpose", "cat", "concat",
    "stack", "pad", "unsqueeze", "add", "__add__", "__radd__", "sub", "__sub__", "chunk", "split",
    "unbind", "movedim", "swapaxes", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "unflatten", "roll",
    "dropout2d", "pixel_shuffle", "channel_shuffle", "view_as", "flip", "expand", "repeat",
    "interpolate",
}  # fmt: skip

# Move entries, each to one place, or change each by itself along a line without a turn.
MOVES = PASSING | PLAIN | CURVED | {
    "permute", "transpose", "movedim", "swapaxes", "unsqueeze", "unflatten", "roll", "flip",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "t", "leaky_relu", "prelu", "elu",
    "selu", "celu",
} - {"dropout", "sin", "cos", "gelu", "silu", "mish"}  # fmt: skip

# Are independent means or selections of their input: as many values as entries (or windows).
INDEPENDENT = {"mean", "sum", "__getitem__", "select", "narrow", "avg_pool1d", "avg_pool2d",
               "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
               "adaptive_avg_pool3d"}  # fmt: skip

# Multiply tensors with one another.
MIXES = {"matmul", "bmm", "einsum", "scaled_dot_product_attention", "__matmul__", "baddbmm"}

# Pass on the values of places that are taken as known.
MAXIMA = ("max", "min", "topk", "median", "sort", "kthvalue")
