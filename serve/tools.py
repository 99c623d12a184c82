"""The commands beside `run`: compile, profiles, bench, trace. They work without a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from profiles import list_profiles, load_profile
from serve import bench, loading, trace
from serve.compiler.compile import CompileJob
from serve.config import Settings

# (subparsers, name, function, help, flags) -> the new command
AddCommand = Callable[..., argparse.ArgumentParser]


def say(line: str) -> None:
    print(line, flush=True)


def add_to(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    command: AddCommand,
    flags: Mapping[str, tuple[str, str]],
) -> None:
    """Add them to the command line's parser; `flags`: the settings that all of them take."""
    command(commands, "compile", _compile, "compile a library into the cache", flags)
    profiles = commands.add_parser("profiles", help="show the schedule profiles")
    actions = profiles.add_subparsers(required=True, metavar="ACTION")
    command(actions, "list", _list_profiles, "all profiles and their rules", flags)
    show = command(actions, "show", _show_profile, "rules, parameters and coverage", flags)
    show.add_argument("name", metavar="NAME")
    no_profile = {flag: value for flag, value in flags.items() if flag != "--profile"}
    bench.add_arguments(
        command(commands, "bench", _bench, "measure prefill and decode by profile", no_profile)
    )
    trace.add_arguments(command(commands, "trace", _trace, "show where the time goes", flags))


def _compile(_: argparse.Namespace, settings: Settings) -> int:
    compiled = loading.select(settings).compile(settings, say)
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
    chosen = loading.select(settings, parsed.name)
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


def _show_coverage(chosen: loading.Selection, settings: Settings) -> None:
    job = CompileJob(chosen.model.config, chosen.backend, chosen.profile)
    library = loading.library_cache(settings).find(job.request()["key"])
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
