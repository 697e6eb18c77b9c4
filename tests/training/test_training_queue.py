"""Output of the client that queues a training: progress on one line of a terminal, only its end in a file."""

from __future__ import annotations

import io
import struct

import pytest
from comfyui_controlnext.controlnext_training import queue_training
from comfyui_controlnext.controlnext_training.queue_training import NODE_TEXT, tell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TEXTS = [
    "encoding 1 of 12",
    "encoding 12 of 12",
    "resumed at step 2",
    "validating after step 4: loss with and without the control",
    "validating after step 4: picture 1 of 2",
    "step 5/6  loss 0.1000",
]


def printed(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr(queue_training, "_width", 0)
    for text in TEXTS:
        message = struct.pack(">II", NODE_TEXT, 1) + b"7" + text.encode()
        assert tell(message, "prompt", {}) is None
    return stream.getvalue()


def test_progress_stays_on_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(Terminal(), monkeypatch).split("\n")
    assert [line.split("\r")[-1].strip() for line in lines] == [TEXTS[1], TEXTS[2], TEXTS[4], TEXTS[5], ""]
    assert lines[0] == f"\r{TEXTS[0]}\r{TEXTS[1]}"
    assert len(lines[2].split("\r")[2]) == len(TEXTS[3]), "blanks cover the longer text before"


def test_a_file_gets_the_end_of_the_encoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(io.StringIO(), monkeypatch).splitlines() == [TEXTS[1], TEXTS[2], TEXTS[5]]
