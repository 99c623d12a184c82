"""A measurement's rows in Locust's statistics. Knows Locust's tables; knows nothing of HTTP.

Locust's columns are all called "response time" and meant in milliseconds. Each row here names its
own unit instead: where a name says tok/s, read every one of those columns as tokens per second.
"""

from __future__ import annotations

from typing import Any

import gevent
from locust import stats
from locust.env import Environment

from loadtest.measurement import Measurement

METRIC = "metric"  # the Type column
TIME_TO_FIRST_TOKEN = "time to first token ms"
PREFILL = "prefill tok/s"
DECODE = "decode tok/s"


def record_metrics(environment: Environment, measurement: Measurement) -> None:
    """Add one sample to each metric's row; a metric that this request has not is left alone.

    Logged straight into the rows, not as Locust request events: the "Aggregated" row, the
    requests per second and the failure ratio then count requests only, never metrics too.
    """
    values = {
        TIME_TO_FIRST_TOKEN: measurement.time_to_first_token_ms,
        PREFILL: measurement.prefill_tokens_per_second,
        DECODE: measurement.decode_tokens_per_second,
    }
    for name, value in values.items():
        if value is not None:
            environment.stats.get(name, METRIC).log(value, 0)


def three_digits(value: float) -> float:
    """`value` rounded to three significant digits: the key under which a percentile counts it."""
    return float(f"{value:.3g}")


def use_three_digits() -> None:
    """Have Locust's percentiles and medians keep three digits where its default keeps two.

    Locust documents this replacement ("Customizing response time bucketing"). Its default also
    rounds below 100 to whole numbers, which is 7 % of a first token after 7 ms.
    """
    stats.bucket_response_time = three_digits


def finish_csv(environment: Environment, **_: Any) -> None:
    """Listener for Locust's `quitting` event: let the CSV files have the run's last second.

    Locust writes them once a second and never at the end. Its writer's next turn is due before
    the sleep here is over.
    """
    if environment.parsed_options.csv_prefix:
        gevent.sleep(stats.CSV_STATS_INTERVAL_SEC)
