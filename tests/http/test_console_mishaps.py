"""The console over the fake engine, when something goes wrong or comes at a bad time."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from adapters.folder import FILES
from tests.browser import NARROW, NEEDED, fits, page
from tests.conftest import MakeAdapter
from tests.http.conftest import Running, reconfigure, upload

pytestmark = NEEDED

LONG = "a" * 64
PROMPT = "Where is Oslo?"
ASK = "main button.primary"


@pytest.fixture
def shown(browser: Browser, running: Running) -> Iterator[Page]:
    with page(browser, running.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def many(http: httpx.Client, make_adapter: MakeAdapter) -> Iterator[str]:
    """An adapter of three versions, of which the first has an alias."""
    for seed in (11, 12, 13):
        assert upload(http, "many", make_adapter(seed)).status_code == 201
    http.put("/v1/adapters/many/aliases/blue", json={"version": 1})
    yield "many"
    http.delete("/v1/adapters/many")


def choose(shown: Page, folder: Path) -> None:
    shown.set_input_files("#files", [folder / each for each in FILES])


def ask(shown: Page, prompt: str = PROMPT) -> None:
    shown.fill("#prompt", prompt)
    shown.click(ASK)
    expect(shown.locator(ASK)).to_have_text("Ask")


def streamed(*pieces: str, finish: str | None = "stop") -> Callable[[Route], None]:
    """Answers as a stream that says this, and then ends."""
    choices = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    if finish:
        choices.append({"delta": {}, "finish_reason": finish})
    body = "".join(f"data: {json.dumps({'choices': [each]})}\n\n" for each in choices)
    return lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body)


def test_the_next_upload_has_another_name(
    shown: Page, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    shown.goto("/#/adapters")
    choose(shown, make_adapter(21))
    shown.fill("#name", "first")
    shown.fill("#alias", "prod")
    shown.click("text=Upload")
    expect(shown.locator(".notice.good")).to_contain_text("first@1 is there")
    choose(shown, make_adapter(22))
    assert (shown.input_value("#name"), shown.input_value("#alias")) == ("", "")
    shown.click(".entrance >> text=Upload")
    expect(shown.locator("#name")).to_be_focused()
    # Who does give the same name is told what it would do.
    shown.fill("#name", "first")
    shown.fill("#alias", "prod")
    told = shown.locator(".entrance [role=status].hint").first
    expect(told).to_contain_text("first is there already")
    expect(told).to_contain_text("prod moves to it")
    assert http.get("/v1/adapters/first").json()["aliases"] == {"latest": 1, "prod": 1}
    http.delete("/v1/adapters/first")


def test_mended_files_can_be_sent_again(
    shown: Page, http: httpx.Client, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_adapter(23), tmp_path / "mended"))
    good = (folder / "adapter_config.json").read_bytes()
    reconfigure(folder, use_dora=True)
    shown.goto("/#/adapters")
    choose(shown, folder)
    shown.fill("#name", "mended")
    shown.click(".entrance >> text=Upload")
    expect(shown.locator(".problems")).to_contain_text("use_dora")
    (folder / "adapter_config.json").write_bytes(good)
    shown.click(".entrance >> text=Upload")
    expect(shown.locator(".entrance .notice.error")).to_contain_text("Choose them again")
    choose(shown, folder)
    shown.click(".entrance >> text=Upload")
    expect(shown.locator(".notice.good")).to_contain_text("mended@1 is there")
    http.delete("/v1/adapters/mended")


def test_an_upload_is_cancelled_and_nothing_stays(
    shown: Page, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    shown.route("**/v1/adapters", lambda route: None)  # it is never answered
    shown.goto("/#/adapters/none")
    shown.evaluate("location.hash = '#/adapters'")
    choose(shown, make_adapter(24))
    shown.fill("#name", "cancelled")
    shown.click(".entrance >> text=Upload")
    shown.click(".entrance >> text=Cancel")
    expect(shown.locator(".entrance .notice")).to_contain_text("Cancelled")
    expect(shown.locator(".entrance .primary")).to_be_enabled()
    assert http.get("/v1/adapters/cancelled").status_code == 404


def test_an_adapters_page_mends_itself(shown: Page, many: str) -> None:
    shown.goto("/#/adapters/many")
    expect(shown.locator(".title h1")).to_have_text("many")
    shown.route("**/v1/adapters/**", lambda route: route.abort())
    expect(shown.locator("main .notice.error")).to_contain_text("does not answer")
    expect(shown.locator(".title h1")).to_have_text("many")  # what was known is still there
    shown.unroute("**/v1/adapters/**")
    expect(shown.locator("main .notice.error")).to_have_count(0)


def test_the_version_that_was_chosen_stays(shown: Page, many: str) -> None:
    shown.goto("/#/adapters/many")
    expect(shown.locator("tr.here .link")).to_have_text("3")
    held = []
    # A look at it that takes long.
    shown.route("**/v1/adapters/many/versions/3", lambda route: held.append(route))
    shown.wait_for_timeout(100)
    while not held:
        shown.wait_for_timeout(200)
    shown.click("#version-2")
    expect(shown.locator("tr.here .link")).to_have_text("2")
    expect(shown.locator("#version-2")).to_be_focused()
    held[0].continue_()
    shown.wait_for_timeout(500)
    expect(shown.locator("tr.here .link")).to_have_text("2")
    shown.reload()
    expect(shown.locator("tr.here .link")).to_have_text("2")


def test_a_refused_move_is_not_shown_as_done(shown: Page, many: str, http: httpx.Client) -> None:
    shown.goto("/#/adapters/many")
    chosen = shown.get_by_label("Version of blue")
    chosen.focus()
    shown.keyboard.press("ArrowUp")  # passes versions: nothing moves yet
    shown.wait_for_timeout(200)
    assert http.get("/v1/adapters/many").json()["aliases"]["blue"] == 1
    chosen.select_option("3")
    shown.route("**/aliases/blue", lambda route: route.fulfill(status=403, body="{}"))
    shown.get_by_label("Move blue", exact=True).click()
    expect(shown.locator(".toast.error")).to_be_visible()
    expect(chosen).to_have_value("1")


def test_without_a_version_it_can_still_be_deleted(
    shown: Page, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    upload(http, "hollow", make_adapter(25))
    http.delete("/v1/adapters/hollow/versions/1")
    shown.goto("/#/adapters/hollow")
    expect(shown.locator("main")).to_contain_text("no version that can be served")
    shown.click(".title >> text=Delete")
    shown.click("#confirm-yes")
    expect(shown.locator("h1")).to_have_text("Adapters")
    assert http.get("/v1/adapters/hollow").status_code == 404


def test_answers_stay(shown: Page, four: dict[str, str]) -> None:
    """While others are added, and while another page is looked at."""
    shown.goto("/#/?adapters=base,one")
    ask(shown)
    shown.fill("#adding", "two")
    shown.keyboard.press("Enter")
    expect(shown.locator(".chip")).to_have_count(3)
    shown.get_by_label("Remove one").click()
    expect(shown.locator(".column .answer").first).to_contain_text("hello")
    shown.fill("#prompt", "half a thought")
    shown.fill("#most", "7")
    shown.click("nav >> text=Adapters")
    expect(shown.locator("h1")).to_have_text("Adapters")
    expect(shown.locator("#main")).to_be_focused()
    shown.click("nav >> text=Playground")
    expect(shown.locator(".column .answer").first).to_contain_text("hello")
    assert shown.input_value("#prompt") == "half a thought"
    assert shown.input_value("#most") == "7"
    shown.goto("/#/adapters")
    shown.go_back()
    shown.reload()
    expect(shown.locator(".chip")).to_have_text(["base×", "two×"])


def test_only_names_that_are_there_are_taken_without_enter(
    shown: Page, four: dict[str, str]
) -> None:
    shown.goto("/#/?adapters=base")
    shown.locator("#adding").press_sequentially("tw")
    shown.click("#prompt")
    expect(shown.locator(".chip")).to_have_text(["base×"])
    shown.fill("#adding", "two@")
    offered = shown.locator("#names option")
    expect(offered.first).to_have_attribute("value", "two@latest")
    expect(offered.last).to_have_attribute("value", "two@1")
    expect(offered).to_have_count(2)


def test_what_is_copied_is_the_answer_alone(shown: Page) -> None:
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.route("**/chat/completions", streamed("SELECT half", " of", finish=None))
    shown.goto("/#/?adapters=base")
    ask(shown)
    told = shown.locator(".column .notice.error")
    expect(told).to_contain_text("base did not finish")
    expect(told).to_contain_text("broke off")
    shown.click(".tools >> text=Copy")
    expect(shown.locator(".toast")).to_contain_text("Copied")
    assert shown.evaluate("navigator.clipboard.readText()") == "SELECT half of"
    shown.route("**/chat/completions", streamed())
    ask(shown)
    expect(shown.locator(".column")).to_contain_text("It answered nothing.")
    assert shown.locator(".answer").inner_text() == ""


def test_code_is_shown_as_code_however_it_comes(shown: Page) -> None:
    """Fences may come in halves, and markup in them is text."""
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    pieces = (
        "Use `now",
        "()`:\n\n``",
        "`sql\nSELECT <b>1</b>;\n",
        "`",
        "``\nor\n```\nSELECT",
        " 2",
    )
    shown.route("**/chat/completions", streamed(*pieces))
    shown.goto("/#/?adapters=base")
    ask(shown)
    expect(shown.locator(".answer .block")).to_have_text(["SELECT <b>1</b>;", "SELECT 2"])
    expect(shown.locator(".answer code:not(.block)")).to_have_text(["now()"])
    assert "`" not in shown.locator(".answer").inner_text()
    shown.click(".tools >> text=Copy")
    expect(shown.locator(".toast")).to_contain_text("Copied")
    assert shown.evaluate("navigator.clipboard.readText()") == "".join(pieces)


def test_a_key_held_down_asks_once(shown: Page) -> None:
    asked = []
    shown.route("**/chat/completions", lambda route: asked.append(route))
    shown.goto("/#/?adapters=base")
    shown.fill("#prompt", PROMPT)
    for _ in range(4):
        shown.keyboard.down("Control")
        shown.keyboard.down("Enter")  # the second and later are repeats of it
    shown.keyboard.up("Enter")
    expect(shown.locator(ASK)).to_have_text("Stop")
    assert len(asked) == 1
    shown.click(ASK)
    expect(shown.locator(".column")).to_contain_text("stopped")
    shown.fill("#heat", "9")
    shown.keyboard.press("Control+Enter")
    shown.click(ASK)
    assert len(asked) == 1  # the field says what is wrong


def test_a_full_or_blocked_store_harms_nothing(browser: Browser, running: Running) -> None:
    blocked = "for (const each of ['localStorage', 'sessionStorage'])"
    blocked += "  Object.defineProperty(window, each, {get() { throw new DOMException('no') }})"
    full = "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') }"
    for script in (blocked, full):
        with page(browser, running.url) as shown:
            shown.add_init_script(script)
            shown.goto("/#/?adapters=base")
            ask(shown)
            expect(shown.locator(".answer")).to_contain_text("hello")
            expect(shown.locator(".history li")).to_have_count(1)


def test_the_history_has_an_end(shown: Page) -> None:
    shown.route("**/chat/completions", streamed("hello"))
    shown.goto("/#/?adapters=base")
    for number in range(8):
        ask(shown, f"{number} " + "long " * 20_000)
    kept = json.loads(shown.evaluate("localStorage.getItem('loraplex.history')"))
    assert [each["prompt"][0] for each in kept] == ["7", "6", "5", "4"]


def test_a_table_that_is_loaded_twice_is_shown_once(shown: Page, four: dict[str, str]) -> None:
    shown.goto("/#/adapters?q=o&sort=size&down=1")
    told = shown.locator(".card [role=status].hint").last
    expect(told).to_contain_text("of ")
    expect(shown.locator("th[aria-sort=descending]")).to_have_text("Size")
    before = told.inner_text()
    shown.locator("text=Reload").dblclick()
    shown.wait_for_timeout(500)
    expect(told).to_have_text(before)
    shown.click("td.name a >> nth=0")
    expect(shown.locator(".title h1")).to_be_visible()
    shown.go_back()
    expect(shown.locator("#search")).to_have_value("o")
    expect(told).to_have_text(before)


def test_live_in_trouble_says_so_once_and_goes_on(
    browser: Browser, running: Running, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    upload(http, LONG, make_adapter(26))
    http.post(f"/v1/adapters/{LONG}/load")
    with page(browser, running.url, NARROW) as shown:
        shown.goto("/#/live")
        expect(shown.locator(".seat", has_text=LONG)).to_be_visible()
        fits(shown)
        link = shown.locator("tbody a", has_text=LONG)
        link.focus()
        shown.wait_for_timeout(2500)  # it is drawn anew meanwhile
        expect(link).to_be_focused()
        shown.route("**/v1/live**", lambda route: route.abort())
        expect(shown.locator("main .notice.error")).to_contain_text("does not answer")
        expect(shown.locator("main")).to_have_class("stale")
        shown.unroute("**/v1/live**")
        expect(shown.locator("main .notice.error")).to_have_count(0)
        expect(shown.locator("main")).not_to_have_class("stale")
    http.delete(f"/v1/adapters/{LONG}")


def test_who_stands_in_lives_table_stays_with_the_adapter(shown: Page) -> None:
    names = ["first", "second"]

    def answered(route: Route) -> None:
        said = route.fetch().json()
        said["adapters"] = [said["adapters"][0] | {"adapter": name} for name in names]
        route.fulfill(json=said)

    shown.route("**/v1/live**", answered)
    shown.goto("/#/live")
    second = shown.locator("tbody a", has_text="second")
    second.focus()
    names.remove("first")
    expect(shown.locator("tbody a")).to_have_count(1)
    expect(second).to_be_focused()
    names[:] = ["third"]
    expect(shown.locator("tbody a")).to_have_text(["third"])
    expect(shown.locator("#main")).to_be_focused()
    shown.unroute_all(behavior="ignoreErrors")


def test_addresses_that_are_none(shown: Page) -> None:
    for address in ("#/nowhere", "#/adapters/%E0%A4%A"):
        shown.goto(f"/{address}")
        expect(shown.locator("h1")).to_have_text("There is no such page")
        expect(shown).to_have_title("There is no such page · Loraplex")
