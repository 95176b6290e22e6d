"""How the KV benchmark remembers scores of single texts and sums them up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from swarm.cli.bench.kv_figures import StoredShape, sum_up
from swarm.cli.bench.kv_measure import steps_of_an_answer
from swarm.cli.bench.kv_record import CodeScores, DocumentScores, ScoreRecord, name_case
from swarm.errors import BadInputError
from swarm.kvpolicy.settings import PRESETS
from swarm.kvpolicy.streaming import advance, is_staged, new_tail

SHAPE = StoredShape(num_heads=4, full_bytes_per_token=1000, row_bytes=64)


def document(loss_nats: float, kl_nats: float = 0.0, num_bytes: int = 200_000) -> DocumentScores:
    return DocumentScores(
        kl_nats=kl_nats,
        loss_nats=loss_nats,
        agreement=0.9,
        num_bytes=num_bytes,
        num_kept=4 * 500,
        num_tokens=1000,
        hop_rows=750.0,
        greedy_kl_nats=None,
        greedy_agreed_tokens=None,
    )


def test_errors_are_those_of_differences_within_a_text() -> None:
    """Texts differ far more among themselves than methods do."""
    documents = {"full": [document(2.0), document(4.0)], "x": [document(2.1, 0.01), document(4.1, 0.03)]}
    codes = {"full": [CodeScores(digits=0.8, exact=0.5)] * 2, "x": [CodeScores(digits=0.6, exact=0.25)] * 2}
    figures = sum_up("x", documents, codes, SHAPE, full="full")
    assert figures.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert figures.perplexity_ratio_error == pytest.approx(0.0, abs=1e-9)
    assert figures.mean_kl_nats == pytest.approx(0.02) and figures.mean_kl_nats_error == pytest.approx(0.01)
    assert figures.kv_ratio == pytest.approx(0.2) and figures.times_smaller == pytest.approx(5.0)
    assert figures.kept_share == pytest.approx(0.5)
    assert figures.retrieval_ratio == pytest.approx(0.75) and figures.retrieval_exact_ratio == pytest.approx(0.5)
    assert figures.prefill_wire_bytes_per_hop == 750 * 64


def test_without_code_texts_there_is_no_retrieval_figure() -> None:
    """A zero would read as a disaster."""
    figures = sum_up("x", {"full": [document(1.0)], "x": [document(1.0)]}, {"full": [], "x": []}, SHAPE, full="full")
    assert figures.retrieval_ratio is None and figures.retrieval_ratio_error is None


def test_a_record_goes_on_where_a_run_stopped(tmp_path: Path) -> None:
    """The whole table takes half an hour on two processors."""
    path = tmp_path / "record.jsonl"
    case = name_case("document", [1, 2, 3], [0])
    first = ScoreRecord(path, "a" * 64)
    first.add(case, "method", document(1.5))
    first.add(name_case("codes", [1, 2, 3], []), "method", CodeScores(digits=1.0, exact=0.5))
    again = ScoreRecord(path, "a" * 64)
    assert again.find(case, "method") == document(1.5)
    assert again.find(case, "other settings") is None
    assert again.find(name_case("document", [1, 2, 4], [0]), "method") is None
    assert ScoreRecord(path, "b" * 64).find(case, "method") is None


def test_another_file_is_no_record(tmp_path: Path) -> None:
    """A slip of the hand must not append to somebody's notes."""
    path = tmp_path / "notes.txt"
    path.write_text("milk, bread\n")
    with pytest.raises(BadInputError, match="no record"):
        ScoreRecord(path, "a" * 64)


@pytest.mark.parametrize("start", [512, 2048, 4096, 2051])
def test_texts_are_fed_as_an_answer_would_come(start: int) -> None:
    """Larger steps would be judged by their own queries, as a question is, and flatter the policy."""
    policy = PRESETS["pyramid+gear"]
    together = alone = advance(policy, new_tail(policy), 0, start, is_unfinished=False)
    position = start
    for count in steps_of_an_answer(start, 100):
        assert not is_staged(policy, together, position, count, is_unfinished=False)
        together = advance(policy, together, position, count, is_unfinished=False)
        for token in range(count):
            alone = advance(policy, alone, position + token, 1, is_unfinished=False)
        assert alone == together
        position += count
    assert position == start + 100
