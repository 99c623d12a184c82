"""The command `dlight-serve`: run, compile, profiles, bench, trace."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from profiles import ProfileError, list_profiles, load_profile
from serve import bench, launch, trace
from serve.backends import BACKENDS
from serve.compiler.compile import CompileJob
from serve.config import Settings, load_settings
from serve.errors import ConfigError, ServeError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Command: TypeAlias = Callable[[argparse.Namespace, Settings], int]
FLAGS = {
    "--model": ("model.source", "bundled:NAME, synthetic:NAME, a folder, or a hub id"),
    "--backend": ("library.backend", ", ".join(BACKENDS)),
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
    parsed = parser().parse_args(arguments)
    try:
        settings = settings_from(parsed)
        level = settings.server.log_level.upper()
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
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
    given = {key: text for key, text in vars(parsed).items() if "." in key and text is not None}
    for assignment in parsed.set:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError("command line", "--set", assignment, "SECTION.KEY=VALUE")
        given[key] = text
    return load_settings(parsed.config, flags=given)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dlight-serve",
        description="Serve GPT-2 from libraries compiled by TVM under named schedule profiles.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, "run", _run, "serve the OpenAI API", FLAGS | SERVER_FLAGS)
    _command(commands, "compile", _compile, "compile a library into the cache", FLAGS)
    profiles = commands.add_parser("profiles", help="show the schedule profiles")
    actions = profiles.add_subparsers(required=True, metavar="ACTION")
    _command(actions, "list", _list_profiles, "all profiles and their rules", FLAGS)
    show = _command(actions, "show", _show_profile, "rules, parameters and coverage", FLAGS)
    show.add_argument("name", metavar="NAME")
    no_profile = {flag: value for flag, value in FLAGS.items() if flag != "--profile"}
    bench.add_arguments(
        _command(commands, "bench", _bench, "measure prefill and decode by profile", no_profile)
    )
    trace.add_arguments(_command(commands, "trace", _trace, "show where the time goes", FLAGS))
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


def _run(_: argparse.Namespace, settings: Settings) -> int:
    launch.run(settings, say)
    return 0


def _compile(_: argparse.Namespace, settings: Settings) -> int:
    compiled = launch.select(settings).compile(settings, say)
    kernels = compiled.library.manifest.coverage
    say(f"{compiled.library.path} ({compiled.source}, {compiled.seconds:.1f} s)")
    say(f"{sum(k['rule'] is not None for k in kernels)} of {len(kernels)} kernels took a rule")
    return 0


def _list_profiles(_: argparse.Namespace, settings: Settings) -> int:
    folder = Path(settings.library.profiles_dir) if settings.library.profiles_dir else None
    for name in list_profiles(folder):
        profile = load_profile(name, folder)
        say(f"{name}: {profile.description}")
        for section, rules in profile.sections.items():
            say(f"  {section}: {', '.join(use.rule.id for use in rules) or 'no rule'}")
    return 0


def _show_profile(parsed: argparse.Namespace, settings: Settings) -> int:
    chosen = launch.select(settings, parsed.name)
    profile = chosen.profile
    say(f"{profile.name}: {profile.description}\n  {profile.source}")
    for section, rules in profile.sections.items():
        say(f"[{section}]" + ("" if rules else " no rule"))
        for use in rules:
            say(f"  {use.rule.id}: {use.rule.meaning}")
            for parameter in use.rule.parameters:
                value = use.values[parameter.name]
                legal = ", ".join(map(str, parameter.legal))
                say(f"    {parameter.name} = {value} (of {legal}): {parameter.meaning}")
    _show_coverage(chosen, settings)
    return 0


def _show_coverage(chosen: launch.Selection, settings: Settings) -> None:
    job = CompileJob(chosen.model.config, chosen.backend, chosen.profile)
    library = launch.library_cache(settings).find(job.request()["key"])
    what = f"{chosen.model.name} on {chosen.backend.name}"
    if library is None:
        say(f"coverage for {what}: not compiled yet (`dlight-serve compile`)")
        return
    say(f"coverage for {what}, library {library.manifest.digest[:12]}: kernel -> rule")
    for entry in library.manifest.coverage:
        rule = entry["rule"] or ("none (scheduled as written)" if entry["as_written"] else "none")
        say(f"  {entry['kernel']} -> {rule}   [{', '.join(entry['called_by'])}]")


def _bench(parsed: argparse.Namespace, settings: Settings) -> int:
    bench.run(bench.options_from(parsed), settings, say)
    return 0


def _trace(parsed: argparse.Namespace, settings: Settings) -> int:
    trace.run(trace.options_from(parsed), settings, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
