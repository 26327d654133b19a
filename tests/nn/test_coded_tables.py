from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikellm.nn.vocabulary import CodedEmbedding, CodedHead, CodedTable
from spikellm.quantization.table import code_table
from spikellm.recipe import VocabularyRecipe

ROWS, COLUMNS = 37, 70


def table_of(bits: int = 8, group: int | None = None, seed: int = 0) -> CodedTable:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    table = CodedTable.like(weight, VocabularyRecipe(bits=bits, group_size=group))
    table.set_weights(code_table(weight, bits, table.groups))
    return table


@given(
    st.integers(4, 8),
    st.sampled_from([None, 8, 32]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["auto", "torch"]),
)
def test_rows_and_sums_are_those_of_the_decoded_table(
    bits: int, group: int | None, dtype: torch.dtype, kernels: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKELLM_KERNELS", kernels)
        table = table_of(bits, group)
        embedding = CodedEmbedding(table, torch.full((1,), 2.5, dtype=dtype))
        tokens = torch.randint(0, ROWS, (2, 9))
        rows = embedding(tokens)
        assert rows.dtype == dtype
        assert torch.equal(rows, nn.functional.embedding(tokens, embedding.weight) * 2.5)
        bias = nn.Parameter(torch.randn(ROWS, dtype=dtype), requires_grad=False)
        x = torch.randint(-9, 9, (2, 3, COLUMNS)).to(dtype)
        for own in (None, bias):
            head = CodedHead(table, own, shared=True)
            found = head(x)
            assert found.dtype == dtype
            expected = nn.functional.linear(
                x.float(), table.dense_weight(), None if own is None else own.float()
            )
            torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=1e-2)
            if dtype == torch.float32:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_shared_table_is_stored_once_and_stays_shared() -> None:
    table = table_of()
    model = nn.ModuleDict(
        {
            "embedding": CodedEmbedding(table, torch.ones(1)),
            "head": CodedHead(table, None, shared=True),
        }
    )
    assert [name for name in model.state_dict() if "head" in name] == []
    other = copy.deepcopy(model)
    assert other["head"].table is other["embedding"].table
    assert other["head"].table is not table
    x = torch.randn(2, COLUMNS)
    before = other["head"](x)
    other["embedding"].table.weight_scale.mul_(2)
    assert torch.equal(other["head"](x), 2 * before), "a write in place is seen"
    assert torch.equal(model["head"](x), before), "by its own copy alone"


def test_a_cast_changes_what_it_gives_and_not_what_codes_mean() -> None:
    embedding = CodedEmbedding(table_of(), torch.ones(1))
    tokens = torch.arange(5)
    exact = embedding(tokens)
    embedding.to(torch.bfloat16)
    assert embedding.table.weight_scale.dtype == torch.float32
    assert torch.equal(embedding(tokens), exact.bfloat16())


def test_gradients_pass_as_through_the_decoded_weight() -> None:
    head = CodedHead(table_of(6), None, shared=False)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    weights = torch.randn(3, ROWS)
    (head(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ head.weight)


def test_there_is_no_such_row() -> None:
    embedding = CodedEmbedding(table_of(), torch.ones(1))
    for row in (-1, ROWS):
        with pytest.raises(IndexError, match="expected 0 to 36"):
            embedding(torch.tensor([row]))
