"""Logging: one line format for stdout and the journal (iam.md §1.6), set up once by the daemon."""

import logging
import sys
from datetime import datetime

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_TAGS = {logging.DEBUG: "DBG", logging.INFO: "INF", logging.WARNING: "WRN", logging.ERROR: "ERR"}
_COLOURS = {"DBG": "\033[37m", "INF": "\033[32m", "WRN": "\033[33m", "ERR": "\033[31m"}
_OURS = ("aoscore", "__main__")
_GREY, _BLUE, _PLAIN = "\033[90m", "\033[34m", "\033[0m"


def kv(text: str, **values: object) -> str:
    """`text` with its facts behind it: "Install item: itemID=a, version=1.0.0"."""
    return f"{text}: {', '.join(f'{key}={value}' for key, value in values.items())}"


def module_name(record: logging.LogRecord) -> str:
    """The module a reader knows: "certhandler" of "aoscore.iam.certhandler.module", "app" of "aoscore.iam.app"."""
    parts = record.name.split(".")
    return parts[2] if parts[0] == "aoscore" and len(parts) > 2 else parts[-1]


class _StdoutFormatter(logging.Formatter):
    def __init__(self, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%d.%m.%y %H:%M:%S")
        when = f"{when}.{int(record.msecs):03d}"
        tag = _TAGS.get(record.levelno, "ERR")
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self._colour:
            return f"{_GREY}{when}{_PLAIN} {_COLOURS[tag]}[{tag}]{_PLAIN} {_BLUE}({module_name(record)}){_PLAIN} {text}"
        return f"{when} [{tag}] ({module_name(record)}) {text}"


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = f"({module_name(record)}) {record.getMessage()}"
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def setup(level: str, *, journal: bool, identifier: str) -> None:
    """Direct all logging of the process to stdout or to the journal.

    `identifier` becomes the journal's SYSLOG_IDENTIFIER.
    """
    handler: logging.Handler
    if journal:
        from systemd.journal import JournalHandler

        handler = JournalHandler(SYSLOG_IDENTIFIER=identifier)
        handler.setFormatter(_JournalFormatter())
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_StdoutFormatter(colour=sys.stdout.isatty()))
    handler.addFilter(_no_library_chatter)
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)


def _no_library_chatter(record: logging.LogRecord) -> bool:
    """Libraries have a say from warnings on: below that, ours is what an operator reads.

    A filter, since some libraries set the level of their loggers themselves.
    """
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in _OURS
