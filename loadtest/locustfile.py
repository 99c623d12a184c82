"""What Locust runs: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8000`.

See docs/loadtest.md for the options, the rows and their units.
"""

from __future__ import annotations

from locust import events

from loadtest.options import add_options
from loadtest.rows import finish_csv, use_three_digits
from loadtest.user import CompletionUser

__all__ = ["CompletionUser"]

events.init_command_line_parser.add_listener(add_options)
events.quitting.add_listener(finish_csv)
use_three_digits()
