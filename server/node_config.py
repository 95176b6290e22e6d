"""How to run a server: everything its operator may set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swarm.datatypes import Span
from swarm.discovery.record_checks import MAX_ADAPTERS
from swarm.errors import BadInputError
from swarm.kvpolicy.settings import KVPolicy, find_policy
from swarm.server.rpc.sessions import SessionLimits
from swarm.weights.precision import AUTO, Precision

__all__ = ["NodeConfig"]


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """How to run a server."""

    span: Span | None = None
    """Blocks to serve, now and always; None lets the server choose those that help the swarm most, and move."""
    num_blocks: int | None = None
    """How many blocks to serve when it chooses which; None: as many as help the swarm most."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, or several GPUs: cuda:0,cuda:1."""
    weights: str = AUTO
    """Precision of the weights: auto, fp32, bf16, int8 or nf4."""
    double_quantised: bool = False
    """Whether nf4's scales are quantised, too (on CUDA): 0.52 instead of 0.56 bytes per weight, and a little error."""
    offload: bool = False
    """Whether blocks that do not fit the device may stream in from main memory (on a GPU) or disk (on a CPU)."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Folders of LoRA adapters by the name under which sessions choose them."""
    kv_policy: str = "none"
    """Preset by which sessions' keys and values are kept, where the blocks can do it; clients may ask for none."""
    kv_memory_bytes: int | None = None
    """Memory for keys and values; None: 1 GiB on a CPU, on a GPU what the blocks leave."""
    host: str = "0.0.0.0"
    """Address to listen on; what is announced is derived from it unless announce_host is given."""
    announce_host: str | None = None
    """Host name or address that others can reach this server at."""
    announce_port: int | None = None
    """gRPC port that others reach this server at, behind a port forward or a proxy; None: the one listened on."""
    port: int = 0
    """gRPC port; 0 picks a free one."""
    dht_port: int = 0
    """DHT port; 0 picks a free one."""
    join: Sequence[str] = ()
    """Addresses of the swarm; empty starts a new one."""
    identity_path: Path | None = None
    """Key file; None makes a fresh identity."""
    announce_period_s: float = 5.0
    """A record lives for two periods, so a dead server is forgotten after at most that."""
    settle_s: float = 1.0
    """How long an announcement takes to reach everybody: a server that chose its blocks looks again after one
    to two times that, in case others chose the same ones at the same moment."""
    rebalance_period_s: float = 300.0
    """How often a server that chose its blocks asks whether others would help more; 0: never. It looks for blocks
    that nobody serves ten times as often."""
    drain_timeout_s: float = 60.0
    """How long a leaving or moving server lets its sessions finish."""
    num_threads: int | None = None
    """CPU threads for computing; None leaves it to torch."""
    limits: SessionLimits = field(default_factory=SessionLimits)

    def __post_init__(self) -> None:
        if self.weights not in (AUTO, *(precision.value for precision in Precision)):
            known = ", ".join(precision.value for precision in Precision)
            raise BadInputError(f"--weights {self.weights} is no precision; choose {AUTO}, {known}")
        try:
            find_policy(self.kv_policy)
        except BadInputError as error:
            raise BadInputError(f"--kv {self.kv_policy}: {error}") from error
        if len(self.adapters) > MAX_ADAPTERS:
            raise BadInputError(f"--adapter is given {len(self.adapters)} times, and {MAX_ADAPTERS} are the most")
        if self.span is not None and self.num_blocks is not None:
            raise BadInputError("give either --blocks or --num-blocks, not both")
        if self.announce_port is not None and not 1 <= self.announce_port <= 65535:
            raise BadInputError(f"--announce-port {self.announce_port} is no port; choose 1 to 65535")
        if self.rebalance_period_s < 0 or self.settle_s < 0:
            raise BadInputError("--rebalance-period can not be negative; 0 keeps the server where it is")

    @property
    def policy(self) -> KVPolicy:
        """What `kv_policy` names."""
        return find_policy(self.kv_policy)

    @property
    def moves(self) -> bool:
        """Whether the server may change its blocks while it runs."""
        return self.span is None and self.rebalance_period_s > 0
