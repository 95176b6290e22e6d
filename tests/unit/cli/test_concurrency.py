"""How the concurrency benchmark turns rounds into figures."""

from __future__ import annotations

import pytest

from swarm.cli.bench.concurrency import parse_counts
from swarm.cli.bench.concurrency_measure import ConcurrencyRound, summarise_concurrency
from swarm.cli.bench.local_bench import to_result
from swarm.cli.bench.server_account import ServerAccount
from swarm.errors import BadInputError


def make_round(num_clients: int, server_cpu_s: float, *, num_tokens: int = 0) -> ConcurrencyRound:
    """A round of 10 tokens per client in one second, in which every client was as fast as the others."""
    num_tokens = num_tokens or 10 * num_clients
    return ConcurrencyRound(
        num_clients=num_clients,
        num_tokens=num_tokens,
        wall_s=1.0,
        client_wall_s=[1.0] * num_clients,
        server_cpu_s=server_cpu_s,
        client_cpu_s=0.5,
        num_server_tokens=2 * num_tokens,
        num_batches=20,
        account=ServerAccount(kv_used_bytes=1000, kv_wasted_bytes=30, kv_shared_bytes=5, num_spills=1),
    )


def test_ratios_compare_within_a_round() -> None:
    """When the machine is slow in one round, both sides are slow: only their ratio means something."""
    slow, fast = [make_round(1, 2.0), make_round(8, 4.0)], [make_round(1, 1.0), make_round(8, 2.0)]
    alone, eight = summarise_concurrency([slow, fast, fast])
    assert alone.ratio_to_one_client == 1.0
    assert eight.ratio_to_one_client == pytest.approx(4.0)
    assert eight.server_cpu_ms_per_token == pytest.approx(25.0)
    assert eight.all_cpu_ms_per_token == pytest.approx(2.5 / 80 * 1e3)
    assert eight.tokens_per_s == 80.0
    assert eight.tokens_per_s_per_client == 10.0


def test_no_ratio_without_one_client() -> None:
    """A ratio to something not measured would be made up."""
    (eight,) = summarise_concurrency([[make_round(8, 4.0)]])
    assert eight.ratio_to_one_client is None


def test_memory_is_told_with_its_waste() -> None:
    """Waste is promised as a share of what is in use."""
    result = to_result(summarise_concurrency([[make_round(1, 1.0)]])[0])
    assert result["kv_wasted_ratio"] == 0.03
    assert result["kv_used_bytes"] == 1000
    assert result["num_spills"] == 1


def test_batches_are_told_by_their_sessions() -> None:
    """Each server runs every token once, so two servers' tokens and batches give the mean of a batch."""
    (four,) = summarise_concurrency([[make_round(4, 1.0)]])
    assert four.sessions_per_batch == 4.0


def test_accounts_of_servers_add_up() -> None:
    """A span more is memory more."""
    total = ServerAccount(kv_used_bytes=1, num_batches=2) + ServerAccount(kv_used_bytes=3, kv_shared_bytes=4)
    assert total == ServerAccount(kv_used_bytes=4, kv_shared_bytes=4, num_batches=2)


def test_numbers_of_clients_are_read_from_a_list() -> None:
    """In any order, each once."""
    assert parse_counts("8,1, 2,8") == [1, 2, 8]


@pytest.mark.parametrize("text", ["", "0,1", "two", "1,,2", "1000"])
def test_other_lists_are_refused_by_name(text: str) -> None:
    """One sentence instead of a traceback."""
    with pytest.raises(BadInputError, match="--clients"):
        parse_counts(text)
