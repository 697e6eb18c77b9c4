"""Start ComfyUI: `python launcher.py [--stop-with-input] MAIN_PY [ARGUMENTS]...`

Two things that main.py does not do by itself. It declares the two torchvision operators without which torchvision
does not import where its compiled part does not fit the installed torch. And, with --stop-with-input, it ends the
server when its standard input closes, so that no server outlives the process that started it.
Standard library only at import.
"""

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = ("nms", "qnms")  # those that torchvision registers fake kernels for, whether they exist or not
_libraries: list[object] = []  # torch forgets a definition when its Library is collected


class _DeclareOperators(MetaPathFinder):
    """Finds nothing; acts at the moment between torchvision's attempt to load its operators and its first use."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision._meta_registrations":
            _define_absent_operators()
        return None


def _define_absent_operators() -> None:
    import torch

    absent = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if absent:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in absent:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


def declare_missing_torchvision_ops() -> None:
    """Arrange for torchvision to import without its compiled operators; changes nothing where they load.

    Costs nothing until torchvision is imported; call it before that. Calling it again is harmless.
    """
    if not any(isinstance(finder, _DeclareOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareOperators())


def _stop_when_input_closes() -> None:
    while os.read(0, 4096):
        pass
    if os.name == "nt":
        import _thread

        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
    os._exit(1)  # the main thread did not end, for instance inside a long computation


def main(arguments: Sequence[str]) -> None:
    """Run main.py as if it had been started itself. arguments: as in the module's docstring, without the program."""
    rest = list(arguments)
    if rest[:1] == ["--stop-with-input"]:
        rest = rest[1:]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts programs without it
        threading.Thread(target=_stop_when_input_closes, daemon=True).start()
    here = os.path.dirname(os.path.realpath(__file__))
    host = os.path.dirname(os.path.abspath(rest[0]))
    sys.path[:] = [host, *(entry for entry in sys.path if os.path.realpath(entry) != here)]
    sys.argv[:] = rest
    declare_missing_torchvision_ops()
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
