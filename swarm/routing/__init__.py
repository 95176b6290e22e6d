"""Which servers a session's tokens pass through, and which blocks a new server should hold."""

from __future__ import annotations

from swarm.routing.fewest_hops import FewestHopsRouter, plan_route
from swarm.routing.placement import choose_span
from swarm.routing.router import Router

__all__ = ["FewestHopsRouter", "Router", "choose_span", "plan_route"]
