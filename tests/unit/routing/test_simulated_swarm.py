"""Placement and moving over simulated hours: every order of joining, and a day of coming and going."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from swarm.datatypes import PeerId
from tests.unit.routing.simulated_swarm import SimulatedServer, SimulatedSwarm, best_bottleneck

NUM_BLOCKS = 30
SIZES = (5, 5, 7, 14)
HOUR_S = 3600.0


def make_servers(rooms: tuple[int, ...], rng: random.Random, *, spread: float) -> list[SimulatedServer]:
    """Speeds up to `spread` times apart, and peer ids in an order of their own."""
    names = [f"p{index}" for index in range(len(rooms))]
    rng.shuffle(names)
    return [
        SimulatedServer(PeerId(name), room, spread ** rng.random()) for name, room in zip(names, rooms, strict=True)
    ]


@pytest.mark.parametrize("spread", [1.0, 10.0], ids=["equal speeds", "speeds 10 times apart"])
@pytest.mark.parametrize("pause_s", [0.0, 1.0, 300.0], ids=["at once", "within seconds", "one by one"])
def test_any_order_of_joining_ends_near_the_optimum(pause_s: float, spread: float) -> None:
    """Nobody plans a swarm of volunteers; 31 places for 30 blocks leave no room for a mistake."""
    for seed, order in enumerate(itertools.permutations(SIZES)):
        rng = random.Random(seed)
        swarm = SimulatedSwarm(NUM_BLOCKS, seed=seed)
        servers = make_servers(order, rng, spread=spread)
        for index, server in enumerate(servers):
            swarm.join(server, after_s=index * pause_s)
        swarm.run(2 * HOUR_S)
        machines = tuple(sorted((server.room, server.speed) for server in servers))
        ratio = swarm.bottleneck() / best_bottleneck(machines, NUM_BLOCKS)
        assert ratio >= 0.8, (seed, order, ratio)
        assert swarm.num_gaps_opened_by_moves == 0


@pytest.mark.parametrize("pause_s", [0.0, 1.0, 300.0], ids=["at once", "within seconds", "one by one"])
def test_sizes_that_operators_insist_on_still_cover_the_model(pause_s: float) -> None:
    """Then every block but one is held once, so the slowest server is the bottleneck, and no order may leave a gap."""
    for seed, order in enumerate(itertools.permutations(SIZES)):
        rng = random.Random(seed)
        swarm = SimulatedSwarm(NUM_BLOCKS, seed=seed)
        servers = make_servers(order, rng, spread=10.0)
        for index, server in enumerate(servers):
            server.least = server.room
            swarm.join(server, after_s=index * pause_s)
        swarm.run(2 * HOUR_S)
        assert sorted(len(server.serves) for server in servers if server.serves) == sorted(SIZES)
        slowest = min(server.speed / server.room for server in servers)
        assert swarm.bottleneck() >= 0.8 * slowest, (seed, order)
        assert swarm.num_gaps_opened_by_moves == 0


def test_the_yardstick_agrees_with_trying_everything() -> None:
    """The optimum is found by a shortcut; where trying every placement is cheap, both must agree."""
    rng = random.Random(7)
    for _ in range(20):
        machines = tuple((rng.randint(1, 4), 10 ** rng.random()) for _ in range(3))
        ways = [[(start, size) for size in range(1, room + 1) for start in range(5 - size)] for room, _ in machines]
        best = max(
            min(
                sum(
                    speed / size
                    for (start, size), (_, speed) in zip(placement, machines, strict=True)
                    if start <= block < start + size
                )
                for block in range(4)
            )
            for placement in itertools.product(*ways)
        )
        assert best_bottleneck(machines, 4) == pytest.approx(best, rel=1e-5)


def simulate_day(seed: int, *, moves: bool, num_servers: int = 10) -> SimulatedSwarm:
    """Machines that are on for three hours and off for one, at random; three of ten vanish without a word."""
    rng = random.Random(seed)
    swarm = SimulatedSwarm(NUM_BLOCKS, seed=seed, moves=moves)
    for name in rng.sample(range(1000), num_servers):
        server = SimulatedServer(
            PeerId(f"p{name:03}"), rng.choice((5, 7, 10, 14)), 10 ** rng.random(), load_s=rng.uniform(30, 120)
        )
        swarm.start(_come_and_go(swarm, server, random.Random(name)), after_s=rng.uniform(0, 600))
    swarm.run(24 * HOUR_S)
    return swarm


def _come_and_go(swarm: SimulatedSwarm, server: SimulatedServer, rng: random.Random) -> Iterator[float]:
    while True:
        swarm.join(server)
        yield rng.expovariate(1 / (3 * HOUR_S))
        swarm.leave(server, politely=rng.random() < 0.7)
        yield 60 + rng.expovariate(1 / HOUR_S)


def most_moves_in_an_hour(server: SimulatedServer) -> int:
    times_s = server.moves_at_s
    return max((sum(0 <= at_s - first_s < HOUR_S for at_s in times_s) for first_s in times_s), default=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_day_of_coming_and_going(seed: int) -> None:
    """Moves must heal and not harm: no gap of their own, few of them, and a faster swarm for it."""
    moving, staying = simulate_day(seed, moves=True), simulate_day(seed, moves=False)
    assert moving.num_gaps_opened_by_moves == 0
    assert sum(len(server.moves_at_s) for server in moving.servers) > 10
    assert max(map(most_moves_in_an_hour, moving.servers)) <= 2
    gain = moving.mean_bottleneck / staying.mean_bottleneck
    assert gain >= 1.3, f"the bottleneck is {gain:.2f} times that without moves"
    assert moving.covered_share > staying.covered_share
