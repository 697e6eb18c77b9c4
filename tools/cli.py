"""Commands of run.py. Standard library only until the right interpreter runs; the rest is imported per command.

A further command is one entry of COMMANDS: a function that adds its options and one that runs it.
"""

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import environment, host, releases
from .comfy_client import ComfyError
from .environment import ROOT, SetupError


class Parser(argparse.ArgumentParser):
    """Parser that shows its full help where a command with an epilog lacks a required argument."""

    def error(self, message: str) -> NoReturn:
        if self.epilog and "required" in message:
            self.print_help(sys.stderr)
            self.exit(2, f"\n{self.prog}: error: CONFIG.toml is missing. Name a recipe.\n")
        super().error(message)


@dataclass(frozen=True)
class Command:
    """Command of run.py. level: the pinned lists it needs ("host" or "test"), empty for none: any Python runs it; add:
    adds its options; run: returns the exit status.

    newest: True brings the pinned release of ComfyUI where git reaches it, else the wheel; False always the wheel;
    check: raises SetupError for impossible options, before anything is installed.
    """

    help: str
    level: str
    add: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    newest: bool = False
    check: Callable[[argparse.Namespace], None] = lambda options: None


def clone_folder() -> Path:
    """Path of the clone as the user typed it: links are not followed, so that one inside
    `custom_nodes` is recognised.
    """
    script = Path(os.path.abspath(sys.argv[0]))
    return script.parent if script.name == "run.py" else ROOT


def _add_cpu(parser: Parser) -> None:
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")


def _demo(options: argparse.Namespace) -> int:
    from .demo_sheet import run_demo

    run_demo(_own(options) or options.brought, cpu=options.cpu)
    return 0


def _own(options: argparse.Namespace) -> Path | None:
    """Path of the user's own ComfyUI; None without one."""
    return host.find(options.comfyui, clone_folder())


def _add_comfy(parser: Parser) -> None:
    parser.add_argument("--port", type=int, default=8188, metavar="N", help="default 8188")
    _add_cpu(parser)


def _comfy(options: argparse.Namespace) -> int:
    from .comfy_command import serve

    own = _own(options)
    return serve(own or options.brought, options.port, own / "models" if own else None, cpu=options.cpu)


def _add_test(parser: Parser) -> None:
    parser.add_argument("--fast", action="store_true", help="only the tests that need no ComfyUI")
    parser.add_argument("--long", action="store_true", help="also the tests marked `long`")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="a step (format, lint, security, types, pytest), a folder of tests/, or the test files whose path holds "
        "this; repeatable",
    )
    parser.add_argument("-k", dest="expression", metavar="EXPR", help="only pytest, and there only these tests")


def _test(options: argparse.Namespace) -> int:
    from .checks import CheckOptions, run_checks

    def provide() -> Path:
        return host.provide(options.comfyui, clone_folder())

    only = options.only or (["pytest"] if options.expression else [])
    return run_checks(CheckOptions(provide, options.long, options.fast, options.expression), only)


