"""Sizes and deadlines that both sides of the wire hold each other to."""

from __future__ import annotations

__all__ = [
    "HIDDEN_DTYPES",
    "MAX_HANDOVER_HEADER_BYTES",
    "MAX_HANDOVER_PAGES_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_SEQUENCES",
    "MAX_TENSOR_BYTES",
    "MAX_TENSOR_DIMS",
    "PROTOCOL_VERSION",
    "channel_options",
]

PROTOCOL_VERSION = 1
"""Raised when old and new peers could misunderstand each other; unknown fields alone do not raise it."""

MAX_HEADER_BYTES = 64 * 1024
"""A header names at most MAX_SEQUENCES sequences; 64 KiB holds that several times over."""

MAX_HANDOVER_HEADER_BYTES = 2 * 1024 * 1024
"""An offer names every page of a session: half a million pages are a session of 100 000 tokens in 80 blocks."""

MAX_HANDOVER_PAGES_BYTES = 8 * 1024 * 1024
"""Pages of one message of a hand-over (or one page, if that is larger): what the engine copies between two steps."""

MAX_TENSOR_BYTES = 64 * 1024 * 1024
"""4096 positions of a 70B-class model (hidden size 8192) in bf16; longer inputs travel in chunks."""

MAX_TENSOR_DIMS = 4

HIDDEN_DTYPES = ("float32", "bfloat16", "float16")
"""What hidden states and their gradients may be."""

MAX_SEQUENCES = 1024
"""Sequences one session may hold: far above any beam count, low enough that tables stay small."""

MAX_MESSAGE_BYTES = 4 + MAX_HEADER_BYTES + 2 * (MAX_TENSOR_BYTES + 64)
"""A whole frame: Backward carries two tensors."""


def channel_options() -> list[tuple[str, int]]:
    """gRPC options for channels and servers: size limits, and keep-alives that notice a dead peer in seconds.

    Without permit_without_calls and the ping-strike settings, a server would drop clients that ping while
    a long prefill keeps the stream silent.
    """
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        # A proxy for the web is no way to a peer in the local network.
        ("grpc.enable_http_proxy", 0),
        ("grpc.optimization_target_latency", 1),
    ]
