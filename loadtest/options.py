"""The load test's own command-line options, added to Locust's. Knows nothing of what uses them."""

from __future__ import annotations

from argparse import ArgumentTypeError

from locust.argument_parser import LocustArgumentParser

from loadtest.workload import NUM_DECODE_TOKENS, NUM_PROMPT_TOKENS


def add_options(parser: LocustArgumentParser) -> None:
    """Listener for Locust's `init_command_line_parser` event."""
    parser.add_argument("--model", help="model to ask for (default: the first of /v1/models)")
    parser.add_argument(
        "--prompt-tokens",
        type=_num_tokens,
        default=NUM_PROMPT_TOKENS,
        help="prompt length; the workload's ids are cut, or repeated (default: %(default)s)",
    )
    parser.add_argument(
        "--decode-tokens",
        type=_num_tokens,
        default=NUM_DECODE_TOKENS,
        help="tokens to generate, end-of-text ignored (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        type=_header_text,
        env_var="LOADTEST_API_KEY",
        is_secret=True,
        help="sent as a bearer token; the environment variable keeps it out of `ps`",
    )
    parser.add_argument(
        "--share-prefix",
        action="store_true",
        help="let requests share cached prefixes (default: a unique cache_salt in each request)",
    )


def _num_tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def _header_text(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise ArgumentTypeError("expected printable ASCII")  # never shows the key
    return text
