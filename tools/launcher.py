"""Start ComfyUI: `python launcher.py [--stop-with-input] MAIN_PY [ARGUMENTS]...`

It does three things that main.py does not. It declares the two torchvision operators without which torchvision fails to
import where its compiled part does not match the installed torch. It lets the host start where torchaudio is missing or
does not match torch: newer hosts import it at start, for models that this project never loads. And, with
--stop-with-input, it ends the server when its standard input closes, so that no server outlives the process that
started it. Standard library only at import.
"""

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

OPERATORS = ("nms", "qnms")  # those that torchvision registers fake kernels for, whether they exist or not
_libraries: list[object] = []  # torch forgets a definition when its Library is collected


class _DeclareOperators(MetaPathFinder):
    """Import finder that finds nothing; it acts between torchvision's attempt to load its operators and their first
    use.
    """

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
    """Make torchvision importable without its compiled operators; changes nothing where they load.

    Costs nothing until torchvision is imported; must be called before that. May be called repeatedly.
    """
    if not any(isinstance(finder, _DeclareOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareOperators())


AUDIO = "torchaudio"


class _AudioFinder(MetaPathFinder):
    """Import finder for torchaudio, or for an empty module that raises an error when it is used."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == AUDIO:
            found = PathFinder.find_spec(name, path)
            loader = _AudioLoader(None if found is None else found.loader)
            if found is None:
                return ModuleSpec(name, loader, is_package=True)
            found.loader = loader
            return found
        if (
            name.startswith(f"{AUDIO}.")
            and name.count(".") == 1
            and getattr(sys.modules.get(AUDIO), "_stand_in", False)
        ):
            return ModuleSpec(name, _AudioLoader(None), is_package=True)
        return None


class _AudioLoader(Loader):
    """Import loader that runs the real one; where that is missing or fails, the module becomes a stand-in."""

    def __init__(self, real: Loader | None) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        why = "is not installed"
        if self.real is not None:
            try:
                return self.real.exec_module(module)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                why = f"does not work here ({error})"
        for name in [name for name in sys.modules if name.startswith(f"{AUDIO}.") and module.__name__ == AUDIO]:
            del sys.modules[name]

        def missing(name: str) -> object:
            raise AttributeError(f"{AUDIO}.{name}: {AUDIO} {why}. Install the build that fits your torch.")

        module.__dict__.update(_stand_in=True, __getattr__=missing, __path__=[])


def allow_missing_torchaudio() -> None:
    """Make `import torchaudio` succeed where it is missing or broken; using it then raises an error that says so.

    Costs nothing until torchaudio is imported. May be called repeatedly.
    """
    if not any(isinstance(finder, _AudioFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AudioFinder())


def _stop_when_input_closes() -> None:
    while os.read(0, 4096):
        pass
    if os.name == "nt":
        import _thread

        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
    os._exit(1)  # the main thread did not end, for instance in a long computation


def main(arguments: Sequence[str]) -> None:
    """Run main.py as the main program. arguments: as in the module's docstring, without the program."""
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
    allow_missing_torchaudio()
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
