"""The command `dlight-serve`: run, and what serve/tools.py adds."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from profiles import ProfileError
from serve import logs
from serve.config import DEFAULT_FILE, Settings, load_settings
from serve.errors import ConfigError, ServeError
from serve.placement import start_host

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Command: TypeAlias = Callable[[argparse.Namespace, Settings], int]
FLAGS = {
    "--model": ("model.source", "bundled:NAME, synthetic:NAME, a folder, or a hub id"),
    "--backend": ("library.backend", "what to run on (default cpu)"),
    "--profile": ("library.profile", "a schedule profile (see `profiles list`)"),
    "--profiles-dir": ("library.profiles_dir", "a folder of your own profiles"),
    "--cache-dir": ("library.cache_dir", "where compiled libraries are kept"),
}
SERVER_FLAGS = {
    "--host": ("server.host", "address to listen on (default 127.0.0.1)"),
    "--port": ("server.port", "port to listen on (default 8000; 0 takes a free one)"),
    "--name": ("model.name", "the name that clients use for the model"),
}


def say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done; 1 an error, told on standard error; 2 wrong usage; 143 terminated.

    A server that runs drains on SIGTERM; before that, a compiler's child process ends with us.
    """
    signal.signal(signal.SIGTERM, _terminated)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until a server knows what to do about it
    given = sys.argv[1:] if arguments is None else arguments
    parsed = parser(is_run=given[:1] == ["run"]).parse_args(given)
    try:
        settings = settings_from(parsed)
        logs.configure(settings.server.log_level, settings.server.log_format)
        code: int = parsed.command(parsed, settings)
        return code
    except (ServeError, ProfileError) as error:
        print(f"dlight-serve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _terminated(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise SystemExit(128 + number)


def settings_from(parsed: argparse.Namespace) -> Settings:
    """A file that was read once has to be there from then on."""
    if parsed.config is None and DEFAULT_FILE.is_file():
        parsed.config = DEFAULT_FILE
    given = {key: text for key, text in vars(parsed).items() if "." in key and text is not None}
    for assignment in parsed.set:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError("command line", "--set", assignment, "SECTION.KEY=VALUE")
        given[key] = text
    return load_settings(parsed.config, flags=given)


def parser(is_run: bool = False) -> argparse.ArgumentParser:
    """`is_run`: for the command `run` alone."""
    top = argparse.ArgumentParser(
        prog="dlight-serve",
        description="Serve GPT-2 from libraries compiled by TVM under named schedule profiles.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, "run", _run, "serve the OpenAI API", FLAGS | SERVER_FLAGS)
    if not is_run:  # the server has no compiler, and no TVM: its front is to be light
        from serve import tools

        tools.add_to(commands, _command, FLAGS)
    return top


def _command(
    commands: Commands, name: str, function: Command, text: str, flags: dict[str, tuple[str, str]]
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=function)
    for flag, (key, meaning) in flags.items():
        command.add_argument(flag, dest=key, metavar=flag[2:].upper(), help=meaning)
    command.add_argument("--config", type=Path, help="settings file (default ./serve.toml)")
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any other setting"
    )
    return command


def _run(parsed: argparse.Namespace, settings: Settings) -> int:
    host = start_host(settings)  # it imports TVM while we import HTTP
    from serve import launch

    launch.run(settings, host, lambda: settings_from(parsed), say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
