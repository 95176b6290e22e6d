"""Names of the gRPC methods (the service is written down in proto/)."""

from __future__ import annotations

from typing import Final

__all__ = ["BACKWARD", "FORWARD", "HANDOVER", "HEALTH", "INFO", "LOOKUP", "PUSH", "SERVICE", "SESSION"]

SERVICE: Final = "swarm.Node"
SESSION: Final = "/swarm.Node/Session"
PUSH: Final = "/swarm.Node/Push"
FORWARD: Final = "/swarm.Node/Forward"
BACKWARD: Final = "/swarm.Node/Backward"
HANDOVER: Final = "/swarm.Node/Handover"
HEALTH: Final = "/swarm.Node/Health"
INFO: Final = "/swarm.Node/Info"
LOOKUP: Final = "/swarm.Node/Lookup"
