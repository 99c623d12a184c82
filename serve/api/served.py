"""The models this server answers for, by every name they go by. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from serve.engine import Engine, SamplingParams, Stream
from serve.errors import EngineError, ModelError, ModelNotFoundError, OverloadedError
from serve.tokenizer import Tokenizer


def _not_counted() -> None:
    """For models whose rejections nobody counts."""


@dataclass(frozen=True)
class ServedModel:
    """One model on one library. `name` is the plainest; `aliases` say profile and backend too.

    max_context: tokens. digest: the library's. created: Unix seconds. on_rejected: called for every
    request that the engine refused to queue.
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
    engine: Engine
    on_rejected: Callable[[], None] = _not_counted

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def vocab_size(self) -> int:
        return self.engine.limits.vocab_size

    def submit(
        self, prompts: Iterable[Sequence[int]], params: SamplingParams, share_key: str
    ) -> list[Stream]:
        """Queue a sequence for each prompt: all of them, or none. Raises as Engine.submit does."""
        streams: list[Stream] = []
        try:
            streams.extend(self.engine.submit(ids, params, share_key) for ids in prompts)
        except BaseException as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, OverloadedError | EngineError):
                self.on_rejected()
            raise
        return streams


class ServedModels:
    """What is loaded, in the order of /v1/models. A name belongs to one model."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._models: list[ServedModel] = []
        self._by_name: dict[str, ServedModel] = {}
        for model in models:
            self.add(model)

    def add(self, model: ServedModel) -> None:
        """Raises ModelError if one of its names is taken."""
        for name in model.names:
            if name in self._by_name:
                raise ModelError(f"two models are named {name!r}")
        self._models.append(model)
        self._by_name.update(dict.fromkeys(model.names, model))

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def find(self, name: str) -> ServedModel:
        """Raises ModelNotFoundError, which lists the known names."""
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFoundError(name, self.names)
        return model

    @property
    def is_alive(self) -> bool:
        """Whether every engine's thread still answers."""
        return all(model.engine.is_alive for model in self)

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded, and all of them take new work."""
        return bool(self._models) and all(model.engine.is_accepting for model in self)
