"""The console in a browser, over the fake engine: keys, many adapters, all pages for everybody."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, expect

from adapters import registry
from server.routes.console import FOLDER
from tests.browser import NARROW, NEEDED, WIDE, fits, is_accessible, page, picture
from tests.conftest import MakeAdapter, with_base
from tests.http.conftest import Running, reconfigure, serve, settings, upload

pytestmark = NEEDED

ADMIN_KEY = "the-operators-own-key"
MANY = 10_000
LONG_MS = 200  # a task of the page may take
PAGES = {
    "playground": "/#/",
    "adapters": "/#/adapters",
    "adapter": "/#/adapters/one",
    "live": "/#/live",
}


@pytest.fixture(scope="module")
def guarded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants keys, and has a great many adapters to list: records without bytes."""
    home = with_base(tmp_path_factory.mktemp("console") / "home", base_folder)
    for running in serve(settings(home, "--admin-key", ADMIN_KEY), base_folder):
        running.serving.registry._db.write(_crowd)
        yield running


def _crowd(db: sa.Connection) -> None:
    now = datetime.now(UTC)
    about = {
        "number": 1,
        "state": registry.READY,
        "created": now,
        "rank": 8,
        "alpha": 16.0,
        "rslora": False,
        "target_modules": ["q_proj", "v_proj"],
        "dtype": "BF16",
        "bytes": 4_900_000,
        "parameters": 2_400_000,
        "source": "upload",
        "checks": {},
        "algebra": {},
    }
    named = {"created": now, "deleted": False, "metadata": {}}
    adapters = [
        named | {"id": number, "name": f"team-{number % 97}.a{number:05}"}
        for number in range(1, MANY + 1)
    ]
    db.execute(registry._adapters.insert(), adapters)
    versions = [
        about | {"adapter_id": each["id"], "digest": f"sha256:{each['id']:064x}"}
        for each in adapters
    ]
    db.execute(registry._versions.insert(), versions)


@pytest.mark.parametrize(("scheme", "size"), [("light", WIDE), ("dark", NARROW)])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_for_everybody(
    browser: Browser,
    running: Running,
    four: dict[str, str],
    name: str,
    scheme: str,
    size: tuple[int, int],
) -> None:
    with page(browser, running.url, size, scheme) as shown:
        shown.goto(PAGES[name])
        expect(shown.locator("#server")).to_have_class("server ready")
        expect(shown.locator("main h1")).to_be_visible()
        expect(shown.locator(".skeleton")).to_have_count(0)
        is_accessible(shown)
        fits(shown)
        picture(shown, f"{name}-{scheme}-{size[0]}")


def test_by_keyboard_alone(browser: Browser, running: Running, four: dict[str, str]) -> None:
    with page(browser, running.url) as shown:
        shown.goto("/#/")
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.className") == "skip"
        shown.keyboard.press("Enter")
        assert shown.evaluate("document.activeElement.id") == "main"
        shown.keyboard.press("Tab")
        shown.keyboard.type("Where is Oslo?")
        shown.keyboard.press("Control+Enter")
        expect(shown.locator(".answer")).to_contain_text("hello")


def test_the_page_asks_nobody_else(browser: Browser, running: Running, http: httpx.Client) -> None:
    """It works offline, and what strangers upload cannot have it do anything."""
    asked = []
    with page(browser, running.url) as shown:
        shown.on("request", lambda request: asked.append(request.url))
        for path in PAGES.values():
            shown.goto(path)
            shown.wait_for_timeout(300)
    assert {url[: len(running.url)] for url in asked} == {running.url}
    policy = http.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    for file in FOLDER.iterdir():
        assert http.get(f"/console/{file.name}").content == file.read_bytes()
    assert http.get("/console/..%2Fapp.py").status_code == 404


