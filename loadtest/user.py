"""The Locust user: one streamed completion after another, each a request and its metrics."""

from __future__ import annotations

import json
import logging
import time
from uuid import uuid4

import gevent
from locust import User
from locust.env import Environment
from locust.exception import StopTest

from loadtest.errors import HostError
from loadtest.host import Host
from loadtest.measurement import Measurement
from loadtest.rows import record_metrics
from loadtest.stream import CompletionStream
from loadtest.target import Target, find_target
from loadtest.workload import Workload

WHOLE_REQUEST = "whole request ms"
FAILURE_PAUSE_SECONDS = 1.0  # so that a host which is down is not asked thousands of times a second

logger = logging.getLogger(__name__)
_warned_hosts: set[str] = set()


class CompletionUser(User):  # type: ignore[misc]  # locust is untyped here
    """Sends the Gettysburg workload as fast as the host answers (Locust's default wait is none)."""

    def __init__(self, environment: Environment) -> None:
        """Raises StopTest for a missing host or an option that no request can be made from."""
        super().__init__(environment)
        options = environment.parsed_options
        try:
            self._workload = Workload(options.prompt_tokens, options.decode_tokens)
            self._openai = Host(self.host or "", options.api_key)
        except ValueError as error:
            environment.process_exit_code = 1  # StopTest alone would leave it at 0
            raise StopTest(str(error)) from error
        self._model: str | None = options.model or None  # the web page sends ""
        self._share_prefix: bool = options.share_prefix
        self._target: Target | None = None

    def on_stop(self) -> None:
        self._openai.close()

    def complete(self) -> None:
        """One request, and before a user's first also the look-up of the model."""
        if self._target is None:
            self._target = self._find_target()
        if self._target is None or not self._request(self._target):
            gevent.sleep(FAILURE_PAUSE_SECONDS)

    tasks = [complete]  # noqa: RUF012  # as Locust wants it

    def _find_target(self) -> Target | None:
        """The model to measure; None, and a failure, if the host does not say."""
        try:
            target = find_target(self._openai, self._model)
        except HostError as error:
            self._fire("GET", "/v1/models", error=error)
            return None
        if not self._share_prefix and not target.takes_cache_salt:
            _warn_once(str(self.host), target)
        return target

    def _request(self, target: Target) -> bool:
        """Send one completion and report it; whether all was well."""
        salted = target.takes_cache_salt and not self._share_prefix
        body = self._workload.body(target.model, uuid4().hex if salted else None)
        payload = json.dumps(body).encode("utf-8")
        try:
            stream = CompletionStream(self._workload)
            with self._openai.stream(payload) as lines:
                measurement = stream.read(lines)
        except HostError as error:
            self._fire("POST", WHOLE_REQUEST, error=error)
            return False
        self._fire("POST", WHOLE_REQUEST, measurement)
        record_metrics(self.environment, measurement)
        return True

    def _fire(
        self,
        method: str,
        name: str,
        measurement: Measurement | None = None,
        error: HostError | None = None,
    ) -> None:
        """Report a request to Locust; a failed one without a time, so that it is no statistic."""
        self.environment.events.request.fire(
            request_type=method,
            name=name,
            response_time=measurement.request_ms if measurement else None,
            response_length=measurement.num_bytes if measurement else 0,
            exception=error,
            context=self.context(),
            start_time=time.time() - (measurement.request_ms / 1000 if measurement else 0),
        )


def _warn_once(host: str, target: Target) -> None:
    """Say, once a host and process, that its prefix cache cannot be kept out of the numbers."""
    if host in _warned_hosts:
        return
    _warned_hosts.add(host)
    logger.warning(
        "%s is served by %r, which may not know cache_salt, so none is sent: if the host caches "
        "prefixes, its prefill tok/s are inflated unless usage reports cached_tokens",
        host,
        target.owned_by,
    )
