"""The layers of a model, from the input side to the output side.

A layer is what a practitioner calls one: a residual block, a transformer block, a convolution with
its norm and activation, a recurrent layer, the classifier. `find_layers` cuts a model into them;
the other functions name parameters and select them by name.
"""

from conservtl.layers.find import Layer, ParameterInfo, find_layers, layer_of
from conservtl.layers.names import canonical, matches, named_parameters, select, unwrap

__all__ = [
    "Layer",
    "ParameterInfo",
    "canonical",
    "find_layers",
    "layer_of",
    "matches",
    "named_parameters",
    "select",
    "unwrap",
]
