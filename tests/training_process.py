"""Training runs in processes of their own, for tests that kill them. Not a test and not imported by one.

Arguments: root of the host, then recipes. Without a recipe each line on standard input names one, which is trained in
a process forked off this one (whose imports are done); the answers are the lines `started PID` and `ended STATUS`.
What a run prints is appended to RECIPE.out.
"""

import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tests"]
runpy.run_path(str(ROOT / "_alias.py"))

from comfyui_controlnext.tools.train_command import bring_in_host  # noqa: E402


def train(recipe: Path) -> int:
    from comfyui_controlnext.controlnext_training.command import run_config
    from comfyui_controlnext.controlnext_training.config_files import make_config, read_recipe
    from comfyui_controlnext.controlnext_training.train import Stopped
    from comfyui_controlnext.tools.reader_processes import readers_of

    with open(recipe.with_suffix(".out"), "ab") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    if "STOP_AFTER" in os.environ:
        send_stop_after(int(os.environ["STOP_AFTER"]))
    try:
        run_config(make_config(read_recipe(recipe)), recipe.parent, readers_of)
    except Stopped:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def send_stop_after(steps: int) -> None:
    """Press Ctrl-C in this process when it is told of that step; the first process alone would show it."""
    from comfyui_controlnext.controlnext_training.command import Console

    class Impatient(Console):
        def progress(self, step: int, count: int, text: str) -> None:
            super().progress(step, count, text)
            if text.startswith("step") and step == steps:
                signal.raise_signal(signal.SIGINT)

    sys.modules[Console.__module__].Console = Impatient  # type: ignore[attr-defined]


def main(host: Path, recipes: list[str]) -> int:
    bring_in_host(host, Path.cwd(), cpu=True)
    if recipes:
        return max(train(Path(recipe)) for recipe in recipes)
    import comfyui_controlnext.controlnext_training.command  # noqa: F401

    answers = os.dup(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = train(Path(line.strip()))
            sys.stdout.flush()
            os._exit(status)
        os.write(answers, f"started {child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"ended {status}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
