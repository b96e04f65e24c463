"""The page of the playground in a browser, with the real server or with a fake one.

$JAXGPT_SCREENSHOTS names a folder for screenshots, $JAXGPT_RUNS a folder of two or more runs to show instead of small
ones: JAXGPT_RUNS=runs JAXGPT_SCREENSHOTS=docs/images scripts/test tests/serve/test_page.py
"""

import json
import os
import re
import signal
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jaxgpt import serve
from jaxgpt.serve.app import FILES, application
from jaxgpt.serve.library import Library
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.scheduler import Scheduler
from tests.processes import serving

SERVE = Path(serve.__file__).parent
CONTRAST = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const over = (under, color) => known.get(under + color) ?? mixed(under, color);
  const mixed = (under, color) => {
    paint.fillStyle = under; paint.fillRect(0, 0, 1, 1);
    paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    const seen = `rgb(${[...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)})`;
    known.set(under + color, seen);
    return seen;
  };
  const light = (color) => {
    const curve = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = color.match(/\\d+/g).map((x) => curve(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const chain = [];
    for (let each = element; each; each = each.parentElement) chain.unshift(getComputedStyle(each).backgroundColor);
    return chain.reduce(over, "#ffffff");
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const before = getComputedStyle(element, "::before"), marked = !["none", "normal", '""'].includes(before.content);
    if (!text && !marked) continue;
    if (!element.checkVisibility() || element.closest("dialog, :disabled, .heard, option, template")) continue;
    const under = behind(element), ink = over(under, (marked ? before : getComputedStyle(element)).color);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.outerHTML.slice(0, 80)]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 3);
}"""
"""The least contrasts of visible text with its background, each with the element's HTML."""


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    """The folder of the screenshots."""
    return Path(os.environ.get("JAXGPT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


def assert_legible(page):
    """Every text on the page has the contrast of level AA of WCAG 2."""
    worst = page.evaluate(CONTRAST)
    assert worst[0][0] >= 4.5, worst


def assert_fits_width(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


def wait_until(page, expression):
    """Poll `expression` until it is true. The page's security policy forbids `page.wait_for_function`."""
    for _ in range(1200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"this never became true: {expression}")


@pytest.mark.slow
def test_page_with_the_real_server(browser, runs, screenshots):
    shown = Path(os.environ.get("JAXGPT_RUNS") or runs)
    names = [path.parent.name for path in shown.glob("*/config.json")]
    with serving(shown, "--max-tokens", 10**5) as (process, address):
        context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page = context.new_page()
        page.set_default_timeout(60_000)
        errors = []
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".pane h2")
        assert page.input_value("#tokens") == "200"
        assert_legible(page)

        # Type a prompt and stream a text, by the keyboard alone.
        run = "demo" if "demo" in names else "cat"
        page.select_option("#run", run)
        page.focus("#prompt")
        page.keyboard.type("The " if run == "demo" else "the ")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(f"#status:text-is('Sampled 200 tokens from {run}.')")
        text = page.inner_text(".heard")
        assert text == page.evaluate("[...document.querySelectorAll('.text span')].map((s) => s.textContent).join('')")
        assert page.locator(".text span").count() == 204
        assert page.locator(".text span.mine").count() == 4
        if run == "cat":
            assert "the cat sat on the mat" in text
        assert_legible(page)

        # Click a token: its alternatives and its attention are shown.
        page.locator(".text span").nth(120).click()
        page.wait_for_selector(".heads input")
        assert page.locator(".likely button").count() >= 8
        assert page.locator(".likely button:disabled").count() == 1
        shape = re.search(r"(\d+) layers? of (\d+) heads?", page.inner_text(".facts"))
        assert page.locator(".heads input").count() == int(shape[1]) * int(shape[2]) + 1
        weights = page.evaluate(
            "[...document.querySelectorAll('.text span')].map((s) => +s.style.getPropertyValue('--a'))"
        )
        assert max(weights[:120]) == 1
        assert max(weights[120:]) == 0, "no token attends to later ones"
        page.locator(".heads input").nth(2).focus()
        page.keyboard.press("ArrowRight")
        assert page.inner_text(".most").startswith("Layer 1, head 3")
        assert_legible(page)
        page.mouse.move(0, 0)
        page.screenshot(path=screenshots / "playground.png")
        assert (screenshots / "playground.png").stat().st_size < 250_000
        page.emulate_media(color_scheme="dark")
        assert_legible(page)
        page.screenshot(path=screenshots / "playground-dark.png")
        page.emulate_media(color_scheme="light")

        # By the keyboard: move to the token before, choose another one in its place, and continue from it.
        page.focus(".text")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector(".text span:nth-child(120)[aria-selected=true]")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.tagName") == "H3"
        other = page.locator(".likely button:not(:disabled)").first
        before = page.evaluate("[...document.querySelectorAll('.text span')].map((s) => s.textContent)")
        other.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#status:text-is('Sampled 200 tokens from {run}.')")
        after = page.evaluate("[...document.querySelectorAll('.text span')].map((s) => s.textContent)")
        assert after[:119] == before[:119]
        assert after[119] != before[119]
        assert len(after) == 320
        assert "chosen" in page.locator(".text span").nth(119).get_attribute("class")
        page.click(".on")
        wait_until(page, "document.querySelectorAll('.text span').length === 520")
        page.wait_for_selector(f"#status:text-is('Sampled 200 tokens from {run}.')")

        # Choose another run, sample from two side by side, and stop in the middle.
        page.select_option("#run", other_run := next(name for name in names if name != run))
        assert page.inner_text("h2") == other_run
        assert page.locator(".text span").count() == 0
        page.select_option("#beside", run)
        page.fill("#tokens", "100000")
        page.click("#write")
        wait_until(page, "[...document.querySelectorAll('.text')].every((text) => text.childElementCount > 20)")
        page.click("#stop")
        page.wait_for_selector("#stop:disabled")
        wait_until(page, "fetch('health').then((a) => a.json()).then((health) => health.requests === 0)")
        page.fill("#tokens", "120")
        page.click("#write")
        wait_until(page, "/Sampled 120 .* Sampled 120 /.test(document.querySelector('#status').textContent)")
        page.screenshot(path=screenshots / "playground-two.png")

        # The page reports a prompt that is refused.
        page.fill("#prompt", "Ω")
        page.click("#write")
        page.wait_for_selector(".fault:has-text('not in the vocabulary')")
        assert [each for each in errors if "400" not in each] == []

        phone_context = browser.new_context(
            viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True, is_mobile=True
        )
        phone, held = phone_context.new_page(), []
        phone.route("**/api/runs", lambda route: held.append(route))
        phone.goto(address)
        while not held:
            phone.wait_for_timeout(10)
        assert phone.is_disabled("#write")  # until the list of runs arrives
        held.pop().continue_()
        phone.fill("#prompt", "the ")
        phone.tap("#write")
        phone.wait_for_selector("#status:has-text('Sampled')")
        phone.locator(".text span").nth(30).tap()
        phone.wait_for_selector(".heads input" if phone.inner_text("h2") == run else ".likely button")
        assert_fits_width(phone)
        assert_legible(phone)
        phone.screenshot(path=screenshots / "playground-phone.png", full_page=True)

        # A signal stops the server while the page receives a text; the page reports it.
        page.fill("#prompt", "the ")
        page.fill("#tokens", "100000")
        page.click("#write")
        wait_until(page, "[...document.querySelectorAll('.text')].every((text) => text.childElementCount > 20)")
        process.send_signal(signal.SIGINT)
        page.wait_for_selector(".fault:has-text('the server is stopping')")
        assert process.wait(20) == 0
        for each in (context, phone_context):
            each.close()


def test_server_with_a_token_refuses_a_wrong_one(browser, runs):
    import uvicorn

    scheduler = Scheduler(lambda name: pytest.fail("nothing is requested"), Limits())
    app = application(Library.at(str(runs), runs), scheduler, token="a-token-of-some-length")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            page = browser.new_page()
            page.goto(address := "http://127.0.0.1:{}/".format(*listening.getsockname()[1:]))
            for token in ("a wrong one", "a-token-of-some-length"):
                page.wait_for_selector("dialog[open]")
                page.fill("#token", token)
                page.keyboard.press("Enter")
            page.wait_for_selector(".pane h2")
            page.close()
            page = browser.new_page()
            page.goto(f"{address}#token=a-token-of-some-length")
            page.wait_for_selector(".pane h2")
            assert "token" not in page.url
            page.close()
        finally:
            server.should_exit = True
            thread.join()
            scheduler.stop()
            scheduler.join()


RUNS = {
    "runs": [
        {"name": name, "start": start, "parameters": 9, "block_size": 99, "layers": 1, "heads": 2, "vocabulary": 9}
        for name, start in (("cat", "s"), ("dog", "\n"))
    ],
    "limits": {"max_prompt": 99, "max_tokens": 999},
    "defaults": {"temperature": 0.8, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1, "tokens": 200},
}
LIKELY = [{"id": 2, "text": "a", "p": 0.9}, {"id": 3, "text": "", "shown": r"\xc3", "p": 0.1}]


def text_events(prompt, token="a", n=9, p=0.5, tail=""):
    """The events of a text, all at once."""
    tokens = [{"id": 2, "text": token, "p": p, "likely": LIKELY}]
    events = [("start", {"prompt": [[1, each] for each in prompt]})]
    events += [("tokens", {"from": 0, "tokens": tokens})] * n + [("end", {"text": tail, "error": ""})]
    return "".join(f"event: {name}\ndata: {json.dumps(tree)}\n\n" for name, tree in events)


@pytest.fixture
def fake_page(browser):
    """fake_page(write): a page whose server answers /api/write with `write(JSON)`, or never if that is None. All its
    requests are in `page.requests`, as (path, headers, JSON). With `token`, any token but "ab+cd%" is refused."""
    contexts = []

    def open_page(write=lambda request: None, address="/", token=False, **kwargs):
        contexts.append(context := browser.new_context(**kwargs))
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.requests = []

        def fulfil(route):
            path = urlsplit(route.request.url).path
            if path in FILES:
                return route.fulfill(path=SERVE / FILES[path])
            page.requests.append((path, route.request.headers, json.loads(route.request.post_data or "null")))
            if token and page.requests[-1][1].get("authorization") != "Bearer ab+cd%":
                return route.fulfill(status=401, body="{}")
            body = {"/api/runs": json.dumps(RUNS)}.get(path) or (path == "/api/write" and write(page.requests[-1][2]))
            return body and route.fulfill(body=body)

        page.route("**/*", fulfil)
        page.goto(f"http://playground.test{address}")
        if not token:
            page.wait_for_selector(".pane h2")
        return page

    yield open_page
    for context in contexts:
        context.close()


def spans(page):
    return page.evaluate("[...document.querySelectorAll('.text span')].map((span) => span.textContent)")


def test_abandoned_text_shows_no_more_tokens(fake_page):
    """All its events arrived at once, but none is shown in the next text, after Stop, or under another run."""
    page = fake_page(lambda request: text_events(request["prompt"], request["prompt"].lower(), 500))
    for prompt in "AB":
        page.fill("#prompt", prompt)
        page.click("#write")
        wait_until(page, "document.querySelectorAll('.text span').length > 3")
    page.wait_for_timeout(100)
    assert set(spans(page)) == {"B", "b"}
    page.click("#stop")
    wait_until(page, "document.querySelector('#status').textContent.startsWith('Sampled')")
    stopped = spans(page)
    page.wait_for_timeout(100)
    assert spans(page) == stopped
    page.click("#write")
    wait_until(page, "document.querySelectorAll('.text span').length > 3")
    page.select_option("#run", "dog")
    page.wait_for_timeout(100)
    assert (page.inner_text("h2"), spans(page), page.text_content(".heard")) == ("dog", [], "")
    assert (page.inner_text("#status"), page.is_disabled("#stop")) == ("", True)


def test_empty_prompt_and_continuing_a_text_that_ends_inside_a_character(fake_page):
    page = fake_page(lambda request: text_events("saa"[: len(request["prompt"])], "a", 2, tail="\ufffd"))
    page.click("#write")
    page.wait_for_selector("#status:text-is('Sampled 2 tokens from cat.')")
    assert page.requests[-1][2]["prompt"] == "s", "the start of the run stands in for an empty prompt"
    assert page.text_content(".text") == page.text_content(".heard") == "saa\ufffd"
    page.click(".on")
    wait_until(page, "document.querySelectorAll('.text span').length === 5")
    assert page.requests[-1][2]["prompt"] == [1, 2, 2]
    assert spans(page) == ["s", "a", "a", "a", "a"]


def test_superseded_look_is_aborted(fake_page):
    page = fake_page(lambda request: text_events("s"))
    aborted = []
    page.on("requestfailed", lambda request: aborted.append(request.post_data_json["ids"]))
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from cat')")
    for n in (3, 5):
        page.locator(".text span").nth(n).click()
        wait_until(
            page, f"document.querySelector('[aria-selected=true]') === document.querySelectorAll('.text span')[{n}]"
        )
    assert page.locator(".likely code").all_inner_texts() == ["a", r"\xc3"]
    page.click(".shut")
    page.wait_for_timeout(50)
    assert [len(ids) for ids in aborted] == [3, 5]
    assert page.is_hidden(".fault")


def test_next_look_replaces_the_error_or_attention_of_the_last(fake_page):
    page = fake_page(lambda request: text_events("s"))

    def answer(route):
        n, refused = len(route.request.post_data_json["ids"]), {"error": "too large"}
        looked = {"attention": [[[1] * n]], "likely": LIKELY}
        route.fulfill(status=400 if n == 5 else 200, body=json.dumps(refused if n == 5 else looked))

    page.route("**/api/look", answer)
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from cat')")
    for n, fault in ((3, ""), (5, "too large"), (4, "")):
        page.locator(".text span").nth(n).click()
        wait_until(page, f"document.querySelector('.pane .fault').textContent === {fault!r}")
        wait_until(page, f"document.querySelector('.attention') {'=' if fault else '!'}== null")
        assert page.is_hidden(".looked") == bool(fault)


def test_settings_are_visible_after_the_window_grows(fake_page):
    page = fake_page(viewport={"width": 390, "height": 800})
    assert page.is_hidden("#tokens")
    page.set_viewport_size({"width": 1200, "height": 800})
    page.wait_for_selector("#tokens", state="visible")


def test_folded_settings_open_for_a_number_out_of_range(fake_page):
    page = fake_page(viewport={"width": 390, "height": 800})
    page.evaluate("document.querySelector('#tokens').value = 0")
    page.click("#write")
    page.wait_for_selector("#tokens:focus", state="visible")


def test_long_prompt_is_not_truncated(fake_page):
    """The server refuses a prompt above the limit, and names the limit."""
    page = fake_page(lambda request: text_events("s"))
    page.focus("#prompt")
    page.keyboard.insert_text("😀" * 100)
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from cat')")
    assert page.requests[-1][2]["prompt"] == "😀" * 100


def test_a_token_that_completes_a_character_is_shown_as_the_server_decodes_it(fake_page):
    page = fake_page(lambda request: text_events("s" if request["prompt"] == "s" else ["s", "é"]))
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from cat')")
    page.locator(".text span").nth(1).click()
    page.locator(".likely button").nth(1).click()
    wait_until(page, "document.querySelectorAll('.text span').length === 11")
    assert spans(page)[:3] == ["s", "é", "a"]
    chosen = page.locator(".text span").nth(1)
    assert (chosen.get_attribute("class"), chosen.get_attribute("aria-label")) == ("chosen", "é, 10%")


@pytest.mark.parametrize(
    ("token", "name"), [("\n\n ", "newline newline space"), ("constructor", "constructor"), ("", "part of a character")]
)
def test_each_token_has_a_name_for_screen_readers(fake_page, token, name):
    page = fake_page(lambda request: text_events("s", token))
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from cat')")
    assert page.locator(".text span").nth(1).get_attribute("aria-label") == f"{name}, 50%"


def test_very_small_probabilities_count_in_bits_per_token(fake_page):
    page = fake_page(lambda request: text_events("s", p=2.0**-40))
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from cat')")
    assert page.inner_text(".sum").endswith("40.00 bits/token")


def test_a_long_name_and_a_long_token_fit_a_phone(fake_page, monkeypatch):
    monkeypatch.setitem(RUNS["runs"][0], "name", "n" * 100)
    page = fake_page(lambda request: text_events("s", "-" * 100), viewport={"width": 390, "height": 800})
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from n')")
    assert_fits_width(page)
    page.evaluate("document.querySelectorAll('.text span')[1].click()")
    page.wait_for_selector("h3 code")
    assert_fits_width(page)


def test_text_has_the_direction_of_its_script(fake_page):
    page = fake_page(lambda request: text_events(request["prompt"]))
    for prompt, direction in (("a", "ltr"), ("\u05e9\u05dc\u05d5\u05dd", "rtl")):
        page.fill("#prompt", prompt)
        page.click("#write")
        wait_until(page, f"document.querySelector('.text').textContent.startsWith({prompt!r})")
        assert page.evaluate("getComputedStyle(document.querySelector('#prompt')).direction") == direction
        whole, first = (page.locator(each).first.bounding_box() for each in (".text", ".text span"))
        assert (first["x"] > whole["x"] + whole["width"] / 2) == (direction == "rtl")


def test_improbable_line_feed_is_legible(fake_page):
    page = fake_page(lambda request: text_events("s", "\n", p=0))
    page.click("#write")
    page.wait_for_selector("#status:has-text('tokens from cat')")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert_legible(page)


def test_token_is_used_unchanged_and_a_wrong_one_is_reported(fake_page):
    page = fake_page(token=True)
    page.wait_for_selector("dialog[open]")
    assert page.is_hidden("dialog .fault")
    page.fill("#token", "ab cd")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog .fault", state="visible")
    page.fill("#token", "ab+cd%")
    page.keyboard.press("Enter")
    page.wait_for_selector(".pane h2")
    for encoded in ("ab+cd%", "ab%2Bcd%25"):
        page = fake_page(token=True, address=f"/#token={encoded}")
        page.wait_for_selector(".pane h2")
        assert "token" not in page.url


def test_token_in_the_fragment_is_taken_by_an_open_page(fake_page):
    """Opening the same address with a token changes only the fragment and loads nothing."""
    page = fake_page(token=True)
    page.wait_for_selector("dialog[open]")
    page.goto("http://playground.test/#token=ab+cd%")
    page.wait_for_selector(".pane h2")
    assert "token" not in page.url
