"""Command line of this project: `python run.py demo`, `test` or `comfy`; `python run.py --help` lists the others.

This file uses syntax that any Python can parse, so that an old one prints a sentence and not a traceback. It and
everything in tools/ that runs before the environment exists use the standard library only.
"""

import os
import runpy
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - this line is for the Pythons that are too old
    sys.exit(
        "ComfyUI-ControlNeXt needs Python 3.10 or newer, and %s is Python %d.%d. "  # noqa: UP031
        "Run this file with a newer one, for example: python3.11 run.py"
        % (sys.executable, sys.version_info[0], sys.version_info[1])
    )

ROOT = os.path.dirname(os.path.realpath(__file__))
# Python puts a script's folder on sys.path; here that would let `nodes` and `models` shadow the host's.
sys.path[:] = [entry for entry in sys.path if os.path.normcase(os.path.realpath(entry)) != os.path.normcase(ROOT)]
runpy.run_path(os.path.join(ROOT, "_alias.py"))

from comfyui_controlnext.tools.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
