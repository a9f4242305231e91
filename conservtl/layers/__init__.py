"""The layers of a model, from the input side to the output side.

A layer is a residual block, a transformer block, a convolution with its norm and activation, a recurrent layer or
the classifier. `find_layers` divides a model into layers; the other functions name parameters and select them by name.
"""

from conservtl.layers.find import find_layers
from conservtl.layers.info import Layer, ParameterInfo, layer_of
from conservtl.layers.names import canonical, check_globs, matches, named_parameters, select, unwrap

__all__ = [
    "Layer",
    "ParameterInfo",
    "canonical",
    "check_globs",
    "find_layers",
    "layer_of",
    "matches",
    "named_parameters",
    "select",
    "unwrap",
]