def _add_convert(parser: Parser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a ControlNet-XS file, of either set of names")
    parser.add_argument("target", type=Path, metavar="OUT", help="the new .safetensors file")
    parser.add_argument("--layout", choices=("xs_official", "xs_diffusers"), required=True, help="its names")
    parser.add_argument("--num-heads", default="", metavar="N,N,..", help="attention heads per level, where unknown")


def _convert(options: argparse.Namespace) -> int:
    from ..controlnext_core.checkpoint import CheckpointError
    from ..controlnext_core.xs_convert import convert

    try:
        print(convert(options.source, options.target, options.layout, options.num_heads))
    except CheckpointError as error:
        raise SetupError(str(error)) from error
    return 0


def _add_bench(parser: Parser) -> None:
    from .bench import add_options

    add_options(parser)


def _bench(options: argparse.Namespace) -> int:
    from .bench import run_benchmarks

    return run_benchmarks(options, lambda: host.provide(options.comfyui, clone_folder()))


def _add_gpu_day(parser: Parser) -> None:
    from .gpu_day import add_options

    add_options(parser)


def _gpu_day(options: argparse.Namespace) -> int:
    from .gpu_day import run_gpu_day

    return run_gpu_day(options, lambda: host.provide(options.comfyui, clone_folder()))


def _add_queue(parser: Parser) -> None:
    from .queue_hosts import add_options

    add_options(parser)


def _queue(options: argparse.Namespace) -> int:
    from .queue_hosts import run_queue

    return run_queue(options)


def _add_archive(parser: Parser) -> None:
    from .archive import add_options

    add_options(parser)


def _archive(options: argparse.Namespace) -> int:
    from .archive import run_archive

    return run_archive(options)


def _add_train(parser: Parser) -> None:
    from .train_command import add_options

    add_options(parser)


def _check_train(options: argparse.Namespace) -> None:
    from .train_command import check_order

    check_order(options)


def _train(options: argparse.Namespace) -> int:
    from .train_command import run_train

    own = _own(options)
    return run_train(options, own or options.brought, own=own is not None)


def _add_train_demo(parser: Parser) -> None:
    from .demo_weights.train_demo import add_options

    add_options(parser)


def _train_demo(options: argparse.Namespace) -> int:
    from .demo_weights.train_demo import run_stage

    return run_stage(options, host.provide(options.comfyui, clone_folder()))


COMMANDS = {
    "demo": Command(
        "draw with the demo's weights in a real ComfyUI and show the result", "host", _add_cpu, _demo, True
    ),
    "comfy": Command("start ComfyUI with the pack, for use in a browser", "host", _add_comfy, _comfy, True),
    "convert": Command("write a ControlNet-XS file with the other set of names", "host", _add_convert, _convert),
    "train": Command(
        "train a ControlNeXt or a ControlNet-XS from a recipe", "host", _add_train, _train, True, _check_train
    ),
    "train-demo": Command("make the weights of the demo again, in hours", "host", _add_train_demo, _train_demo),
    "bench": Command("measure speed and memory beside the bare model and stock ControlNet", "host", _add_bench, _bench),
    "queue": Command("run one workflow many times on several ComfyUIs that run", "", _add_queue, _queue),
    "archive": Command("list and check the files that the registry would get", "", _add_archive, _archive),
    "gpu-day": Command(
        "measure and test all that needs a GPU, in slices, without a network", "", _add_gpu_day, _gpu_day
    ),
    "test": Command("run every check and test", "test", _add_test, _test),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line; ends the process with a usage message where they are wrong."""
    parser = Parser("run.py", description="ComfyUI-ControlNeXt: try it, test it, use it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        sub.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI instead of downloading one")
        sub.add_argument("--venv", action="store_true", help="use the project's own .venv whatever Python runs this")
        if command.newest:
            sub.add_argument(
                "--comfyui-release",
                metavar="TAG|wheel",
                help=f"bring this release of ComfyUI with git (default {releases.PINNED.tag}), or the wheel of "
                f"ComfyUI {host.VERSION}",
            )
        command.add(sub)
    return parser.parse_args(arguments)


def bring_host(options: argparse.Namespace, arguments: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """Choose the ComfyUI to bring, print the choice with its reason, clone a release; sets options.brought, None for
    the wheel.

    Returns the Python that must continue, None for the running one, and the arguments for it, which hold the choice. In
    a Python of the project's environments the line was printed before; of several processes only one prints it.
    """
    choice = releases.choose(options.comfyui_release)
    if not Path(sys.prefix).name.startswith(".venv") and os.environ.get("RANK", "0") == "0":
        print(choice.line, flush=True)
    again = arguments if options.comfyui_release else [arguments[0], "--comfyui-release", choice.flag, *arguments[1:]]
    options.brought = None
    if choice.release is None:
        return None, again
    options.brought = releases.clone(choice.release)
    return releases.python_for(choice.release, options.venv), again


def run_again_with(python: Path, arguments: Sequence[str]) -> int:
    """Run the same command in `python`, which replaces this process where the system can; otherwise waits for it."""
    command = [str(python), os.path.abspath(sys.argv[0]), *arguments]
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(python, command)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # it received the same Ctrl-C and is cleaning up


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status: 0 success, 1 failure, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # paths may hold letters that a console's code page lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    command = COMMANDS[options.command]
    try:
        command.check(options)
        bring = command.newest and _own(options) is None
        python, again = bring_host(options, arguments) if bring else (None, arguments)
        if (not bring or options.brought is None) and (command.level or options.venv):
            python = environment.choose(command.level or "host", options.venv)
        if python is not None:
            return run_again_with(python, again)
        if bring and options.brought is None:
            options.brought = host.provide()
        return command.run(options)
    except (SetupError, ComfyError) as error:
        print(f"run.py {options.command}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Run the same command again at any time; what is unfinished is made again.", file=sys.stderr
        )
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC and getattr(error, "winerror", None) != 112:
            raise
        where = error.filename or ROOT
        print(f"run.py {options.command}: the disk is full ({where}). Free some space, run it again.", file=sys.stderr)
    return 1
