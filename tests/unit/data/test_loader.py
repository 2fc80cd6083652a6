"""Batches are a function of the step alone, and no target crosses a document's border."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_split import ToySplit

from nemotune.data.loader import IGNORED, Loader, batches, collate


def split(packed=True):
    lengths = [5, 9, 3, 12, 7, 1, 4, 8, 6, 2, 11]
    return ToySplit(lengths, packs=[[0, 1], [2], [3, 4, 5], [6], [7, 8], [9, 10]] if packed else None)


def loader(**settings):
    return Loader(split(), **{"global_batch_size": 4, "micro_batch_size": 2, "seed": 7, **settings})


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(vars(x).values(), vars(y).values(), strict=True)
    )


def test_step_is_the_same_whether_or_not_earlier_steps_were_taken():
    straight = loader()
    taken = [straight.step(index) for index in range(9)]
    for index in (8, 3, 0, 5):
        assert same(loader().step(index), taken[index])


def test_every_epoch_sees_every_document_once_in_another_order():
    one = loader()
    assert one.steps_per_epoch == 2
    epochs = [[i for step in (2 * e, 2 * e + 1) for batch in one.step(step) for i in batch.document_ids.tolist()] for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [i for batch in loader(seed=8).step(0) for i in batch.document_ids.tolist()] != epochs[0][:5]


def test_without_shuffling_packs_come_in_order():
    assert [batch.document_ids.tolist() for batch in loader(shuffle=False).step(0)] == [[0, 1, 2], [3, 4, 5, 6]]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_part_the_same_documents_of_a_step(micro):
    whole = loader(micro_batch_size=4).step(0)
    parts = loader(micro_batch_size=micro).step(0)
    assert len(parts) == 4 // micro
    assert torch.cat([part.tokens_T for part in parts]).equal(whole[0].tokens_T)
    assert torch.cat([part.targets_T for part in parts]).equal(whole[0].targets_T)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_targets_are_the_next_supervised_tokens_and_never_cross_a_border(lengths):
    rows = ToySplit(lengths)
    batch = collate(rows, range(len(lengths)))
    borders = batch.cu_seqlens.tolist()
    assert borders[0] == 0 and borders[-1] == batch.num_tokens == sum(lengths)
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        document = rows[number]
        assert batch.tokens_T[start:end].tolist() == document.tokens.tolist()
        expected = [int(token) if mask else IGNORED for token, mask in zip(document.tokens[1:], document.mask[1:], strict=True)]
        assert batch.targets_T[start:end].tolist() == [*expected, IGNORED]


def test_batch_has_the_dtypes_that_the_model_takes():
    batch = loader().step(0)[0]
    assert {name: value.dtype for name, value in vars(batch).items()} == {
        "tokens_T": torch.int64, "cu_seqlens": torch.int32, "targets_T": torch.int64, "document_ids": torch.int64,
    }  # fmt: skip
    assert batch.num_supervised == int((batch.targets_T >= 0).sum())


def test_evaluation_batches_hold_every_document_in_order_within_the_budget():
    found = list(batches(split(), max_tokens=12))
    assert [i for batch in found for i in batch.document_ids.tolist()] == list(range(11))
    assert all(batch.num_tokens <= 12 for batch in found)
    assert [batch.document_ids.tolist() for batch in batches(split(), max_tokens=1)] == [[i] for i in range(11)]
