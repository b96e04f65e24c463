"""The page in a real browser, from disk and without a network.

JAXGPT_SCREENSHOTS names a folder for screenshots, JAXGPT_REPORT a report to open instead of one of a small run.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.monitor import facts
from jaxgpt.report import reporter
from jaxgpt.report.looks import packed
from tests.report.test_page import EVENTS

WINDOWS = {
    "report": {"color_scheme": "light", "viewport": {"width": 1000, "height": 1380}},
    "report-dark": {"color_scheme": "dark", "viewport": {"width": 1000, "height": 1380}},
    "report-phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "has_touch": True},
}


@pytest.fixture(scope="module")
def report_file(trained, trained_looks, tmp_path_factory):
    if given := os.environ.get("JAXGPT_REPORT"):
        return Path(given).resolve()
    path = tmp_path_factory.mktemp("page") / "report.html"
    reporter.Report([facts.gather(trained[0])], [trained_looks]).write(path)
    return path


def open_page(browser, path, messages, **options):
    """The page in a new window; console messages, errors and network requests are added to `messages`."""
    page = browser.new_context(offline=True, **options).new_page()
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: None if request.url == path.as_uri() else messages.append(request.url[:80]))
    page.goto(path.as_uri())
    page.wait_for_selector("#chart-loss svg")
    return page


@pytest.fixture(params=WINDOWS)
def page(request, browser, report_file):
    messages = []
    page = open_page(browser, report_file, messages, **WINDOWS[request.param])
    yield page
    if folder := os.environ.get("JAXGPT_SCREENSHOTS"):
        page.mouse.move(0, 0)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=Path(folder) / f"{request.param}.png")
        page.locator("#attention [data-i]").last.click()
        page.locator("#passage [data-i='36']").click()
        page.evaluate("document.getElementById('passage').closest('section').scrollIntoView()")
        page.screenshot(path=Path(folder) / f"{request.param}-tokens.png")
    page.context.close()
    assert messages == []


def test_charts_tokens_and_attention_maps_respond_to_the_reader(page):
    charts = page.query_selector_all("[id^=chart-]")
    assert len(charts) >= 5
    assert all(chart.query_selector("svg path, svg text") for chart in charts)
    page.evaluate("document.querySelectorAll('section > details').forEach(each => each.open = true)")
    wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window, "nothing is wider than the window"
    page.evaluate("document.querySelectorAll('section > details').forEach(each => each.open = false)")

    token, answer = page.locator("#passage [data-i='30']"), page.locator("#passage-answer")
    token.click()
    assert re.search(r"has probability .*%, a loss of \d+\.\d\d nats", answer.text_content())
    assert answer.locator("li").count() == 5
    top = token.bounding_box()["y"]
    before = answer.text_content()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "31"
    assert answer.text_content() != before
    assert token.bounding_box()["y"] == top, "the answer does not move the tokens"

    button = page.locator("#heads button").last
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert "attends most to" in page.locator("#attention-answer").text_content()
    painted = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x > 0)"
    assert page.locator("#map").evaluate(painted)
    page.locator("#attention [data-i='0']").click()
    assert "(1) 100%" in page.locator("#attention-answer").text_content(), "the first token attends to itself alone"


def test_several_runs_are_shown_and_printed_uncut(browser, trained, trained_looks, tmp_path):
    """With tables and maps that are wider than paper."""
    run, looks, messages = replace(facts.gather(trained[0]), events=EVENTS), trained_looks, []
    runs = [replace(run, name=f"a_run_whose_name_is_longer_than_most_{i}") for i in range(4)]
    configs = [replace(run.config, train=replace(run.config.train, seed=i)) for i in range(4)]
    runs = [replace(run, config=config) for run, config in zip(runs, configs, strict=True)]
    looks = replace(trained_looks, attention=packed(list("abcd"), np.full((2, 18, 4, 4), 0.25)))
    reporter.Report(runs, [looks] * 4).write(tmp_path / "report.html")
    viewport = {"width": 718, "height": 1000}  # A4 without its margins
    page = open_page(browser, tmp_path / "report.html", messages, viewport=viewport)
    marks = page.locator("#chart-loss svg path[aria-roledescription='point'][aria-label*='resume']")
    assert marks.count() == len(runs), "each run has a mark where it resumed"
    marks.last.hover(force=True)
    assert "resume" in page.locator("#vg-tooltip-element").text_content()
    assert page.locator("#chart-outcome svg path").count() > len(runs)

    folded = "[...document.querySelectorAll('section > details')].map(each => each.open)"
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {folded}; }})")
    page.pdf()
    assert set(page.evaluate("printed")) == {True}
    assert set(page.evaluate(folded)) == {False}, "closed again after printing"
    page.emulate_media(media="print")
    page.evaluate("document.querySelectorAll('section > details').forEach(each => each.open = true)")
    for part in page.locator(".wide, .grid").all():
        inside, room = part.evaluate("each => [each.scrollWidth, each.clientWidth]")
        assert inside <= room, part.inner_text()[:80]
    if folder := os.environ.get("JAXGPT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "report-print.png", full_page=True)
    page.context.close()
    assert messages == []
