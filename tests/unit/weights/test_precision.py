"""Names of precisions and their order, as operators type them and clients demand them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from swarm.errors import BadInputError
from swarm.weights import Precision, at_least, parse_precision


@pytest.mark.parametrize(
    ("announced", "demanded", "is_enough"),
    [
        ("fp32", "bf16", True),
        ("bf16", "bf16", True),
        ("int8", "bf16", False),
        ("int8", "nf4", True),
        ("nf4", "int8", False),
        ("bf16", "fp32", False),
    ],
)
def test_precisions_are_ordered(announced: str, demanded: str, is_enough: bool) -> None:
    """A client that demands bf16 must never be served by four bits."""
    assert at_least(announced, demanded) is is_enough
    assert at_least(Precision(announced), Precision(demanded)) is is_enough


def test_a_newer_servers_name_is_never_enough() -> None:
    """What we can not judge must not count as good, nor break the judging of others."""
    assert not at_least("fp6", "nf4")


def test_a_misspelt_name_is_answered_with_those_that_exist() -> None:
    """One sentence with the fix."""
    with pytest.raises(BadInputError, match=r"'fp8'.*fp32, bf16, int8, nf4"):
        parse_precision("fp8")
    with pytest.raises(BadInputError, match="fp64"):
        at_least("fp32", "fp64")


def test_precisions_load_no_torch() -> None:
    """Routing decisions and --help use them."""
    code = "import sys; import swarm.weights; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
