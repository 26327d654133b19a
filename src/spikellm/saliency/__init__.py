"""Optimal Brain Spiking: which channels get more steps."""

from spikellm.saliency import controls as _controls
from spikellm.saliency import expected_error as _expected_error
from spikellm.saliency import first_order as _first_order
from spikellm.saliency import value_range as _value_range
from spikellm.saliency.base import Evidence, choose, criteria, ranking, salient_count
from spikellm.saliency.layer_loss import best_cut

__all__ = ["Evidence", "best_cut", "choose", "criteria", "ranking", "salient_count"]
