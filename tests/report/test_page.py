import base64
import hashlib
import html
import html.parser
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import cli
from jaxgpt.config import UsageError, replaced
from jaxgpt.display.charts import COLOURS, render
from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import Evaluated
from jaxgpt.monitor import curves, facts
from jaxgpt.report import charts, page, reporter
from jaxgpt.report.looks import Looks, packed
from jaxgpt.run import Run
from tests.conftest import HOSTILE


class Elements(html.parser.HTMLParser):
    """The elements of a page as a browser parses them: (name, attributes), and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts, self.inside = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = attrs, text + data


@pytest.fixture(scope="module")
def report(trained, trained_looks):
    return reporter.Report([facts.gather(trained[0])], [trained_looks])


@pytest.fixture(scope="module")
def html_page(report):
    return page.page(report.runs, report.looks, charts.charts(report.runs, report.looks))


def test_the_page_loads_no_other_file(html_page):
    assert len(html_page.encode()) < 2e6
    elements = Elements(html_page)
    for tag, attrs in elements.found:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "href", "srcset"} & attrs.keys()
        assert not [name for name in attrs if name.startswith("on")]
    assert "http" not in re.sub(r"<script.*?</script>", "", html_page, flags=re.S).replace("http-equiv", "")


def test_text_does_not_become_markup(report, html_page):
    assert "</scr" in "".join(report.looks[0].passage["tokens"])
    elements = Elements(html_page)
    running = [text for attrs, text in elements.scripts if attrs.get("type") != "application/json"]
    assert len(running) == 2, "only the scripts of the page"
    (policy,) = [attrs["content"] for tag, attrs in elements.found if attrs.get("http-equiv")]
    assert "unsafe-eval" not in policy
    for text in running:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    blocks = {attrs["id"]: json.loads(text) for attrs, text in elements.scripts if "id" in attrs}
    assert blocks.keys() == {"charts", "passage-data", "attention-data"}
    assert blocks["passage-data"]["tokens"] == report.looks[0].passage["tokens"]
    assert len([tag for tag, _ in elements.found if tag == "b"]) == len(report.looks[0].samples), "none from the text"


def test_a_run_name_does_not_become_markup(report):
    named = replace(report.runs[0], name=HOSTILE, events=[{"event": "spike", "step": 1, "text": HOSTILE}])
    for runs, looks in (([named], report.looks), ([named, report.runs[0]], report.looks * 2)):
        text = page.page(runs, looks, charts.charts(runs, looks))
        assert sum(attrs.get("type") is None for attrs, _ in Elements(text).scripts) == 2
        assert "<script>alert" not in text


@settings(max_examples=20)
@given(st.text())
def test_any_text_is_escaped(value):
    text = page.environment().from_string('<p title="{{ x }}">{{ x }}</p>').render(x=value)
    assert [tag for tag, _ in Elements(text).found] == ["p"]
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)
    text.encode()
    block = page.environment().from_string('<script>{{ {"x": x} | tojson }}</script>').render(x=value)
    assert block.count("<") == 2
    (_, inside), *more = Elements(block).scripts
    assert not more
    assert json.loads(inside) == {"x": value}


def test_every_chart_is_drawn(report, tmp_path):
    paths = report.draw(tmp_path / "figures")
    names = {path.stem for path in paths}
    assert names == {"outcome", "loss", "learning_rate", "grad_norm", "speed"}
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<svg")
        assert b"var(--" not in data, "a file has no CSS variables"
    assert {name for spec in charts.charts(report.runs, report.looks).values() for name in used(spec)} <= COLOURS.keys()


def used(spec):
    return re.findall(r"var\(--([\w-]+)\)", json.dumps(spec))


def test_the_css_defines_the_colours_of_the_charts():
    css = page._file("page.css")
    for name, value in COLOURS.items():
        assert f"--{name}: {value};" in css, "files use the light theme"
        assert len(re.findall(rf"--{name}: ", css)) == 2, "the dark theme has it too"


def themes():
    """The colours of the light theme and of the dark one, as (red, green, blue) from 0 to 1."""
    for block in re.findall(r":root \{(.*?)\}", page._file("page.css"), re.S):
        named = re.findall(r"--([\w-]+): #(..)(..)(..);", block)
        yield {name: [int(part, 16) / 255 for part in parts] for name, *parts in named}


def contrast(a, b):
    """By WCAG 2.1: from 1 to 21."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_enough_contrast_in_both_themes():
    tried = 0
    for theme in themes():
        for name in ("ink", "quiet", "accent", "warm", *(f"series-{i}" for i in range(6))):
            for under in ("paper", "card"):
                assert contrast(theme[name], theme[under]) >= 4.5, (name, under)
                tried += 1
        for over, share in (("hot", 0.85), ("accent", 0.45)):  # as page.css mixes them under a token
            mixed = [share * x + (1 - share) * y for x, y in zip(theme[over], theme["card"], strict=True)]
            assert contrast(theme["ink"], mixed) >= 4.5, over
    assert tried == 40


