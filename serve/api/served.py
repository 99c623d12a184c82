"""The libraries this server answers from, by every name they go by. Knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeVar

from serve.engine import Gauges, RunnerLimits, SamplingParams, Stream
from serve.errors import EngineError, ModelError, ModelNotFoundError, OverloadedError
from serve.grammar import Grammars
from serve.tokenizer import Tokenizer

Result = TypeVar("Result")
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class EngineClient(Protocol):
    """What the API needs of an engine, wherever it runs."""

    @property
    def limits(self) -> RunnerLimits: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def is_accepting(self) -> bool: ...
    def gauges(self) -> Gauges: ...
    def check_room(self, num_sequences: int, num_prompt_tokens: int) -> None: ...
    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, share_key: str | None = ""
    ) -> Stream: ...
    async def drain(self, seconds: float) -> None: ...


def _not_counted(reason: str) -> None:
    """For models whose rejections nobody counts."""


@dataclass(frozen=True)
class ServedModel:
    """One model on one library.

    name: the model's, which it shares with its other libraries. aliases: what means this library
    alone. max_context: tokens. digest: the library's. created: Unix seconds. other_names: of the
    model, too. on_rejected: called for every request that the engine refused to queue.
    chat_template: its Jinja2 source; None: the shipped one. grammars: those that the engine knows;
    None: no structured output.
    """

    name: str
    aliases: tuple[str, ...]
    backend: str
    profile: str
    quantization: str
    max_context: int
    digest: str
    created: int
    tokenizer: Tokenizer
    engine: EngineClient
    on_rejected: Callable[[str], None] = _not_counted
    other_names: tuple[str, ...] = ()
    chat_template: str | None = None
    grammars: Grammars | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases, *self.other_names)

    @property
    def vocab_size(self) -> int:
        return self.engine.limits.vocab_size

    def submit(
        self, asked: Sequence[tuple[Sequence[int], SamplingParams]], share_key: str
    ) -> list[Stream]:
        """Queue a sequence for each prompt: all of them, or none. Raises as Engine.submit does."""
        streams: list[Stream] = []
        try:
            self.engine.check_room(len(asked), sum(len(prompt) for prompt, _ in asked))
            for prompt, params in asked:
                streams.append(self.engine.submit(prompt, params, share_key))
        except BaseException as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, OverloadedError | EngineError):
                self.on_rejected(error.reason or "engine_dead")
            raise
        return streams


class ServedModels:
    """What is loaded, in the order of /v1/models. Used in the event loop alone.

    The model's own name means the default library, or one drawn by the traffic's weights. Requests
    with the same value of the header `sticky_header` get the same one.
    """

    def __init__(
        self, models: Iterable[ServedModel] = (), sticky_header: str = "x-session-id"
    ) -> None:
        self.sticky_header = sticky_header
        self.default: ServedModel | None = None
        self._models: list[ServedModel] = []
        self._traffic: dict[ServedModel, float] = {}
        self._by_alias: dict[str, ServedModel] = {}
        for model in models:
            self.add(model)

    def add(self, model: ServedModel) -> None:
        """The first one is the default. Raises ModelError if one of its aliases is taken."""
        for name in model.aliases:
            if name in self._by_alias:
                raise ModelError(f"two libraries are named {name!r}")
        self._models.append(model)
        self._by_alias.update(dict.fromkeys(model.aliases, model))
        self.default = self.default or model

    def replace(self, old: ServedModel, new: ServedModel) -> None:
        """The new one has the old one's names and its part in the traffic."""
        assert old.aliases == new.aliases
        self._models[self._models.index(old)] = new
        self._by_alias.update(dict.fromkeys(new.aliases, new))
        self._traffic = {new if m is old else m: w for m, w in self._traffic.items()}
        self.default = new if self.default is old else self.default

    def remove(self, model: ServedModel) -> None:
        """Its names mean nothing from now on; what it computes goes on."""
        self._models.remove(model)
        self._traffic.pop(model, None)
        for name in model.aliases:
            del self._by_alias[name]
        if self.default is model:
            self.default = next(iter(self._models), None)

    def set_default(self, model: ServedModel) -> None:
        """What the model's own name means. Ends a split."""
        assert model in self._models
        self.default, self._traffic = model, {}

    def set_traffic(self, weights: Mapping[ServedModel, float]) -> None:
        """Split the model's own name by these weights; if all are 0, it means the default."""
        self._traffic = {model: weight for model, weight in weights.items() if weight > 0}

    @property
    def traffic(self) -> Mapping[ServedModel, float]:
        return self._traffic

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for model in self._models for name in model.names))

    def find(self, name: str, headers: Mapping[str, str] = _NO_HEADERS) -> ServedModel:
        """Who answers a request with these headers. Raises as `named`."""
        model = self.named(name)
        return model if name in model.aliases else self._drawn(headers) or model

    def named(self, name: str) -> ServedModel:
        """Raises ModelNotFoundError, which lists the known names."""
        model, default = self._by_alias.get(name), self.default
        if model is None and default is not None and name in (default.name, *default.other_names):
            model = default
        if model is None:
            raise ModelNotFoundError(name, self.names)
        return model

    async def submit(
        self,
        name: str,
        headers: Mapping[str, str],
        submit: Callable[[ServedModel], Awaitable[Result]],
    ) -> tuple[ServedModel, Result]:
        """Have `submit` queue a request with the named model; that model, and its result.

        A library that was unloaded between its choice and the queue is chosen again.
        """
        model = self.find(name, headers)
        try:
            return model, await submit(model)
        except EngineError:
            if model in self._models:
                raise
        model = self.find(name, headers)
        return model, await submit(model)

    def _drawn(self, headers: Mapping[str, str]) -> ServedModel | None:
        if not self._traffic:
            return None
        who = headers.get(self.sticky_header)
        point = random.random() if who is None else _point(who)
        point *= sum(self._traffic.values())
        for model, weight in self._traffic.items():
            point -= weight
            if point < 0:
                return model
        return model

    @property
    def is_alive(self) -> bool:
        """Whether every engine's thread still answers."""
        return all(model.engine.is_alive for model in self)

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded, and all of them take new work."""
        return bool(self._models) and all(model.engine.is_accepting for model in self)


def _point(who: str) -> float:
    """From 0 to 1, always the same for the same text."""
    digest = hashlib.sha256(who.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
