"""Beginnings that are read once: the layout as a tree, and the states of separate rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.batching import collate
from unisd.kernels.attention import packed_sdpa
from unisd.scoring.prefix_sharing import MIN_SHARED_TOKENS, can_share, collate_shared, shared_batches

TRUNK, BRANCH = list(range(3, 3 + MIN_SHARED_TOKENS + 4)), list(range(60, 60 + MIN_SHARED_TOKENS))
SEQUENCES = [
    [*TRUNK, *BRANCH, 7, 8, 9],
    [*TRUNK, 5, 6],
    [4, 4, 4],
    [*TRUNK, *BRANCH, 7, 8, 10, 11],
    [*TRUNK, *BRANCH, 9],
    [*TRUNK, *BRANCH, 9],
]


def path(sequences: list[list[int]], shareable: list[int], i: int) -> tuple[list[int], list[int]]:
    """Tokens and positions that sequence `i` sees: what its row continues, and its row up to the
    sequence's end.
    """
    laid = collate_shared(sequences, shareable, "cpu")
    ids, positions = (x[0].tolist() for x in (laid.batch.input_ids, laid.batch.position_ids))
    assert laid.batch.contexts is not None
    last = laid.starts[i] + len(sequences[i]) - 1
    row = max(r for r, start in enumerate(laid.batch.starts) if start <= last)
    seen = [*laid.batch.contexts[row], slice(laid.batch.starts[row], last + 1)]
    return [t for span in seen for t in ids[span]], [p for span in seen for p in positions[span]]


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=8),
    st.lists(st.integers(0, 60), min_size=8, max_size=8),
    st.integers(1, 400),
)
@settings(deadline=None)
def test_every_sequence_is_there_in_order(stems: list[list[int]], own: list[int], budget: int) -> None:
    # beginnings of 11, 22, 33, ... tokens
    sequences = [[token for bit in stem for token in [bit] * 11] for stem in stems]
    shareable = [min(limit, len(sequence) - 1) for limit, sequence in zip(own, sequences, strict=False)]
    for i, sequence in enumerate(sequences):
        assert path(sequences, shareable, i) == (sequence, list(range(len(sequence))))
    groups = shared_batches(sequences, shareable, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(sequences)))
    for group in groups:
        laid = collate_shared([sequences[i] for i in group], [shareable[i] for i in group], "cpu")
        tokens = laid.batch.input_ids.numel()
        assert sum(laid.read) == tokens <= sum(len(sequences[i]) for i in group)
        assert tokens <= budget or len(group) == 1
        for i, start in zip(group, laid.starts, strict=True):
            own_row = max(row for row in laid.batch.starts if row <= start + len(sequences[i]) - 1)
            assert start + shareable[i] >= own_row


def test_a_beginning_is_read_once_and_short_ones_are_left_alone() -> None:
    shareable = [len(sequence) - 1 for sequence in SEQUENCES]
    laid = collate_shared(SEQUENCES, shareable, "cpu")
    assert laid.batch.input_ids.numel() == len(TRUNK) + len(BRANCH) + 3 + 2 + 3 + 4 + 1 + 1
    assert len(laid.batch.starts) == 2 + len(SEQUENCES)
    assert collate_shared(
        SEQUENCES, [MIN_SHARED_TOKENS - 1] * len(SEQUENCES), "cpu"
    ).batch.input_ids.numel() == sum(map(len, SEQUENCES))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_states_are_those_of_separate_rows(family: str) -> None:
    backbone = Backbone(tiny.model(family, dtype=torch.float64).eval())
    assert can_share(backbone) == (family != "gemma3")
    if family == "gemma3":
        return
    laid = collate_shared(SEQUENCES, [len(sequence) - 1 for sequence in SEQUENCES], "cpu")
    with torch.no_grad():
        together = backbone.hidden_states(laid.batch).final
        for sequence, start in zip(SEQUENCES, laid.starts, strict=True):
            alone = backbone.hidden_states(collate([sequence], True, 0, "cpu")).final
            assert together is not None and alone is not None
            last = start + len(sequence) - 1
            torch.testing.assert_close(together[0, last], alone[0, -1], rtol=1e-12, atol=1e-12)


def test_a_model_that_is_not_told_of_rows_shares_nothing() -> None:
    backbone = Backbone(tiny.model("llama"))
    backbone.tells_rows = False
    assert not can_share(backbone)
    backbone.tells_rows = True
    backbone.decoder.layers[0].self_attn.forward = lambda *args, **kwargs: (
        kwargs["hidden_states"].cumsum(1),
        None,
    )  # type: ignore
    assert not can_share(backbone)


def test_an_attention_that_cannot_share_says_so() -> None:
    """A wrong result would look like a right one."""
    x = torch.ones(1, 2, 6, 8)
    shared = {"row_starts": [0, 3], "row_contexts": [[], [slice(0, 3)]]}
    assert packed_sdpa(torch.nn.Module(), x, x, x, None, **shared)[0].shape == (1, 6, 2, 8)
    for mask, options in (
        (None, {"position_bias": x}),
        (torch.zeros(1, 1, 6, 6), {}),
        (torch.ones(1, 2, 6, 6, dtype=torch.bool), {}),
    ):
        with pytest.raises(ValueError, match="share their beginnings"):
            packed_sdpa(torch.nn.Module(), x, x, x, mask, **shared, **options)


def test_who_comes_first_pays_for_what_is_shared() -> None:
    later_in_order = [[*TRUNK, 9, 9], [*TRUNK, 5, 5]]
    assert collate_shared(later_in_order, [len(TRUNK)] * 2, "cpu").read == [len(TRUNK) + 2, 2]