def test_attention_is_packed_row_by_row():
    L, H, T = 2, 3, 5
    weights = np.random.default_rng(0).random((L, H, T, T))
    data = base64.b64decode(packed(list("abcde"), weights)["weights"])
    assert len(data) == L * H * T * (T + 1) // 2
    for layer, head, t in np.ndindex(L, H, T):  # as page.js counts
        row = (layer * H + head) * (T * (T + 1) // 2) + t * (t + 1) // 2
        for s in range(t + 1):
            assert data[row + s] == pytest.approx(255 * weights[layer, head, t, s], abs=0.51)


def test_several_runs_on_one_page(report):
    runs, looks = [report.runs[0], replace(report.runs[0], name="again")], [*report.looks, *report.looks]
    specs = charts.charts(runs, looks)
    text = page.page(runs, looks, specs)
    assert "They differ in no setting." in text
    assert "2 runs: hostile, again" in text
    assert {row["run"] for row in layer(specs["loss"], "line")} == {"hostile", "again"}


def layer_of(spec, mark):
    return next((each for each in spec["layer"] if each["mark"]["type"] == mark), None)


def layer(spec, mark):
    """The values of the first layer that is drawn with `mark`; empty without one."""
    found = layer_of(spec, mark)
    return found["data"]["values"] if found else []


def test_runs_on_different_tokens_are_compared_in_bits_per_byte(report):
    """A loss per token is lower for tokens of a byte than for words, though they take more bits."""
    (run,) = report.runs
    one, two = (Evaluated(9, Evaluation(loss, 0.01, 0.9, bits, 100)) for loss, bits in ((0.5, 0.8), (2.0, 0.6)))
    for other in (
        replace(run, name="words", corpus=run.corpus | {"sha256": "another"}),
        replace(run, name="words", config=replaced(run.config, val_fraction=0.2)),
    ):
        runs = [replace(run, scores=[one]), replace(other, scores=[two])]
        assert not charts.same_tokens(runs)
        assert [name for name, *_ in page.comparison(runs)[1]] == ["words", "hostile"], "the best first"
        specs = charts.charts(runs, report.looks * 2)
        rows = layer(specs["outcome"], "point")
        assert sorted((row["what"], row["loss"]) for row in rows) == [("hostile", 0.8), ("words", 0.6)]
        assert rows[0]["high"] - rows[0]["loss"] == pytest.approx(0.01 * 0.6 / 2.0)
        text = page.page(runs, report.looks * 2, specs)
        assert "<li>words: 0.6000 bits per byte</li>" in text
    assert charts.same_tokens([run, replace(run, config=replaced(run.config, val_tokens=0))]), (
        "val_tokens=0 sets no limit"
    )


def test_a_single_window_has_no_standard_error(report):
    """The page and its charts then show the loss alone."""
    scores = [Evaluated(step, Evaluation(loss, math.nan, loss, loss, 9)) for step, loss in ((5, 2.0), (9, 2.5))]
    runs = [replace(report.runs[0], scores=scores)]
    specs = charts.charts(runs, report.looks)
    assert [(row["low"], row["high"]) for row in layer(specs["loss"], "area")] == [(2.0, 2.0), (2.5, 2.5)]
    (row,) = [row for row in layer(specs["outcome"], "point") if row["kind"] == "run"]
    assert row["low"] == row["loss"] == row["high"] == 2.0
    notes = {name: note for name, _, note in page.numbers(runs[0])}
    assert (notes["validation loss"], notes["bits per byte"]) == ("nats per token", "")
    assert page.comparison(runs)[1][0][1] == "2.0000"
    assert "± " not in page.page(runs, report.looks, specs)


def test_errors_of_bits_are_in_proportion_to_that_of_the_loss(report):
    run = replace(report.runs[0], scores=[Evaluated(9, Evaluation(2.0, 0.01, 0.8, 0.6, 100))])
    notes = {name: note for name, _, note in page.numbers(run)}
    assert (notes["bits per character"], notes["bits per byte"]) == ("± 0.0040", "± 0.0030")


def test_each_figure_is_in_its_place(report):
    run = replace(
        report.runs[0], step=12, scores=[Evaluated(9, Evaluation(2.0, 0.01, 0.8, 0.6, 100))], n_params=1234, events=[]
    )
    assert {name: value for name, value, _ in page.numbers(run)} == {
        "validation loss": "2.0000",
        "bits per character": "0.8000",
        "bits per byte": "0.6000",
        "perplexity": "7.389",
    }
    names, (row,) = page.comparison([run])
    assert dict(zip(names, row, strict=True)) == {
        "run": "hostile",
        "loss, nats per token": "2.0000 ± 0.0100",
        "bits/char": "0.8000",
        "bits/byte": "0.6000",
        "at step": "9 of 12",
        "parameters": "1,234",
        "tokens/s": "",
        "time": "",
    }
    (look,) = report.looks
    assert charts.baselines([run], [look]) == list(look.ngrams.items())
    assert charts.baselines([run, run], [Looks(), look]) == list(look.ngrams.items()), "one has its text"
    assert list(look.ngrams) == ["uniform", "unigram counts", "bigram counts"]


def test_a_report_that_cannot_be_written_is_a_usage_error(report, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/report\.html cannot be written: .*; name another file: --out"):
        report.write(tmp_path / "file" / "report.html")


def test_the_configuration_is_that_of_the_last_process(report):
    events = [{"event": "start", "step": 0, "device": "old"}, {"event": "start", "step": 5, "device": "new"}]
    run = replace(report.runs[0], events=events, changes=[("seed", 1, 2)])
    rows = {name: lines for name, lines, _ in page.configuration(run)}
    assert rows["hardware"] == ["new"]
    assert rows["differences"] == ["seed 2 (recipe: 1)"]
    assert rows["SHA-256 of the tokens"] == [run.corpus["sha256"]]
    assert rows["SHA-256 of the text"] == [run.corpus["source_sha256"]] != rows["SHA-256 of the tokens"]


def test_the_run_with_the_fewest_bits_that_has_weights_is_shown(report):
    scores = [[Evaluated(9, Evaluation(1.0, 0.01, bits, bits, 100))] for bits in (0.9, 0.5, 0.7)]
    runs, (look,) = [replace(report.runs[0], scores=each) for each in scores], report.looks
    assert charts.chosen(runs, [look] * 3) == 1
    assert charts.chosen(runs, [look, replace(look, passage=None), look]) == 2


def test_several_runs_show_their_last_samples(report):
    runs, looks = [report.runs[0], replace(report.runs[0], name="again")], report.looks * 2
    assert [sample.step for _, sample in page.samples(runs[:1], looks[:1])] == [0, 10, 20]
    assert [sample.step for _, sample in page.samples(runs, looks)] == [20, 20]


def test_a_report_is_running_until_its_last_run_ends(report):
    ended, started = report.runs[0], replace(report.runs[0], events=[{"event": "start", "step": 0}])
    assert reporter.Report([ended, started], report.looks * 2).running
    assert not reporter.Report([ended, ended], report.looks * 2).running


def test_runs_of_one_name_are_told_apart_by_their_paths(trained, tmp_path, stub_looks):
    run, data_dir = trained
    other = Run(shutil.copytree(run.path, tmp_path / run.path.name))
    names = [facts.name for facts in next(reporter.reports([run, other], data_dir)).runs]
    assert names == [str(run.path), str(other.path)]
    assert next(reporter.reports([run], data_dir)).runs[0].name == "hostile"


def test_validation_tokens_are_counted(report):
    """A share of 0.4% is not rounded to 0%."""
    (run,) = report.runs
    few = replace(run, config=replaced(run.config, val_fraction=0.004))
    (row,) = [lines[0] for name, lines, _ in page.configuration(few) if name == "tokens"]
    n = run.corpus["count"]
    assert row.endswith(f"{n - int(n * 0.996):,} of them for validation")


def test_outcome_is_also_given_as_text(report, html_page):
    text = html.unescape(html_page)
    for row in charts.charts(report.runs, report.looks)["outcome"]["layer"][0]["data"]["values"]:
        assert f"<li>{row['what']}: {row['loss']:.4f} nats per token</li>" in text
    assert "bigram counts: " in text


EVENTS = [
    {"event": "start", "step": 0, "device": "cpu"},
    {"event": "save", "step": 10},
    {"event": "start", "step": 10, "device": "cpu"},
    {"event": "spike", "step": 12, "text": "loss 9"},
    {"event": "spike", "step": 99, "text": "of lines that were lost"},
    {"event": "broken-off", "step": 20, "text": "DivergedError: it is over"},
]
EVENTS = [{"time": "2026-01-01T00:00:00Z", **event} for event in EVENTS]


def test_resumes_spikes_and_failures_are_marked_on_the_curve(report):
    (run,), looks = report.runs, report.looks
    run = replace(run, events=EVENTS)
    spec = charts.loss([run], charts.baselines([run], looks))
    rows = [(row["step"], row["kind"], row["text"]) for row in layer(spec, "point")]
    assert rows == [(10, "resume", "cpu"), (12, "spike", "loss 9"), (20, "broken-off", "DivergedError: it is over")]
    assert "Vertical lines" in page.page([run], looks, {"loss": spec})
    quiet = replace(run, events=EVENTS[:2])
    assert layer(curves.loss([quiet]), "rule") == []
    assert "Vertical lines" not in page.page([quiet], looks, charts.charts([quiet], looks))


def labels(spec):
    """The labels and titles of the axes, as they are drawn."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", render(spec, ".svg").decode())


def test_the_labels_of_an_axis_differ(report):
    """Steps are whole, and a learning rate that hardly changes has enough digits."""
    rates = [(step, 1.05e-3 - 1e-6 * step) for step in range(1, 50)]
    norms = [(step, 0.3001 + 1e-4 * step) for step in range(1, 49)]
    run = replace(report.runs[0], learning_rate=rates, grad_norm=norms, loss=[(1, 3.0)], scores=[], events=[])
    for spec in (curves.curves([run], "learning_rate"), curves.curves([run], "grad_norm"), curves.loss([run])):
        found = labels(spec)
        assert len(found) == len(set(found)), found
    assert len([text for text in labels(curves.curves([run], "grad_norm")) if text.startswith("0.3")]) >= 2
    assert {"0", "1", "step"} <= set(labels(curves.loss([run])))
    constant = replace(run, learning_rate=[(1, 2.5e-4), (9, 2.5e-4)])
    assert "2.5e-4" in labels(curves.curves([constant], "learning_rate"))


@pytest.mark.parametrize(("spike", "top"), [(5.0, 5), (1e4, 6)])
def test_a_spike_does_not_flatten_the_curve(report, spike, top):
    losses = [(1, 4.0), (2, 3.0), (3, spike), (4, 2.5), (5, 2.0)]
    spec = curves.loss([replace(report.runs[0], loss=losses, scores=[], events=[])])
    values = [float(text) for text in labels(spec) if re.fullmatch(r"\d+\.\d+", text)]
    assert max(values) <= top
    assert len(values) > 4


def test_a_curve_of_one_point_is_drawn(report):
    run = replace(report.runs[0], learning_rate=[(1, 0.1)], loss=[(1, 3.0)], scores=[], events=[])
    for spec in (curves.curves([run], "learning_rate"), curves.loss([run])):
        assert b"mark-symbol" in render(spec, ".svg"), "a line of one point is invisible"


def test_many_runs_have_distinct_lines_and_a_legend_that_fits(report):
    runs = [replace(report.runs[0], name=f"shakespeare-cpu-dropout-{i}", events=[]) for i in range(8)]
    spec = curves.loss(runs)
    at = layer_of(spec, "line")["encoding"]
    looks = set(zip(at["color"]["scale"]["range"], map(str, at["strokeDash"]["scale"]["range"]), strict=True))
    assert len(looks) == 8
    names = [text for text in labels(spec) if text.startswith("shakespeare")]
    assert names == [run.name for run in runs]
    drawn = render(spec, ".svg").decode()
    legend = re.search(r'role-legend".*?d="M0,0h([\d.]+)v', drawn)
    assert float(legend[1]) < 700, "the width of a chart without its axis"


def test_only_the_newest_of_many_events_are_listed(report):
    def listed(run):
        text = page.page([run], report.looks, {})
        return text.partition("<h2>Events</h2>")[2].partition("</section>")[0]

    spikes = [{"event": "spike", "step": i, "text": ""} for i in range(700)]
    usual = [{"event": kind, "step": 700} for kind in ("save", "evaluate")] * 200
    text = listed(replace(report.runs[0], events=spikes + usual))
    assert "1,100 events, 700 besides starts, saves, evaluations and ends; the last 500 are listed" in text
    assert text.count("<tr>") == 501
    assert "listed</summary>" not in listed(report.runs[0])


def test_the_time_of_a_killed_run_is_a_lower_bound(report):
    start, end = {"event": "start", "step": 0}, {"event": "end", "step": 9, "seconds": 60.0}
    killed, (looks,) = replace(report.runs[0], events=[start, start, end]), report.looks
    specs = charts.charts(report.runs, report.looks)
    assert "<dt>time</dt><dd>at least 1m00s" in page.page([killed], [looks], specs)
    assert "<dt>time</dt>" in page.page(report.runs, [looks], specs)
    assert "<td>at least 1m00s</td>" in page.page([killed, replace(killed, name="b")], [looks] * 2, specs)


def test_a_run_in_training_shows_its_speed_and_no_time(report):
    saved = [{"event": "start", "step": 0}, {"event": "save", "step": 9, "tokens_per_second": 1234.5}]
    text = page.page([replace(report.runs[0], events=saved)], report.looks, {})
    assert "<dt>speed</dt><dd>1,234<small>tokens/s of training</small>" in text
    assert "<dt>time</dt>" not in text


def test_weights_are_examined_again_only_if_they_are_new(trained, report, monkeypatch):
    run, data_dir = trained
    examined = []
    monkeypatch.setattr(reporter, "look", lambda run, data_dir: examined.append(run) or report.looks[0])
    again = reporter.reports([run], data_dir)
    next(again)
    next(again)
    monkeypatch.setattr(reporter, "steps", lambda run: [1])
    next(again)
    assert len(examined) == 2
    best = Evaluated(10**6, Evaluation(-1.0, math.nan, 0.0, 0.0, 1))  # of a step that was saved before it was evaluated
    monkeypatch.setattr(reporter, "gather", lambda *args: replace(report.runs[0], scores=[best]))
    next(again)
    next(again)
    assert len(examined) == 3, "once more after the saved step was evaluated"


@pytest.fixture
def stub_looks(report, monkeypatch):
    """Commands take the looks of `report` instead of examining the weights."""
    monkeypatch.setattr(reporter, "look", lambda run, data_dir: report.looks[0])
    monkeypatch.setattr("jaxgpt.report.cli.use_compile_cache", lambda: None)


def test_the_command_writes_a_page_and_no_other_file(stub_looks, trained, tmp_path, capsys):
    run, data_dir = trained
    out = tmp_path / "new" / "page.html"
    where = ["--runs-dir", str(run.path.parent), "--data-dir", str(data_dir)]
    assert cli.run_command(["report", "hostile", "--out", str(out), *where]) == 0
    assert "best loss" in capsys.readouterr().out
    assert "refresh" not in Elements(out.read_text()).found[4][1].get("http-equiv", "")
    assert cli.run_command(["report", "hostile", "--out", str(out), *where]) == 0, "an older report is replaced"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    capsys.readouterr()
    assert cli.run_command(["report", "hostile", str(run.path), "hostile", "--out", str(out), *where]) == 0
    assert capsys.readouterr().out.count("best loss") == 1, "a run that is named twice is shown once"
    out.write_text("dear diary")
    assert cli.run_command(["report", "hostile", "--out", str(out), *where]) == 2
    assert "is not a jaxgpt report" in capsys.readouterr().err
    assert out.read_text() == "dear diary"
    assert cli.run_command(["report", "hostile", "--out", str(out / "page.html"), *where]) == 2
    assert "Not a directory; name another folder: --out" in capsys.readouterr().err, "before the weights are examined"
    unwritten = tmp_path / "unwritten.html"
    assert cli.run_command(["report", "hostile", "--out", str(unwritten), "--png", str(out), *where]) == 2
    assert "Not a directory; name another folder: --png" in capsys.readouterr().err
    assert not unwritten.exists()
    assert cli.run_command(["report", "nobody", *where]) == 2
    assert cli.run_command(["report", *where]) == 2
    capsys.readouterr()
    assert cli.run_command(["report", "hostile", "--every", "5", *where]) == 2
    assert "--every has no effect without --watch: leave it out" in capsys.readouterr().err


def test_a_page_reloads_itself_only_while_its_run_trains(stub_looks, trained, tmp_path, monkeypatch):
    from jaxgpt.report import cli as command

    run, data_dir = trained
    out, pages = tmp_path / "page.html", []
    ends = iter([True, True, False])
    monkeypatch.setattr(reporter.Report, "running", property(lambda report: next(ends)))
    monkeypatch.setattr(command.time, "sleep", lambda seconds: pages.append((seconds, out.read_text())))
    options = ["--watch", "--every", "7", "--out", str(out), "--data-dir", str(data_dir)]
    assert cli.run_command(["report", str(run.path), *options]) == 0
    assert [('content="7"' in text, seconds) for seconds, text in pages] == [(True, 7), (True, 7)]
    assert 'content="7"' not in out.read_text()


def test_an_interrupted_watch_leaves_a_page_that_does_not_reload_itself(stub_looks, trained, tmp_path, monkeypatch):
    run, data_dir = trained
    out, gather, reloading = tmp_path / "page.html", reporter.gather, []

    def interrupted(*args):
        reloading.append(out.exists() and 'content="30"' in out.read_text())
        if len(reloading) > 1:
            raise KeyboardInterrupt
        return gather(*args)

    monkeypatch.setattr(reporter.Report, "running", True)
    monkeypatch.setattr("jaxgpt.report.cli.time.sleep", lambda seconds: None)
    monkeypatch.setattr(reporter, "gather", interrupted)
    options = ["--watch", "--out", str(out), "--data-dir", str(data_dir)]
    assert cli.run_command(["report", str(run.path), *options]) == 0
    assert reloading == [False, True]
    assert 'content="30"' not in out.read_text()
    out.unlink()
    assert cli.run_command(["report", str(run.path), *options]) == 130, "there is no page yet"
    assert not out.exists()


def test_the_loss_chart_shows_the_errors_and_the_best_evaluation_also_at_step_0(report):
    scores = [
        Evaluated(step, Evaluation(loss, error, 1.0, 1.0, 9)) for step, loss, error in ((0, 2, 0.25), (9, 3, 0.5))
    ]
    spec = curves.loss([replace(report.runs[0], scores=scores, loss=[(1, 2.123456)], events=[])])
    band = layer_of(spec, "area")
    assert [(row["step"], row["low"], row["high"]) for row in band["data"]["values"]] == [
        (0, 1.75, 2.25),
        (9, 2.5, 3.5),
    ]
    assert (band["encoding"]["y"]["field"], band["encoding"]["y2"]) == ("low", {"field": "high"})
    (best,) = layer(spec, "point")
    assert (best["step"], best["value"], best["text"]) == (0, 2, "best, 2.000")
    assert layer(spec, "line") == [{"run": "hostile", "step": 1, "value": 2.12346}]


def test_the_axis_of_a_spiked_loss_begins_with_the_first_loss(report):
    run = replace(report.runs[0], loss=[(1, 4.0), (2, 100.0), (3, 2.0)], scores=[], events=[])
    assert layer_of(curves.loss([run]), "line")["encoding"]["y"]["scale"]["domainMax"] == 1.5 * 4.0


def test_the_axis_of_speed_has_zero_and_that_of_a_gradient_norm_of_zero_is_linear(report):
    run = replace(report.runs[0], speed=[(5, 100.0), (9, 90.0)], grad_norm=[(1, 0.0), (2, 1.0)])
    axes = {name: curves.curves([run], name)["encoding"]["y"]["scale"] for name in ("speed", "grad_norm")}
    assert axes == {"speed": {"zero": True}, "grad_norm": {"zero": False}}
