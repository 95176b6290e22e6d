"""hivemind's messages, kept from the terminal: what matters in them reaches us as errors."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quieten_hivemind"]

logger = logging.getLogger(__name__)


class _ToOurLog(logging.Handler):
    """Passes messages of hivemind and p2pd on as debug messages of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.debug("%s: %s", record.levelname.lower(), record.getMessage())


_handler = _ToOurLog()


def quieten_hivemind() -> None:
    """Undo what importing hivemind did to the process: a handler that writes to the terminal, a renamed level.

    Call it before each start, since programs set up logging, and tests warnings, after the import.
    """
    hivemind_logger = logging.getLogger("hivemind")
    hivemind_logger.handlers[:] = [_handler]
    hivemind_logger.propagate = False
    # Refused peers and closed streams are logged as warnings by the dozen; not even formatted unless wanted.
    hivemind_logger.setLevel(logging.DEBUG if logger.isEnabledFor(logging.DEBUG) else logging.ERROR)
    logging.addLevelName(logging.WARNING, "WARNING")  # hivemind calls it WARN, everywhere
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"hivemind\.")
