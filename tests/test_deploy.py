"""The compose file asks softrag for what it has, and its page names all that it uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from softrag.cli import app

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
PAGE = (ROOT / "docs" / "deploy.md").read_text()
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_a_command_with_options_that_exist(name):
    command, *rest = OURS[name]["command"]
    options = {
        option: parameter
        for parameter in get_command(app).commands[command].params
        for option in parameter.opts
    }

    given = [word.partition("=")[0] for word in rest if word.startswith("--")]

    assert set(given) <= set(options)
    assert name in PAGE


def test_variables_of_the_environment_are_those_that_are_read():
    code = "".join(file.read_text() for file in (ROOT / "softrag").rglob("*.py"))
    ours = {variable for service in OURS.values() for variable in service.get("environment", {})}

    assert {variable for variable in ours if variable not in code} == set()


def test_the_page_names_every_image_and_flag():
    for service in SERVICES.values():
        if "image" in service:
            assert re.sub(r"\$\{\w+:-(.+?)\}", r"\1", service["image"]) in PAGE
        for word in service.get("command", []):
            if word.startswith("--"):
                assert word.partition("=")[0] in PAGE


def test_only_the_server_is_reached_from_outside_and_from_this_machine_alone():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert published == {"serve": ["127.0.0.1:8080:8080"]}


def test_the_example_of_the_environment_has_all_that_must_be_filled_in():
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    example = (ROOT / "deploy" / ".env.example").read_text()

    needed = set(re.findall(r"\$\{(\w+):\?", text))

    assert needed == {"QDRANT_API_KEY", "VLLM_API_KEY", "SOFTRAG_API_KEYS"}
    assert needed <= set(re.findall(r"^(\w+)=", example, re.MULTILINE))
