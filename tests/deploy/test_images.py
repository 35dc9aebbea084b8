"""The Dockerfile and the Compose file, as far as they can be read without a container engine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from server.config import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = ROOT / "deploy" / "compose.yaml"
OURS = {PREFIX + name.upper() for name in Settings.model_fields}


def test_hadolint_has_nothing_to_say_against_it() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_is_locked_down(target: str) -> None:
    stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (text,) = [each for each in stage if each.splitlines()[0].endswith(f" AS {target}")]
    assert "\nUSER 10001:10001\n" in text
    assert text.count("\nVOLUME ") == 1 and "\nHEALTHCHECK " in text and "\nLABEL " in text
    assert set(re.findall(rf"{PREFIX}[A-Z_]+(?==)", text)) <= OURS


def test_images_are_of_the_pinned_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = [each for each in project["optional-dependencies"]["cuda"] if each.startswith("vllm")]
    pinned = vllm.removeprefix("vllm==").removesuffix(".*")
    assert re.search(rf"^ARG VLLM_IMAGE=\S+:v{re.escape(pinned)}\.\d+$", DOCKERFILE, re.MULTILINE)
    assert f'image.version="{project["version"]}"' in DOCKERFILE


def test_compose_sets_what_the_server_has() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    for name in ("loraplex", "loraplex-gpu"):
        service = compose["services"][name]
        assert {key for key in service["environment"] if key.startswith(PREFIX)} <= OURS
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["ports"] == ["${SERVER_ADDRESS:-127.0.0.1:8000}:8000"]
        assert service["build"]["target"] in DOCKERFILE


def test_the_build_context_has_no_more_than_the_image_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    needed = {name for line in copied for name in line.split()[:-1]}
    assert kept == needed
