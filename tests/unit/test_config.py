"""Settings: which source wins, what each may hold, and what an error says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve import cli
from serve.api.limits import Limits
from serve.config import SECTIONS, Settings, load_settings
from serve.engine import EngineConfig
from serve.errors import ConfigError
from serve.model.hub import HubConfig
from serve.runtime.config import RunnerConfig

pytestmark = pytest.mark.unit

LINE = "command line"
SERVER_KEYS = (
    "host, port, drain_seconds, keep_alive_seconds, tls_certificate, tls_key, cors_origins, "
    "log_level, log_format, log_prompts"
)
DATA = Path(__file__).parents[1] / "data"
CERTIFICATE, PRIVATE_KEY = str(DATA / "localhost.pem"), str(DATA / "localhost.key")
SECONDS = (
    "server.drain_seconds",
    "metrics.window_seconds",
    "library.compile_time_limit_seconds",
    "limits.default_timeout_seconds",
    "limits.max_timeout_seconds",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: the repository's own serve.toml is not read."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "mine.toml") -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def load(
    toml: str | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """Of these sources alone."""
    return load_settings(None if toml is None else write(toml), environment or {}, flags)


def refused(
    toml: str | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> ConfigError:
    with pytest.raises(ConfigError) as found:
        load(toml, environment, flags)
    return found.value


def get(settings: Settings, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(settings, section), name)


# -- defaults


def test_the_defaults() -> None:
    settings = load()
    assert settings == Settings()
    assert (settings.model.source, settings.model.name) == ("bundled:gettysburg", None)
    assert (settings.library.backend, settings.library.profile) == ("cpu", "full")
    assert (settings.library.mcpu, settings.library.mattr) == (None, None)
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)
    assert settings.engine == EngineConfig()
    assert settings.runner == RunnerConfig()
    assert settings.hub == HubConfig()


@pytest.mark.parametrize("text", ["", "# nothing\n", "[server]\n[engine]\n", "\n\n"])
def test_a_file_that_says_nothing_leaves_the_defaults(text: str) -> None:
    assert load(text) == Settings()


def test_a_section_keeps_the_defaults_of_what_it_leaves_out() -> None:
    settings = load("[engine]\nmax_running = 3\n[server]\nport = 1\n")
    assert settings.engine == EngineConfig(max_running=3)
    assert settings.server.host == "127.0.0.1"


def test_settings_do_not_change_after_the_fact() -> None:
    settings = load("[engine]\nmax_running = 3\n")
    with pytest.raises(FrozenInstanceError):
        settings.hub = HubConfig()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        settings.engine.max_running = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.server.port = 1


# -- precedence


def test_the_file_gives_way_to_the_environment_and_that_to_flags() -> None:
    file = '[server]\nhost = "file"\nport = 1\nlog_level = "debug"\n'
    environment = {"DLIGHT_SERVER_HOST": "environment", "DLIGHT_SERVER_PORT": "2"}
    server = load(file, environment, {"server.host": "flag"}).server
    assert (server.host, server.port, server.log_level) == ("flag", 2, "debug")


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_is_read_from_each_source(section: str) -> None:
    key, values = {
        "model": ("source", ("a", "b", "c")),
        "library": ("profile", ("a", "b", "c")),
        "server": ("port", (1, 2, 3)),
        "auth": ("api_keys_file", ("a", "b", "c")),
        "limits": ("requests_per_minute", (1, 2, 3)),
        "traffic": ("sticky_header", ("a", "b", "c")),
        "watchdog": ("max_step_seconds", (0.5, 1.5, 2.5)),
        "metrics": ("window_seconds", (0.5, 1.5, 2.5)),
        "hub": ("revision", ("a", "b", "c")),
        "engine": ("max_kept_prefixes", (0, 1, 2)),
        "runner": ("threads", (1, 2, 3)),
    }[section]
    in_file, in_environment, in_flag = values
    toml = f"[{section}]\n{key} = {in_file!r}\n"
    environment = {f"DLIGHT_{section}_{key}".upper(): str(in_environment)}
    name = f"{section}.{key}"
    assert get(load(toml), name) == in_file
    assert get(load(toml, environment), name) == in_environment
    assert get(load(toml, environment, {name: str(in_flag)}), name) == in_flag


def test_a_wrong_value_in_the_file_does_not_matter_where_another_wins() -> None:
    assert load('[server]\nport = "x"\n', {"DLIGHT_SERVER_PORT": "9"}).server.port == 9


# -- the file


def test_serve_toml_of_the_current_folder_is_read() -> None:
    write("[server]\nport = 9\n", "serve.toml")
    assert load().server.port == 9
    assert load("[server]\nport = 8\n").server.port == 8  # a named file stands in its place


def test_a_serve_toml_that_was_read_has_to_stay(folder: Path) -> None:
    parsed = cli.parser(is_run=True).parse_args(["run"])
    write("[server]\nport = 9\n", "serve.toml")
    assert cli.settings_from(parsed).server.port == 9
    (folder / "serve.toml").unlink()
    with pytest.raises(ConfigError, match=r"serve\.toml"):
        cli.settings_from(parsed)


def test_no_serve_toml_is_no_error(folder: Path) -> None:
    assert load().server.port == 8000
    (folder / "serve.toml").mkdir()  # a folder of that name is none either
    assert load().server.port == 8000


def test_a_named_file_must_be_there() -> None:
    with pytest.raises(ConfigError) as found:
        load_settings(Path("missing.toml"), {}, {})
    assert found.value.value == "missing.toml"
    assert "missing.toml" in str(found.value)
    assert "readable TOML file" in found.value.expected
    assert "No such file" in found.value.expected


def test_a_folder_is_no_file(folder: Path) -> None:
    with pytest.raises(ConfigError, match="readable TOML file"):
        load_settings(folder, {}, {})


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("[server]\n")

    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(ConfigError, match=r"mine\.toml.*Permission denied"):
        load_settings(file, {}, {})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[server\n", "line 1"),
        (b"[server]\nport = \n", "line 2"),
        (b"[server]\nport = 1\nport = 2\n", "line 3"),
        (b"[server]\n[server]\n", "line 2"),
        (b"[model]\nsource = '\xff'\n", "utf-8"),
        (b"\xef\xbb\xbf[server]\n", "line 1"),
    ],
)
def test_a_file_that_is_no_toml(content: bytes, told: str) -> None:
    Path("mine.toml").write_bytes(content)
    with pytest.raises(ConfigError) as found:
        load_settings(Path("mine.toml"), {}, {})
    assert found.value.value == "mine.toml"
    assert told in found.value.expected


@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("[servr]\nport = 1\n", "servr"),
        ("[servr]\n", "servr"),
        ("port = 1\n", "port"),
        ("[[servr]]\nport = 1\n", "servr"),
    ],
)
def test_an_unknown_section_of_the_file(toml: str, key: str) -> None:
    error = refused(toml)
    assert (error.source, error.key) == ("mine.toml", key)
    assert error.expected == f"a known section: {', '.join(SECTIONS)}"


@pytest.mark.parametrize("toml", ["server = 5\n", "[[server]]\nport = 1\n"])
def test_a_section_must_be_a_table(toml: str) -> None:
    error = refused(toml)
    assert (error.source, error.key) == ("mine.toml", "server")


@pytest.mark.parametrize("key", ["prot", "PORT", "model_config", "self", '"a.b"', '""'])
def test_an_unknown_key_of_the_file(key: str) -> None:
    error = refused(f"[server]\n{key} = 1\n")
    bare = key.strip('"')
    assert (error.source, error.key, error.value) == ("mine.toml", f"server.{bare}", 1)
    assert error.expected == f"a known key of [server]: {SERVER_KEYS}"


def test_an_unknown_key_of_a_section_that_a_package_owns() -> None:
    error = refused("[hub]\ntokens = 'x'\n")
    assert error.key == "hub.tokens"
    assert error.expected == "a known key of [hub]: revision, cache_dir, offline, token"


# -- types and ranges


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("server.port", '"8000"', "a valid integer"),
        ("server.port", "true", "a valid integer"),
        ("server.port", "8000.0", "a valid integer"),
        ("server.port", "[8000]", "a valid integer"),
        ("server.port", "{ number = 8000 }", "a valid integer"),
        ("server.host", "1", "a valid string"),
        ("server.host", "2026-11-24", "a valid string"),
        ("server.drain_seconds", '"30"', "a valid number"),
        ("server.drain_seconds", "true", "a valid number"),
        ("model.source", "false", "a valid string"),
        ("model.name", "5", "a valid string"),
        ("library.mcpu", "5", "a valid string"),
        ("library.mattr", '["+avx2"]', "a valid string"),
        ("engine.max_running", '"3"', "a valid integer"),
        ("engine.max_running", "true", "a valid integer"),
        ("engine.prefix_sharing", "1", "a valid boolean"),
        ("engine.prefix_sharing", '"true"', "a valid boolean"),
        ("runner.kv_tokens", '"1"', "a valid integer"),
        ("runner.threads", "1.0", "a valid integer"),
        ("hub.offline", "0", "a valid boolean"),
        ("hub.token", "5", "a valid string"),
    ],
)
def test_types_of_the_file_are_taken_strictly(key: str, text: str, expected: str) -> None:
    section, _, name = key.partition(".")
    error = refused(f"[{section}]\n{name} = {text}\n")
    assert (error.source, error.key, error.expected) == ("mine.toml", key, expected)


def test_a_whole_number_is_a_number_of_seconds() -> None:
    seconds = load("[server]\ndrain_seconds = 5\n").server.drain_seconds
    assert (seconds, type(seconds)) == (5.0, float)


RANGES = [
    ("server.port", -1, "greater than or equal to 0"),
    ("server.port", 65536, "less than or equal to 65535"),
    ("server.port", 10**30, "less than or equal to 65535"),
    ("server.drain_seconds", -0.5, "greater than or equal to 0"),
    ("metrics.window_seconds", 0, "greater than 0"),
    ("library.compile_time_limit_seconds", 0, "greater than 0"),
    ("engine.max_running", 0, "greater than or equal to 1"),
    ("engine.max_waiting", 0, "greater than or equal to 1"),
    ("engine.prefill_chunk_tokens", -5, "greater than or equal to 1"),
    ("engine.max_kept_prefixes", -1, "greater than or equal to 0"),
    ("runner.max_batch", 0, "greater than or equal to 1"),
    ("runner.max_step_tokens", 0, "greater than or equal to 1"),
    ("runner.kv_tokens", 0, "greater than or equal to 1"),
    ("runner.threads", 0, "greater than or equal to 1"),
]


@pytest.mark.parametrize(("key", "value", "expected"), RANGES)
def test_ranges_hold_in_every_source(key: str, value: float, expected: str) -> None:
    section, _, name = key.partition(".")
    variable = f"DLIGHT_{section}_{name}".upper()
    for source, error in (
        ("mine.toml", refused(f"[{section}]\n{name} = {value}\n")),
        (variable, refused(environment={variable: str(value)})),
        (LINE, refused(flags={key: str(value)})),
    ):
        assert source in error.source
        assert (error.key, error.value, error.expected) == (key, value, expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server.port", 0),
        ("server.port", 65535),
        ("server.drain_seconds", 0.0),
        ("metrics.window_seconds", 0.001),
        ("engine.max_running", 1),
        ("engine.max_kept_prefixes", 0),
        ("runner.kv_tokens", 1),
        ("runner.threads", 1),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(key: str, value: float) -> None:
    assert get(load(flags={key: str(value)}), key) == value


@pytest.mark.parametrize("key", SECONDS)
def test_seconds_are_a_number(key: str) -> None:
    section, _, name = key.partition(".")
    assert refused(f"[{section}]\n{name} = nan\n").key == key
    assert refused(flags={key: "nan"}).key == key


@pytest.mark.parametrize("level", ["trace", "INFO", "", "10"])
def test_the_log_levels(level: str) -> None:
    expected = "'debug', 'info', 'warning' or 'error'"
    assert refused(f"[server]\nlog_level = '{level}'\n").expected == expected
    assert refused(flags={"server.log_level": level}).expected == expected
    assert load(flags={"server.log_level": "debug"}).server.log_level == "debug"


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "a", "0.1_B"])
def test_names_that_clients_may_use(name: str) -> None:
    assert load(flags={"model.name": name}).model.name == name


@pytest.mark.parametrize("name", ["", "a b", "gpt2@full", "bundled:x", "-x", "/x", "gpt2\n", "é"])
def test_names_that_could_be_mistaken(name: str) -> None:
    error = refused(flags={"model.name": name})
    assert (error.source, error.key, error.value) == (LINE, "model.name", name)


# -- the environment


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("DLIGHT_SERVER_PORT", "9000", "server.port", 9000),
        ("DLIGHT_SERVER_DRAIN_SECONDS", "1.5", "server.drain_seconds", 1.5),
        ("DLIGHT_LIBRARY_CACHE_DIR", "/x", "library.cache_dir", "/x"),
        ("DLIGHT_LIBRARY_COMPILE_TIME_LIMIT_SECONDS", "2", "library.compile_time_limit_seconds", 2),
        ("DLIGHT_RUNNER_KV_TOKENS", "64", "runner.kv_tokens", 64),
        ("DLIGHT_HUB_TOKEN", "5", "hub.token", "5"),
        ("DLIGHT_MODEL_SOURCE", "true", "model.source", "true"),
        ("DLIGHT_ENGINE_PREFIX_SHARING", "false", "engine.prefix_sharing", False),
        ("DLIGHT_LIBRARY_MCPU", "haswell", "library.mcpu", "haswell"),
        ("DLIGHT_LIBRARY_MATTR", "+avx2,-fma", "library.mattr", "+avx2,-fma"),
    ],
)
def test_the_environment_is_parsed(variable: str, text: str, key: str, value: object) -> None:
    found = get(load(environment={variable: text}), key)
    assert (found, type(found)) == (value, type(get(Settings(), key) or value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("TRUE", True),
        ("1", True),
        ("yes", True),
        ("on", True),
        ("false", False),
        ("0", False),
        ("no", False),
        ("off", False),
    ],
)
def test_switches_as_text(text: str, value: bool) -> None:
    assert load(environment={"DLIGHT_HUB_OFFLINE": text}).hub.offline is value
    assert load(flags={"hub.offline": text}).hub.offline is value


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("server.port", "http"),
        ("server.port", ""),
        ("server.port", "8000.5"),
        ("server.port", "0x10"),
        ("server.drain_seconds", "soon"),
        ("hub.offline", "perhaps"),
        ("hub.offline", ""),
        ("engine.max_running", "many"),
        ("runner.threads", "none"),
    ],
)
def test_text_that_is_not_of_the_keys_type(key: str, text: str) -> None:
    variable = "DLIGHT_" + key.replace(".", "_").upper()
    for source, error in (
        (f"environment variable {variable}", refused(environment={variable: text})),
        (LINE, refused(flags={key: text})),
    ):
        assert (error.source, error.key, error.value) == (source, key, text)
        assert error.expected.startswith("a valid ")


@pytest.mark.parametrize(
    ("variable", "key"),
    [
        ("DLIGHT_SERVER_PROT", "server.prot"),
        ("DLIGHT_ENGINE_MAX_RUNING", "engine.max_runing"),
        ("DLIGHT_HUB_CACHE", "hub.cache"),
        ("DLIGHT_SERVER", "server."),
        ("DLIGHT_SERVER_", "server."),
        ("DLIGHT_RUNNER_MODEL_CONFIG", "runner.model_config"),
    ],
)
def test_an_unknown_key_of_the_environment(variable: str, key: str) -> None:
    error = refused(environment={variable: "1"})
    section = key.partition(".")[0]
    assert (error.source, error.key) == (f"environment variable {variable}", key)
    assert error.expected.startswith(f"a known key of [{section}]: ")


@pytest.mark.parametrize(
    "variable",
    [
        "DLIGHT_CACHE_DIR",
        "DLIGHT_CUDA_ARCH",
        "DLIGHT_SERVICE_PORT",
        "DLIGHT_PORT",
        "DLIGHT_",
        "DLIGHT",
        "SERVER_PORT",
        "XDLIGHT_SERVER_PORT",
        "dlight_server_port",
        "DLIGHTSERVER_PORT",
        "DLIGHT__SERVER_PORT",
    ],
)
def test_other_variables_are_no_settings(variable: str) -> None:
    assert load(environment={variable: "1"}) == Settings()


def test_the_process_own_environment_counts_unless_another_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DLIGHT_SERVER_PORT", "9")
    assert load_settings().server.port == 9
    assert load_settings(environment={}).server.port == 8000


# -- flags


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("server.prot", "a known key of [server]: "),
        ("server", "a known key of [server]: "),
        ("server.", "a known key of [server]: "),
        ("server.port.x", "a known key of [server]: "),
        ("servr.port", "a known section: "),
        ("port", "a known section: "),
        ("", "a known section: "),
    ],
)
def test_an_unknown_flag(key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_settings(None, {}, {key: "1"})
    error = found.value
    assert (error.source, error.key, error.value) == (LINE, key, "1")
    assert error.expected.startswith(expected)


# -- messages


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda: refused('[server]\nport = "8000"\n'),
            "mine.toml: server.port = '8000': expected a valid integer",
        ),
        (
            lambda: refused(environment={"DLIGHT_SERVER_PROT": "1"}),
            "environment variable DLIGHT_SERVER_PROT: server.prot = '1': expected a known key of "
            f"[server]: {SERVER_KEYS}",
        ),
        (
            lambda: refused(flags={"engine.max_running": "0"}),
            "command line: engine.max_running = 0: expected greater than or equal to 1",
        ),
        (
            lambda: refused("[nowhere]\n"),
            "mine.toml: nowhere = {}: expected a known section: "
            "model, library, server, auth, limits, traffic, watchdog, metrics, hub, engine, runner",
        ),
    ],
)
def test_an_error_is_one_line_with_all_there_is_to_know(
    error: Callable[[], ConfigError], message: str
) -> None:
    assert str(error()) == message


def test_the_source_of_an_error_is_the_one_that_gave_the_value() -> None:
    environment = {"DLIGHT_SERVER_PORT": "99999"}
    file = "[server]\nport = 1\ndrain_seconds = -1\n"
    assert "DLIGHT_SERVER_PORT" in refused("[server]\nport = 1\n", environment).source
    assert refused(file, {"DLIGHT_SERVER_PORT": "2"}).source == "mine.toml"


def test_the_hubs_token_is_not_printed() -> None:
    assert "secret" not in repr(load(environment={"DLIGHT_HUB_TOKEN": "hf_secret"}))


@pytest.mark.parametrize("key", SECONDS)
def test_seconds_are_finite(key: str) -> None:
    section, _, name = key.partition(".")
    assert refused(f"[{section}]\n{name} = inf\n").key == key
    assert refused(flags={key: "inf"}).key == key


@pytest.mark.parametrize(
    "key", ["server.host", "model.source", "library.backend", "library.mcpu", "library.mattr"]
)
def test_texts_that_must_say_something(key: str) -> None:
    assert refused(flags={key: ""}).key == key


def test_a_value_out_of_range_names_its_variable_like_any_other_error() -> None:
    error = refused(environment={"DLIGHT_SERVER_PORT": "70000"})
    assert error.source == "environment variable DLIGHT_SERVER_PORT"


def test_the_message_for_a_name_is_a_sentence() -> None:
    assert "should" not in str(refused(flags={"model.name": "a b"}))


@pytest.mark.parametrize("toml", ["server = 5\n", "[[server]]\nport = 1\n"])
def test_the_message_for_a_section_that_is_no_table(toml: str) -> None:
    assert refused(toml).expected == "a table [server]"


def test_a_file_nested_too_deep() -> None:
    assert refused("a = " + "[" * 5000).value == "mine.toml"


# -- lists and tables as text


@pytest.mark.parametrize(
    ("text", "values"),
    [("", []), ("a", ["a"]), ("a,b", ["a", "b"]), (" a , b ,", ["a", "b"])],
)
def test_lists_as_text(text: str, values: list[str]) -> None:
    assert load(environment={"DLIGHT_LIBRARY_ALSO": text}).library.also == values
    assert load(flags={"library.also": text}).library.also == values


def test_lists_of_the_file() -> None:
    assert load('[library]\nalso = ["a", "b"]\n').library.also == ["a", "b"]
    assert refused('[library]\nalso = "a"\n').expected == "a valid list"
    error = refused("[library]\nalso = [5]\n")
    assert (error.key, error.value) == ("library.also", 5)


def test_tables_as_text() -> None:
    weights = {"full": 9.0, "cpu:stock": 1.5}
    assert load(flags={"traffic.weights": "full=9, cpu:stock=1.5"}).traffic.weights == weights
    assert load(environment={"DLIGHT_TRAFFIC_WEIGHTS": ""}).traffic.weights == {}
    for text in ("full", "full=", "full=much", "full=-1"):
        assert refused(flags={"traffic.weights": text}).key == "traffic.weights"
    error = refused("[traffic]\nweights = { stock = 1, full = -1 }\n")
    assert (error.key, error.value) == ("traffic.weights.full", -1)


# -- limits


@pytest.mark.parametrize(
    "key", ["max_body_bytes", "requests_per_minute", "burst", "max_timeout_seconds"]
)
def test_limits_are_above_nothing(key: str) -> None:
    error = refused(f"[limits]\n{key} = 0\n")
    assert (error.source, error.key, error.value) == ("mine.toml", f"limits.{key}", 0)
    assert refused(flags={f"limits.{key}": "0"}).key == f"limits.{key}"


def test_limits_from_the_environment() -> None:
    given = {"DLIGHT_LIMITS_MAX_BODY_BYTES": "5", "DLIGHT_LIMITS_UNKNOWN_FIELDS": "ignore"}
    assert load(environment=given).limits == Limits(max_body_bytes=5, unknown_fields="ignore")
    assert refused(flags={"limits.unknown_fields": "warn"}).expected == "'refuse' or 'ignore'"


@pytest.mark.parametrize("origin", ["*", "https://app.example", "http://[::1]:3000"])
def test_origins(origin: str) -> None:
    assert load(flags={"server.cors_origins": origin}).server.cors_origins == [origin]


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "null", "https://a b"])
def test_what_is_no_origin(origin: str) -> None:
    error = refused(flags={"server.cors_origins": f"https://good.example,{origin}"})
    assert (error.key, error.value) == ("server.cors_origins", origin)


# -- keys


SECRET = "sk-0123456789"


def test_keys_of_all_sources() -> None:
    file = write("# two keys\n\nfile-key-1\n  file-key-2 \n", "keys.txt")
    auth = load(
        f'[auth]\napi_keys = ["{SECRET}"]\napi_keys_file = "{file}"\n',
        {"DLIGHT_AUTH_ADMIN_KEYS": "admin-key-1,admin-key-2"},
    ).auth
    assert not auth.is_open
    keys, admin_keys = auth.read_api_keys(), auth.read_admin_keys()
    for key in (SECRET, "file-key-1", "file-key-2"):
        assert keys.find(key.encode()) is not None
        assert admin_keys.find(key.encode()) is None
    assert keys.find(b"# two keys") is None
    assert admin_keys.find(b"admin-key-2") is not None


def test_without_keys_all_is_open() -> None:
    auth = load().auth
    assert auth.is_open
    assert not auth.read_api_keys()
    assert not auth.read_admin_keys()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "# nothing\n",
        "short\n",
        "two words\n",
        "a,comma,0\n",
        "\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9",
    ],
)
def test_a_file_without_keys_or_with_wrong_ones(content: str) -> None:
    write(content, "keys.txt")
    auth = load(flags={"auth.api_keys_file": "keys.txt"}).auth
    assert not auth.is_open
    with pytest.raises(ConfigError, match="a file of keys") as found:
        auth.read_api_keys()
    assert (found.value.key, found.value.value) == ("auth.api_keys_file", "keys.txt")


def test_a_file_of_keys_that_cannot_be_read(folder: Path) -> None:
    (folder / "bytes").write_bytes(b"\xff")
    for file in ("missing", str(folder), "bytes"):
        with pytest.raises(ConfigError, match="a readable text file"):
            load(flags={"auth.admin_keys_file": file}).auth.read_admin_keys()


def test_keys_are_not_shown(folder: Path) -> None:
    assert SECRET not in repr(load(environment={"DLIGHT_AUTH_API_KEYS": SECRET}))
    for toml in (
        f"api_keys = '{SECRET}'",
        f"api_keys = ['{SECRET} x']",
        f"admin_keys = ['{SECRET},']",
    ):
        error = refused(f"[auth]\n{toml}\n")
        assert SECRET not in str(error)
        assert error.value == "(hidden)"
    (folder / "keys.txt").write_text(f"{SECRET}\n{SECRET} x\n")
    with pytest.raises(ConfigError) as found:
        load(flags={"auth.api_keys_file": "keys.txt"}).auth.read_api_keys()
    assert SECRET not in str(found.value)


# -- TLS


def check_tls(**files: str) -> None:
    load(flags={f"server.{name}": file for name, file in files.items()}).server.check_tls()


def test_good_tls_files(folder: Path) -> None:
    check_tls()
    check_tls(tls_certificate=CERTIFICATE, tls_key=PRIVATE_KEY)
    both = folder / "both.pem"
    both.write_bytes(Path(CERTIFICATE).read_bytes() + Path(PRIVATE_KEY).read_bytes())
    check_tls(tls_certificate=str(both))


@pytest.mark.parametrize(
    ("certificate", "key"),
    [
        ("missing.pem", PRIVATE_KEY),
        (CERTIFICATE, "missing.key"),
        (CERTIFICATE, None),
        (CERTIFICATE, CERTIFICATE),
        (PRIVATE_KEY, PRIVATE_KEY),
        (".", PRIVATE_KEY),
    ],
)
def test_bad_tls_files(certificate: str, key: str | None) -> None:
    with pytest.raises(ConfigError, match="a PEM file of a certificate, and its key") as found:
        check_tls(tls_certificate=certificate, **({} if key is None else {"tls_key": key}))
    assert found.value.key == "server.tls_certificate"
    assert certificate in str(found.value)


def test_a_tls_key_alone() -> None:
    with pytest.raises(ConfigError, match=r"since server\.tls_key is set"):
        check_tls(tls_key=PRIVATE_KEY)
