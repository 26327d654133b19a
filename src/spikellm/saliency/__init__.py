"""Optimal Brain Spiking: which channels get more steps."""

from spikellm.saliency import controls as _controls
from spikellm.saliency import expected_error as _expected_error
from spikellm.saliency import first_order as _first_order
from spikellm.saliency import layer_loss as _layer_loss
from spikellm.saliency import value_range as _value_range
from spikellm.saliency.base import Evidence, Selection, choose, criteria, ranking, salient_count

__all__ = ["Evidence", "Selection", "choose", "criteria", "ranking", "salient_count"]
