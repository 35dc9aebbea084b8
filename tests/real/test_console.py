"""The console in a browser, against the real server: what somebody does who has a new adapter."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from adapters.demo import WEIGHTS
from adapters.folder import FILES
from tests.browser import NEEDED, is_accessible, page, picture
from tests.conftest import MakeAdapter
from tests.http.conftest import reconfigure
from tests.real.conftest import Server

pytestmark = NEEDED

QUESTION = (
    "Write one SQLite query that answers the question. Reply with the query only.\n\n"
    "CREATE TABLE readers (id INTEGER, name TEXT, city TEXT, loans INTEGER)\n\n"
    "Question: How many readers live in Oslo?"
)


@pytest.fixture
def shown(browser: Browser, server: Server) -> Iterator[Page]:
    with page(browser, server.url) as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def tidy(http: httpx.Client) -> Iterator[None]:
    yield
    http.delete("/v1/adapters/tried")


def upload(shown: Page, folder: Path, name: str) -> None:
    shown.goto("/#/adapters")
    shown.set_input_files("#files", [folder / each for each in FILES])
    shown.fill("#name", name)
    shown.click(".entrance >> text=Upload")


def test_a_new_adapter_beside_the_base(shown: Page, make_adapter: MakeAdapter) -> None:
    upload(shown, WEIGHTS / "sql", "tried")
    expect(shown.locator(".entrance .notice.good")).to_contain_text("tried@1 is there")
    shown.click("text=ask it beside the base")
    expect(shown.locator(".chip")).to_have_text(["base×", "tried@1×"])
    shown.fill("#prompt", QUESTION)
    shown.fill("#most", "40")
    shown.click("button:has-text('Ask')")
    expect(shown.locator("main button.primary")).to_have_text("Ask")
    base, tried = shown.locator(".answer").all()
    expect(tried).to_contain_text("SELECT")
    expect(tried).to_contain_text("Oslo")
    assert base.inner_text() != tried.inner_text()
    expect(shown.locator(".version")).to_have_text(["the base", "tried@1"])
    expect(shown.locator(".facts").last).to_contain_text("First token")
    picture(shown, "beside-the-base")
    # It has been asked: it is in the engine, for all to see. Equal bytes have one place.
    shown.goto("/#/live")
    expect(shown.locator(".seat[title*='sql@1, tried@1']")).to_contain_text("slot")
    expect(shown.locator("tbody tr", has_text="tried").locator(".tier")).to_have_text("slot")
    picture(shown, "live")
    is_accessible(shown)


def test_an_alias_moves_and_what_an_adapter_changed_is_drawn(
    shown: Page, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    upload(shown, make_adapter(4), "tried")
    expect(shown.locator(".entrance .notice.good")).to_contain_text("tried@2 is there")
    shown.click("text=Look at it")
    shown.fill("#new-alias", "prod")
    shown.select_option("#new-alias-version", "1")
    shown.click("text=Point")
    moved = shown.get_by_label("Version of prod")
    expect(moved).to_have_value("1")
    moved.select_option("2")
    shown.get_by_label("Move prod", exact=True).click()
    expect(shown.locator(".toast").last).to_contain_text("prod points to 2")
    assert http.get("/v1/adapters/tried").json()["aliases"]["prod"] == 2
    expect(shown.locator(".cell")).to_have_count(7 * 30)
    shown.locator(".cell").first.hover()
    expect(shown.locator(".readout")).to_contain_text("layer 0, q_proj: ‖ΔW‖")
    expect(shown.locator("main")).to_contain_text("directions keep 99 % of the change")
    picture(shown, "what-it-changed")
    shown.click("button:has-text('Unload')")
    expect(shown.locator(".title .tier")).to_have_text("disk")
    shown.click("button:has-text('Load')")
    expect(shown.locator(".title .tier")).to_have_text("host")
    shown.goto("/#/live")
    expect(shown.locator(".seat", has_text="tried@2")).to_contain_text("host")
    expect(shown.locator(".events li").first).to_contain_text("tried@2 is loaded")


def test_a_refusal_says_everything(shown: Page, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_adapter(4), tmp_path / "refused"))
    reconfigure(folder, r=128, use_dora=True)
    upload(shown, folder, "refused")
    problems = shown.locator(".problems li")
    expect(problems.filter(has_text="use_dora")).to_contain_text("Train it with use_dora=False.")
    expect(problems.filter(has_text="rank_above_max")).to_be_visible()
    picture(shown, "refused")
    is_accessible(shown)


def test_deleting_asks_first(shown: Page, http: httpx.Client) -> None:
    shown.goto("/#/adapters/tried")
    shown.click(".title >> text=Delete")
    shown.click("#confirm >> text=Cancel")
    assert http.get("/v1/adapters/tried").status_code == 200
    shown.get_by_label("Remove prod").click()
    expect(shown.locator(".toast").last).to_contain_text("prod is removed")
    shown.click(".title >> text=Delete")
    shown.click("#confirm-yes")
    expect(shown.locator("h1")).to_have_text("Adapters")
    assert http.get("/v1/adapters/tried").status_code == 404


def test_a_key_may_do_what_it_may(
    browser: Browser, guarded: Server, make_adapter: MakeAdapter
) -> None:
    asked = {"name": "one team", "scopes": ["infer", "adapters:read"], "adapters": ["sql"]}
    made = httpx.post(f"{guarded.url}/v1/keys", json=asked, headers=guarded.headers).json()
    with page(browser, guarded.url) as shown:
        shown.goto("/#/adapters")
        expect(shown.locator("#ask-key-why")).to_contain_text("wants an API key")
        shown.fill("#ask-key-value", made["key"])
        shown.click("text=Use this key")
        expect(shown.locator("td.name")).to_have_text(["sql"])
        upload(shown, make_adapter(4), "mine")
        expect(shown.locator(".entrance .notice.error")).to_contain_text("adapters:write")
        picture(shown, "too-few-rights-real")
        shown.goto("/#/?adapters=sql,code")
        shown.fill("#prompt", QUESTION)
        shown.fill("#most", "20")
        shown.click("button:has-text('Ask')")
        expect(shown.locator("main button.primary")).to_have_text("Ask")
        expect(shown.locator(".answer").first).to_contain_text("SELECT")
        expect(shown.locator(".column").last).to_contain_text("code did not answer")
        expect(shown.locator(".column").last).to_contain_text("no adapter")
    listed = httpx.get(f"{guarded.url}/v1/adapters", headers=guarded.headers).json()["data"]
    assert [each["name"] for each in listed] == ["code", "poetry", "sql"]
