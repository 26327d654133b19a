"""What buffers are for, where their bits are counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layers import fit
from spikellm.nn.buffer_kinds import BufferKind, kind_of
from spikellm.nn.formats.base import Buffer
from spikellm.recipe import LinearRecipe


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("weight_codes", torch.uint8, "codes"),
        ("salient_codes", torch.uint8, "codes"),
        ("spikes_plus", torch.uint8, "codes"),
        ("column_planes", torch.uint8, "codes"),
        ("anything", torch.int8, "codes"),
        ("group_mask", torch.uint8, "masks"),
        ("weight_zero", torch.uint8, "scales"),
        ("row_offset", torch.float32, "scales"),
        ("scale_codes", torch.int8, "scales"),
        ("anything", torch.bfloat16, "scales"),
        ("column_steps", torch.uint8, "indices"),
        ("column_order", torch.int32, "indices"),
        ("high_rows", torch.int32, "indices"),
    ],
)
def test_names_say_it(name: str, dtype: torch.dtype, kind: BufferKind) -> None:
    assert kind_of(name, dtype) == kind
    assert Buffer(name, (1,), dtype, 0).stored_as == kind


def test_a_format_may_say_it() -> None:
    assert Buffer("weight_codes", (1,), torch.uint8, 0, "masks").stored_as == "masks"


def test_what_codes_the_inputs_is_apart() -> None:
    """Every buffer of a layer has a kind; that which places columns belongs to the weights."""
    settings = LinearRecipe.model_validate(
        {"activations": {"bits": 4, "steps": 2, "search_range": True, "token_steps": 3}}
    )
    layer = fit(nn.Linear(24, 8), settings)
    kinds = layer.buffer_kinds()
    assert kinds.keys() == dict(layer.named_buffers()).keys()
    assert {name for name, kind in kinds.items() if kind == "inputs"} == {
        "group_steps",
        "input_range",
        "token_threshold",
        "token_share",
    }
    assert kinds["channel_group"] == "indices"
