"""Flags, environment and defaults make the same settings; mistakes are said in lines."""

from pathlib import Path

import pytest

from server.config import PREFIX, ConfigError, Settings


def test_defaults() -> None:
    settings = Settings.read([])
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.max_loras, settings.max_lora_rank, settings.host_capacity) == (8, 64, 32)
    assert settings.home == Path.home() / ".local/share/loraplex"
    assert settings.base_name == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("port", "9"), ("home", "/x"), ("max_loras", "3"), ("model", "m")),
        *(("max_lora_rank", "8"), ("demo_adapters", "false"), ("cpu_lora_op", "false")),
    ],
)
def test_every_flag_has_an_environment_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    flag = name.replace("_", "-")
    by_flag = Settings.read([f"--no-{flag}"] if value == "false" else [f"--{flag}", value])
    monkeypatch.setenv(PREFIX + name.upper(), value)
    assert Settings.read([]) == by_flag != Settings.model_construct()
    assert getattr(by_flag, name) != Settings.model_fields[name].default


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PORT", "1")
    assert Settings.read(["--port", "2"]).port == 2


def test_what_is_not_ours_goes_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_QUANTIZATION", "fp8")
    monkeypatch.setenv("LORAPLEX_ENFORCE_EAGER", "true")
    settings = Settings.read(["--tensor-parallel-size", "4", "--max-loras", "3"])
    assert settings.max_loras == 3
    assert settings.engine == [
        *("--enforce-eager", "--quantization", "fp8"),
        *("--tensor-parallel-size", "4"),
    ]


def test_what_commands_read_is_nothing_to_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("LORAPLEX_API_KEY", "lpx_1_2")
    assert Settings.read([]).engine == []


def test_every_problem_is_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.read(["--port", "0", "--max-loras", "many", "--max-lora-rank", "7"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith("--max-loras / LORAPLEX_MAX_LORAS: ") for line in lines)


def test_an_admin_key_can_not_be_guessed() -> None:
    with pytest.raises(ConfigError, match=r"--admin-key / LORAPLEX_ADMIN_KEY: .*16"):
        Settings.read(["--admin-key", "short"])
    settings = Settings.read(["--admin-key", "0123456789abcdef"])
    assert settings.admin_token == "0123456789abcdef"
    assert "0123456789abcdef" not in repr(settings)


def test_compile_is_a_third_thing_when_left_out() -> None:
    said = [Settings.read(flags).compile for flags in ([], ["--compile"], ["--no-compile"])]
    assert said == [None, True, False]


def test_the_host_cache_holds_the_slots() -> None:
    assert Settings.read(["--max-loras", "40"]).host_capacity == 40
    with pytest.raises(ConfigError, match=r"max_cpu_loras \(4\) must be at least max_loras \(8\)"):
        Settings.read(["--max-cpu-loras", "4"])


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("by", ["flag", "flags", "environment"])
def test_import_sources_are_listed_after_commas(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    flags = {
        "flag": ["--import-from", "hf://org,s3://bucket/a, file:///srv"],
        "flags": ["--import-from", "hf://org", "--import-from", "s3://bucket/a,file:///srv"],
        "environment": [],
    }[by]
    if by == "environment":
        monkeypatch.setenv("LORAPLEX_IMPORT_FROM", "hf://org,s3://bucket/a,file:///srv")
    assert Settings.read(flags).import_from == ("hf://org", "s3://bucket/a", "file:///srv")


def test_an_import_source_that_means_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--import-from / LORAPLEX_IMPORT_FROM: "):
        Settings.read(["--import-from", "hf://org,nonsense"])