def test_what_strangers_wrote_is_text(
    browser: Browser,
    running: Running,
    http: httpx.Client,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    wrote = "<img src=/console/icon.svg onerror=alert(1) onload=alert(1)>"
    folder = Path(shutil.copytree(make_adapter(6), tmp_path / "hostile"))
    reconfigure(folder, base_model_name_or_path=wrote)
    assert upload(http, "hostile", folder).status_code == 201
    with page(browser, running.url) as shown:
        shown.on("dialog", lambda dialog: pytest.fail("it ran"))
        shown.goto("/#/adapters/hostile")
        expect(shown.locator("dl.list")).to_contain_text(wrote)
        assert shown.locator("main img").count() == 0
    http.delete("/v1/adapters/hostile")


def test_a_key_is_asked_for_and_one_with_too_few_rights_is_told_so(
    browser: Browser, guarded: Running, make_adapter: MakeAdapter
) -> None:
    bearer = {"authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=guarded.url, headers=bearer) as admin:
        made = admin.post("/v1/keys", json={"name": "reader", "scopes": ["adapters:read"]}).json()
        with page(browser, guarded.url) as shown:
            shown.goto("/#/adapters")
            expect(shown.locator("#ask-key")).to_be_visible()
            expect(shown.locator("#ask-key-why")).to_contain_text("wants an API key")
            shown.fill("#ask-key-value", "not-a-key-at-all")
            shown.keyboard.press("Enter")
            expect(shown.locator("#ask-key-why")).to_contain_text("does not know this key")
            shown.fill("#ask-key-value", made["key"])
            shown.click("text=Use this key")
            expect(shown.locator("table.adapters tbody tr")).to_have_count(100)
            folder = make_adapter(1)
            shown.set_input_files("#files", sorted(folder.iterdir()))
            shown.fill("#name", "mine")
            shown.click("button:has-text('Upload')")
            told = shown.locator(".entrance .notice.error")
            expect(told).to_contain_text("adapters:write")
            expect(told).to_contain_text("Enter another key")
            picture(shown, "too-few-rights")
            assert shown.evaluate("localStorage.getItem('loraplex.key')") is None


def test_who_has_no_key_is_asked_once(browser: Browser, guarded: Running) -> None:
    with page(browser, guarded.url) as shown:
        shown.goto("/#/live")
        expect(shown.locator("#ask-key")).to_be_visible()
        shown.keyboard.press("Escape")
        expect(shown.locator("main .notice.error")).to_contain_text("needs an API key")
        shown.wait_for_timeout(6000)  # it has looked again
        expect(shown.locator("#ask-key")).to_be_hidden()
        shown.click("#key")
        shown.fill("#ask-key-value", "ключ")
        shown.keyboard.press("Enter")
        expect(shown.locator("#ask-key-why")).to_contain_text("something else")
        shown.fill("#ask-key-value", ADMIN_KEY)
        shown.keyboard.press("Enter")
        expect(shown.locator(".tiles")).to_be_visible()


def test_a_key_entered_in_mid_work_loses_nothing(
    browser: Browser, guarded: Running, make_adapter: MakeAdapter
) -> None:
    with page(browser, guarded.url) as shown:
        shown.goto("/#/adapters")
        expect(shown.locator("#ask-key")).to_be_visible()
        shown.keyboard.press("Escape")
        folder = make_adapter(2)
        shown.set_input_files("#files", sorted(folder.iterdir()))
        shown.fill("#name", "kept")
        shown.click(".entrance >> text=Upload")
        shown.fill("#ask-key-value", ADMIN_KEY)
        shown.keyboard.press("Enter")
        expect(shown.locator(".entrance .notice.good")).to_contain_text("kept@1 is there")
    bearer = {"authorization": f"Bearer {ADMIN_KEY}"}
    httpx.delete(f"{guarded.url}/v1/adapters/kept", headers=bearer)


def test_ten_thousand_adapters_scroll_and_filter(browser: Browser, guarded: Running) -> None:
    with page(browser, guarded.url) as shown:
        shown.goto("/#/adapters")
        shown.fill("#ask-key-value", ADMIN_KEY)
        shown.keyboard.press("Enter")
        told, rows = shown.locator(".card [role=status].hint").last, shown.locator("tbody tr")
        expect(told).to_have_text("10,000 adapters")
        # The quickest of three goes: another process may have the core in one.
        assert min(_longest_task(shown) for _ in range(3)) < LONG_MS
        expect(rows).to_have_count(100)
        shown.fill("#search", "team-96.a09")
        expect(told).to_contain_text("of 10,000 adapters")
        names = shown.locator("tbody td.name").all_inner_texts()
        assert names == sorted(f"team-96.a{n:05}" for n in range(9000, 10_000) if n % 97 == 96)
        picture(shown, "ten-thousand")
        shown.fill("#search", "nobody")
        expect(shown.locator("main")).to_contain_text("No adapter is called that")
        shown.click("text=Show all")
        shown.click("text=Next ›")
        expect(shown.locator(".pager")).to_contain_text("page 2 of 100")


def _longest_task(shown: object) -> float:
    """Milliseconds of the longest task while the table is scrolled, sorted and searched."""
    return shown.evaluate(  # type: ignore[attr-defined, no-any-return]
        """async () => {
          const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
          let longest = 0;
          const seen = new PerformanceObserver((list) => {
            for (const each of list.getEntries()) longest = Math.max(longest, each.duration);
          });
          seen.observe({ type: "longtask" });
          for (let at = 0; at < 3000; at += 300) { scrollTo(0, at); await pause(16); }
          const search = document.querySelector("#search");
          for (const text of ["t", "te", "team-5", "team-5.a0", ""]) {
            search.value = text;
            search.dispatchEvent(new Event("input"));
            await pause(200);
          }
          for (const head of document.querySelectorAll("thead button")) {
            head.click();
            await pause(50);
          }
          document.querySelector("thead button").click();
          await pause(300);
          seen.disconnect();
          return longest;
        }"""
    )


def test_states_are_drawn_on_purpose(browser: Browser, home: Path, base_folder: Path) -> None:
    """No adapters, no page, no server."""
    servers = serve(settings(home), base_folder)
    running = next(servers)
    with page(browser, running.url) as shown:
        shown.goto("/#/adapters")
        expect(shown.locator(".notice.empty")).to_contain_text("There are no adapters yet")
        picture(shown, "empty")
        shown.goto("/#/nowhere")
        expect(shown.locator("h1")).to_have_text("There is no such page")
        shown.goto("/#/adapters/nobody")
        expect(shown.locator(".notice.error")).to_contain_text("no adapter")
        shown.goto("/#/live")
        expect(shown.locator(".tiles")).to_be_visible()
        servers.close()
        expect(shown.locator(".notice.error")).to_contain_text("does not answer")
        picture(shown, "gone")
