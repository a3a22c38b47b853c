"""The command ``bilinear-jax``: the list of commands, and how they end.

Exit status: 0; 1 if it ran and failed; 2 for wrong use, which is clear from the command line before anything is loaded;
130 after Ctrl-C; 141 if the reader of the output has gone; 143 after SIGTERM. The last three are what a shell reports
for these signals.
"""

import _thread
import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from bilinear_jax.commands import common, generate, train
from bilinear_jax.commands.compiled import keep_compiled
from bilinear_jax.errors import UnknownNameError
from bilinear_jax.store.terminal import say
from bilinear_jax.store.version import library_version

INTERRUPTED, TERMINATED = 130, 143
COMMANDS = ("tour", "generate", "spectra", "trace", "pages", "eval", "certify", "train", "convert", "export", "upload")
EXAMPLES = """examples:
  bilinear-jax tour                                      the whole method on the model that ships with the package
  bilinear-jax generate --prompt "Once upon a time"      text from a model
  bilinear-jax spectra --layer 2                         which output features have the largest eigenvalues
  bilinear-jax trace --layer 2 --feature 7               why one of them fires, from the weights
  bilinear-jax pages --layer 2 --features top:200 --out site    a page for each of many features
  bilinear-jax eval                                      the loss of a model, and the scores of its SAEs
  bilinear-jax certify model.gguf --data text.txt        how well a gated model is described by bilinear tensors
  bilinear-jax train lm ts-nano --data stories.txt.gz --out runs/mine   a model of your own
  bilinear-jax convert tdooms/fw-medium fw-medium        convert a published checkpoint
  bilinear-jax export runs/mine/model mine               write it back, for torch
  bilinear-jax upload runs/mine/model someone/mine       put it on the hub

Each command has a --help with examples. Exit status: 0; 1 if it failed; 2 for wrong use; 130 after Ctrl-C;
143 after SIGTERM.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. Wrong use, ``--help`` and ``--version`` raise ``SystemExit``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in words if not word.startswith("-")), None)
    parser = _parser(command)
    try:
        try:
            _run(parser, words, command)
        finally:
            print(end="", flush=True)  # here a broken pipe can still be handled
        return 0
    except common.WrongUse as error:
        parser.error(str(error))
    except BrokenPipeError:
        _forget_output()
        return 141
    except KeyboardInterrupt:
        print("bilinear-jax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print("bilinear-jax: terminated", file=sys.stderr)
        return TERMINATED
    except Exception as error:
        if "--debug" in words:
            say(traceback.format_exc(), sys.stderr)
        say(f"bilinear-jax: error: {_in_one_line(error)}", sys.stderr)
        try:
            print(end="", flush=True)
        except OSError:  # it would fail again at exit
            _forget_output()
        return 1


def run_and_exit() -> None:
    """Run ``main`` as a process, and end it.

    After Ctrl-C and SIGTERM it ends at once: a normal exit crashes if the compiler still works in another thread.
    """
    keep_compiled(sys.argv[1:])
    status = main()
    if status in (INTERRUPTED, TERMINATED):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parser(command: str | None) -> common.Parser:
    """The parser, with the arguments of this command only: those of ``pages`` need slow imports."""
    about = "Weight-based interpretability of bilinear networks."
    parser = common.Parser(prog="bilinear-jax", description=about, epilog=EXAMPLES)
    common.add_general(parser)
    parser.add_argument("--version", action="version", version=f"bilinear-jax {library_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=common.Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"bilinear_jax.commands.{name}")
        about = f"{module.HELP[0].upper()}{module.HELP[1:]}."
        each = commands.add_parser(name, help=module.HELP, description=about, epilog=module.EXAMPLES)
        common.add_general(each)
        each.set_defaults(module=module, json=False)
        if name == command:
            module.add_arguments(each)
            parser.prog = each.prog  # an error names the help of the command
    return parser


def _run(parser: common.Parser, words: list[str], command: str | None) -> None:
    given, overrides = train.split_overrides(words) if command == "train" else (words, {})
    options = parser.parse_args(given, argparse.Namespace(overrides=overrides, words=words))
    # With --json the standard output holds only JSON.
    with (
        _plain_warnings(),
        _heeding_signals(),
        contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext(),
    ):
        result = options.module.run(options)
    if result is None:
        return
    if options.json:
        shown = json.dumps(result, indent=2, allow_nan=False).replace("\x7f", "\\u007f")  # the one control it leaves
    else:
        shown = options.module.text(result)
    exact = options.module is generate and not sys.stdout.isatty()
    say(shown, raw=options.json or exact)


@contextlib.contextmanager
def _plain_warnings():
    """Print each of the library's warnings as one line on the standard error, without its place in the code."""

    def show(message: Any, *_, **__) -> None:
        say(f"bilinear-jax: warning: {' '.join(str(message).split())}", sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


class _Terminated(BaseException):
    """SIGTERM. As an exception it lets every writer remove what it has not finished."""


@contextlib.contextmanager
def _heeding_signals():
    """Raise the first SIGTERM as ``_Terminated``, unless the process has a handler of its own or ignores it.

    SIGTERM and Ctrl-C are raised again if they come during a callback of the garbage collector (as JAX has): Python
    drops them there.
    """
    before, received = sys.unraisablehook, []

    def terminate(number: int, frame: Any) -> None:
        if not received:  # a second one must not disturb the removing
            received.append(number)
            raise _Terminated

    def again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, _Terminated):
            received.clear()
            threading.Timer(0.05, _thread.interrupt_main, [signal.SIGTERM]).start()
        elif issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            before(unraisable)

    in_main = threading.current_thread() is threading.main_thread()  # only there can a handler be set
    ours = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_one_line(error: Exception) -> str:
    """The message of an error that the library raises on purpose; for any other error, with its type."""
    message = " ".join(str(error).split())
    expected = isinstance(error, OSError | ValueError | ImportError | ArithmeticError | RuntimeError | UnknownNameError)
    return message if expected and message else f"{type(error).__name__}: {message} (--debug shows where)"


def _forget_output() -> None:
    """Nobody reads the standard output any more. The rest of its buffer must not fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
