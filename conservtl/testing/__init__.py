"""For your own tests: generators of models, weights, strategies and specs; contract of a strategy, laws of a layer map.

Needs hypothesis (``pip install 'conservtl[dev]'``). The generators draw from seeds, leave torch's random state
unchanged, and shrink.

Example:
    >>> import conservtl as ctl
    >>> from hypothesis import given, settings, strategies as st
    >>> from conservtl.testing import models, state_dicts
    >>> @settings(max_examples=5, deadline=None)
    ... @given(st.data())
    ... def test_any_saved_state_dict_is_a_source(data):
    ...     model, example = data.draw(models())
    ...     weights = data.draw(state_dicts(model, partial=False))
    ...     adaptation = ctl.adapt(model, weights.saved, example=example)
    ...     assert not adaptation.transfer.fresh and not adaptation.transfer.unused
    >>> test_any_saved_state_dict_is_a_source()

    One line checks that a strategy of your own keeps the contract:

    >>> from conservtl.testing import check_strategy
    >>> check_strategy(ctl.L2SP(alpha=0.1))
"""

from conservtl.testing import _needs  # noqa: F401 - before anything imports hypothesis
from conservtl.testing.choices import strategies
from conservtl.testing.contract import check_strategy
from conservtl.testing.fields import instances, specs
from conservtl.testing.layer_map import check_layer_map
from conservtl.testing.networks import models
from conservtl.testing.situations import frozen_parts, layer_drops, masked_batches, several_outputs, tied_heads
from conservtl.testing.weights import Weights, state_dicts

__all__ = [
    "Weights",
    "check_layer_map",
    "check_strategy",
    "frozen_parts",
    "instances",
    "layer_drops",
    "masked_batches",
    "models",
    "several_outputs",
    "specs",
    "state_dicts",
    "strategies",
    "tied_heads",
]
