"""Keeps what libraries log and warn about away from users, unless they ask for it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Final

__all__ = ["prepare_process"]

# Read by the libraries when they are imported, which commands do only after this.
_QUIET_ENVIRONMENT: Final = {
    "GRPC_VERBOSITY": "NONE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HIVEMIND_LOGLEVEL": "CRITICAL",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_HANDLER_NAME: Final = "swarm-command-line"


class _Formatter(logging.Formatter):
    """One line a record; tracebacks only when asked for."""

    def __init__(self, *, with_tracebacks: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self._with_tracebacks = with_tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if not self._with_tracebacks and record.exc_info:
            error = record.exc_info[1]
            record = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None})
            record.msg, record.args = f"{record.getMessage()} ({type(error).__name__}: {error})", None
        return super().format(record)


class _StderrHandler(logging.Handler):
    """Writes to what is standard error at that moment: progress bars replace it, to keep lines apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def prepare_process(verbosity: int, *, swarm_level: int = logging.ERROR) -> None:
    """Decide what of logs and warnings reaches standard error; call it before heavy imports.

    Args:
        verbosity: how often --verbose was given. 0: our own records from `swarm_level` on; 1: what we do,
            and warnings of libraries; 2: everything.
        swarm_level: least level of our own records shown without --verbose.
    """
    root, ours = logging.getLogger(), logging.getLogger("swarm")
    for earlier in [handler for handler in root.handlers if handler.get_name() == _HANDLER_NAME]:
        root.removeHandler(earlier)
    handler = _StderrHandler()
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(_Formatter(with_tracebacks=verbosity > 0 or os.environ.get("SWARM_DEBUG") == "1"))
    root.addHandler(handler)
    if verbosity == 0:
        for name, value in _QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
        ours.setLevel(swarm_level)
        # A logger's own level wins over this, and only ours has one.
        handler.addFilter(lambda record: record.name.partition(".")[0] == "swarm")
    else:
        logging.captureWarnings(True)
        ours.setLevel(logging.INFO if verbosity == 1 else logging.DEBUG)
        root.setLevel(logging.WARNING if verbosity == 1 else logging.DEBUG)
