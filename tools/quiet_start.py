"""Console output of a starting ComfyUI: its log without failures of parts that this project does not need.

The log file contains everything. Tracebacks and notices that name the pack are shown. Standard library only.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

from .comfy_server import plain

STARTED = "To see the GUI go to"
"""Text of the host when it is ready; all later lines are shown."""
TRACEBACK = "Traceback (most recent call last):"
BOX = re.compile(r"\*{5,} ?ERROR ?\*{5,}")
NOTICE = re.compile(
    r"Cannot import .* module for custom nodes|IMPORT FAILED|nodes did not import correctly"
    r"|This issue might be caused by new missing dependencies|Please do a: pip install|Please run the update script"
    r"|torchaudio missing|^(During handling|The above exception)"
)
SECONDS = 0.1


class QuietStart:
    """Filter of the log of a starting host, fed in pieces. pack: the folder whose failures are shown."""

    def __init__(self, pack: Path) -> None:
        self.pack = f"{pack}"
        self.starting = True
        self.hidden = 0
        """Number of notices and tracebacks left out so far."""
        self._rest = ""
        self._block: list[str] = []
        self._in_box = False

    def feed(self, text: str) -> str:
        """Part of `text` to show; an unfinished line waits for its end while the host starts."""
        shown = ""
        self._rest += text
        while self.starting and "\n" in self._rest:
            line, _, self._rest = self._rest.partition("\n")
            shown += self._line(line + "\n")
            if STARTED in line:
                self.starting = False
        if not self.starting:
            shown, self._rest = shown + self._rest, ""
        return shown

    def _line(self, line: str) -> str:
        words = plain(line).rstrip("\r\n")
        if self._block:
            self._block.append(line)
            if words and not words[0].isspace():  # the exception itself ends a traceback
                return self._end_of_block()
            return ""
        if words.strip() == TRACEBACK:
            self._block = [line]
            return ""
        if not words.strip() and line.strip():  # a level without a message
            return ""
        if BOX.search(words):
            self._in_box = not self._in_box
            self.hidden += self._in_box
            return ""
        if self._in_box:
            return ""
        if NOTICE.search(words):
            return line if self._is_ours(words) else self._leave_out()
        return line

    def _end_of_block(self) -> str:
        block, self._block = "".join(self._block), []
        return block if any(map(self._is_ours, block.splitlines())) else self._leave_out()

    def _leave_out(self) -> str:
        self.hidden += 1
        return ""

    def _is_ours(self, line: str) -> bool:
        """True: the line names the pack or a file of it, other than the launcher at the start of every traceback.

        False: not.
        """
        at = line.find(self.pack)
        after = line[at + len(self.pack) :]
        return at >= 0 and (not after or not (after[0].isalnum() or after[0] in "-_.")) and "launcher.py" not in after


class QuietRecords(logging.Filter):
    """Logging filter for a host in this process."""

    def __init__(self, pack: Path) -> None:
        super().__init__()
        self.pack = f"{pack}"

    def filter(self, record: logging.LogRecord) -> bool:
        """False: a failure of a part that is not needed. True: any other record."""
        text = record.getMessage()
        return self.pack in text or not (NOTICE.search(text) or TRACEBACK in text or BOX.search(text))


def quiet_logging(pack: Path, log: Path) -> None:
    """Log warnings and errors of this process to the console, without such failures, and all of them to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    console, file = logging.StreamHandler(), logging.FileHandler(log, encoding="utf-8", errors="backslashreplace")
    console.addFilter(QuietRecords(pack))
    for handler in (console, file):
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logging.getLogger().addHandler(handler)


class Follower(threading.Thread):
    """Thread that prints a growing log file through a filter until it is stopped."""

    def __init__(self, log: Path, filter: QuietStart, show: Callable[[str], object]) -> None:
        super().__init__(daemon=True)
        self.log, self.filter, self.show = log, filter, show
        self.ended = threading.Event()

    def run(self) -> None:
        with open(self.log, encoding="utf-8", errors="replace", newline="") as file:
            while True:
                last = self.ended.wait(SECONDS)
                shown = self.filter.feed(file.read())
                if shown:
                    self.show(shown.replace("\r\n", "\n"))
                if last:
                    return

    def stop(self) -> None:
        """Show the remaining text and end."""
        self.ended.set()
        self.join()
