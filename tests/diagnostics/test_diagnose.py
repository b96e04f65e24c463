"""`jaxgpt diagnose`: what it computes, prints, draws and refuses."""

import json
import re

import jax
import numpy as np
import pytest

from jaxgpt import cli, model, start
from jaxgpt.cli import memory
from jaxgpt.config import Config, ModelConfig, UsageError
from jaxgpt.data import Part
from jaxgpt.diagnostics import diagnose, view
from jaxgpt.diagnostics.cli import Effort
from jaxgpt.diagnostics.derivatives import Lanczos, NoiseScale
from jaxgpt.diagnostics.diagnose import DIAGNOSES, Subject, require
from jaxgpt.diagnostics.inside import Lens, Scores
from jaxgpt.display import charts
from jaxgpt.tokenizer import ByteTokenizer

SMALL = ("--block-size", 8, "--steps", 5, "--scan-steps", 5, "--eval-every", 0, "--batch-size", 4, "--eval-batches", 0)
FAST = ("--windows", 8, "--batch", 4, "--steps", 3)
TEXT = "the cat sat on a $mat$\n"
BIGRAM_DIAGNOSES = [name for name in DIAGNOSES if name != "attention"]
LETTERS = [bytes([byte]) for byte in b"abcdefghijklm"]


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """call(*args): run a command in a folder with a trained bigram, which compiles fast: (exit code, folder)."""
    folder = tmp_path_factory.mktemp("diagnose")
    (folder / "text.txt").write_text("the cat sat on the mat\nthat $cat$ has a hat\n" * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        patch.setattr(diagnose, "PROBES", 2)
        patch.setattr(diagnose, "GRID", 3)

        def run(*args):
            return cli.run_command([str(arg) for arg in args]), folder

        assert run("train", "bigram", "--corpus", "text.txt", "--run", "one", *SMALL)[0] == 0
        yield run


def test_all_diagnoses_are_printed_drawn_and_written(call, capsys):
    code, folder = call("diagnose", "one", *FAST, "--text", TEXT, "--plots", "new/pics", "--json", "all.json")
    out = capsys.readouterr().out
    assert code == 0
    printed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert printed == BIGRAM_DIAGNOSES
    drawn = {path.stem: path.read_bytes() for path in (folder / "new/pics").iterdir()}
    assert set(drawn) == {"curvature", "landscape", "lens"}
    for picture in drawn.values():
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 120_000
    written = json.loads((folder / "all.json").read_text())
    assert set(written) == {"run", "step", "effort", *BIGRAM_DIAGNOSES}
    assert len(written["tokens"]["losses"]) == len(TEXT) - 1
    assert f"{max(written['tokens']['losses']):.2f}  '" in out
    assert f"on the loss of {TEXT[:9]!r}\n" in out, "the first window: 8 tokens and a target"
    lowest = int(np.argmin(written["landscape"]["path"]))
    assert f"the lowest loss is {written['landscape']['path'][lowest]:.3f}" in out
    assert f"at {written['landscape']['shares'][lowest]:.2f} of the way" in out
    assert {0.0, 1.0} <= set(written["landscape"]["shares"]), "the initial and the trained parameters themselves"
    # The middles of the plane and of the line, and share 1 of the path, are the same parameters on the same batch.
    middle = written["landscape"]["losses"][1][1]
    np.testing.assert_allclose(np.interp(1, written["landscape"]["shares"], written["landscape"]["path"]), middle, 1e-4)
    np.testing.assert_allclose(written["curvature"]["losses"][10], middle, rtol=1e-5)
    # The parabola of the largest eigenvalue rises by half a nat; the slope is that of the loss in the middle.
    distances, losses = written["curvature"]["distances"], written["curvature"]["losses"]
    assert distances[-1] ** 2 * written["curvature"]["spectrum"]["values"][-1] == pytest.approx(1, rel=1e-4)
    slope = (losses[11] - losses[9]) / (distances[11] - distances[9])
    assert written["curvature"]["slope"] == pytest.approx(slope, abs=0.02 * abs(np.gradient(losses, distances)).max())
    plane = np.array(written["landscape"]["losses"])
    assert not np.allclose(plane, plane.T, rtol=1e-6), "the two directions differ"
    typed = TEXT.replace("\n", "\r\n")  # CRLF becomes LF, as in the training text
    assert call("diagnose", "one", *FAST, "--text", typed, "--only", "tokens", "noise", "--json", "some.json")[0] == 0
    again = json.loads((folder / "some.json").read_text())
    assert {name: written[name] for name in again} == again, "a diagnosis gives the same numbers alone and with others"


def test_a_text_shorter_than_a_context_can_be_diagnosed(call):
    code, folder = call("diagnose", "one", "--text", "cat", "--only", "lens", "--json", "short.json")
    assert code == 0
    assert np.shape(json.loads((folder / "short.json").read_text())["lens"]["losses"]) == (1, 1, 2)


def test_uniform_attention_has_the_greatest_entropy(tiny, change, tmp_path):
    """If queries are zero, each token attends to n tokens equally: entropy log n, mean distance (n - 1) / 2."""
    config, tokens = change(tiny, window=3, precision="bfloat16"), np.arange(40) % 13
    params = jax.jit(lambda key: model.init_params(config.model, key))(jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(lambda path, p: 0 * p if "query" in str(path) else p, params)
    subject = Subject(config, params, tokens, tokens[:20], LETTERS)
    found = DIAGNOSES["attention"](subject)
    n_visible = np.minimum(np.arange(8) + 1, 3)
    assert found.maps.shape == (1, 2, 8, 8)
    np.testing.assert_allclose(found.uniform, np.log(n_visible).mean(), rtol=1e-6)
    np.testing.assert_allclose(found.entropy, np.full((1, 2), np.log(n_visible).mean()), rtol=1e-5)
    np.testing.assert_allclose(found.distance, np.full((1, 2), (n_visible - 1).mean() / 2), rtol=1e-5)
    first, block = view.lines("attention", found, subject)
    assert first.split()[0] == "attention"
    assert f"{np.log(n_visible).mean():.2f}/{(n_visible - 1).mean() / 2:.0f}" in block
    charts.save(view.CHARTS["attention"](found, subject), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_negative_noise_scale_is_not_shown(tiny):
    found = NoiseScale(*np.float32([-5, 1, -0.1, 0.5]), norms=np.ones(8))
    first, _ = view.lines("noise", found, Subject(tiny, {}, np.arange(9), np.arange(9), LETTERS))
    assert "the noise exceeds the gradient: more than 8 windows are needed" in first


def test_influence_lists_windows_by_the_sign_of_their_effect(tiny):
    """In an untrained model, every window may lower the loss; then none is listed as raising it."""
    subject = Subject(tiny, {}, np.arange(40) % 13, np.arange(20) % 13, LETTERS)
    for dots, expected in (([4.0, 3.0, 2.0, 1.0], ["+4", "+3", "+2"]), ([0.0, -2.0, 1.0, -3.0], ["+1", "-3", "-2"])):
        found = diagnose.Influence(np.array(dots), np.arange(4))
        assert re.findall(r"by +([+-]\d)", "".join(view.lines("influence", found, subject))) == expected


def test_a_text_of_one_character_can_be_diagnosed_and_reported(call, capsys):
    """Its loss is 0 for all parameters, so the curvature is 0."""
    (call("recipes")[1] / "one.txt").write_text("a" * 200)
    assert call("train", "bigram", "--corpus", "one.txt", "--run", "flat", *SMALL)[0] == 0
    code, folder = call("diagnose", "flat", "--only", "curvature", *FAST, "--plots", "flat")
    assert code == 0, capsys.readouterr().err
    assert (folder / "flat" / "curvature.png").stat().st_size > 0
    assert call("report", "flat", "--out", "flat.html")[0] == 0, capsys.readouterr().err
    assert "Loss by token" in (folder / "flat.html").read_text()


def test_the_legend_of_a_landscape_shows_its_losses(tiny):
    """If no round number lies between the lowest and the highest loss, the legend shows these two."""
    losses, line = np.full((3, 3), 2.28), np.arange(3.0)
    losses[0, 0] = 3.86
    spec = view.landscape_chart(diagnose.Landscape(line, losses, line, line), Subject(tiny, {}, line, line, LETTERS))
    (legend,) = re.findall('role-legend-label"(.*?)</g>', charts.render(spec, ".svg").decode())
    assert re.findall(r">([\d.]+)</text>", legend) == ["2.28", "3.86"]


def test_losses_at_one_filter_norm_exclude_the_corners(tiny):
    x = np.linspace(-1, 1, 3)
    found = diagnose.Landscape(x, 2 + x[:, None] + x**2, np.array([0.0, 1.0]), np.array([4.0, 2.0]))
    line, _ = view.lines("landscape", found, Subject(tiny, {}, x, x, LETTERS))
    assert "loss 2.000 here, 1.000 to 3.000 at one filter norm" in line


def test_the_tokens_of_a_lens_do_not_overlap(tiny):
    ids, pixels = np.arange(2), 7.2  # the width of a character at 12 pixels
    for token_bytes, widest in (([b"a", b"b"], 1), ([b"a", b"\xf0\x9f"], 6)):
        found = Lens(np.zeros((2, 1, 2)), np.zeros((2, 1, 2)), np.tile(ids, (2, 1, 1)), np.ones((2, 1, 2)))
        spec = view.lens_chart(found, Subject(tiny, {}, ids, ids, token_bytes))
        assert spec["width"] / 2 >= pixels * widest


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["one", "--text", "t"], "the text has 1 token, expected at least 2"),
        (["one", "--text", "the zebra"], "'z' at position 4 of --text is not among"),
        (["one", "--text", "caf\udcc3"], r"--text is 'caf\udcc3', expected UTF-8"),
        (["one", "--only", "attention"], "a bigram has no attention"),
        (["one", "--windows", "2"], "windows is 2, expected at least 3"),
        (["one", "--seed", "4294967296"], "seed is 4294967296, expected at least 0, and below 2**32"),
        (["one", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["one", "--plots", "text.txt/pics"], "name another folder: --plots"),
        (["one", "--json", "/"], "/ is a folder or a device: name a file, --json FILE"),
        (["two"], "no run 'two'"),
    ],
)
def test_bad_usage_is_refused_before_any_work(call, capsys, monkeypatch, args, message):
    monkeypatch.setattr("jaxgpt.start.load_checkpoint", None)
    assert call("diagnose", *args)[0] == 2
    assert message in capsys.readouterr().err


def test_too_many_lanczos_steps_are_refused_with_the_number_that_fits(monkeypatch):
    bigram = Config(model=ModelConfig(kind="bigram", vocab_size=100))
    for vectors, steps in ((26, None), (20, 14)):
        monkeypatch.setattr(memory, "available", lambda vectors=vectors: vectors * 40_000)
        if steps is None:
            require(bigram, Effort(steps=20), ["curvature"], np.arange(9))
        else:
            with pytest.raises(UsageError, match=rf"20 Lanczos steps .* try --steps {steps}"):
                require(bigram, Effort(steps=20), ["curvature"], np.arange(9))


def test_the_windows_of_a_mixture_are_drawn_by_weight():
    config = Config(model=ModelConfig(block_size=8, vocab_size=2))
    tokens = np.repeat([0, 1], [9000, 1000]).astype(np.uint16)
    parts = [Part(9000, 1.0), Part(1000, 3.0)]
    windows, _ = Subject(config, {}, tokens, tokens, [], parts).windows(diagnose.WINDOWS, 400)
    assert 0.7 < windows.inputs.mean() < 0.8


def test_characters_of_several_tokens_are_shown_as_characters(tiny):
    text = np.frombuffer("größer".encode(), np.uint8)
    subject = Subject(tiny, {}, text, text, ByteTokenizer().token_bytes)
    assert subject.show([*text, 256]) == "größer?"
    found = Scores(np.arange(7), np.zeros((7, 1), int), np.ones((7, 1)))
    assert r"'größ' -> 'e'; likelier: '·' 1.00" in "".join(view.lines("tokens", found, subject))
    assert r"'gr\xc3' -> '\xb6'" in "".join(view.lines("tokens", found, subject))


def test_the_chosen_checkpoint_is_diagnosed(call, monkeypatch):
    load, seen = start.load_checkpoint, []
    monkeypatch.setattr(start, "load_checkpoint", lambda run, which: seen.append(which) or load(run, which))
    assert call("diagnose", "one", "--only", "tokens", "--checkpoint", "last")[0] == 0
    assert seen == ["last"]


def test_the_seed_chooses_the_windows(call):
    norms = []
    for seed in (0, 1):
        code, folder = call("diagnose", "one", "--only", "noise", *FAST, "--seed", seed, "--json", "seed.json")
        assert code == 0
        norms.append(json.loads((folder / "seed.json").read_text())["noise"]["norms"])
    assert norms[0] != norms[1]


def test_the_windows_of_a_run_on_a_mixture_are_drawn_by_its_weights(call, monkeypatch):
    starts, seen = diagnose.chunk_starts, []
    monkeypatch.setattr(diagnose, "chunk_starts", lambda *args: seen.append(args[3]) or starts(*args))
    (call("recipes")[1] / "more.txt").write_text("that hat on the mat\n" * 20)
    assert call("train", "bigram", "--corpus", "0.75*text.txt + 0.25*more.txt", "--run", "mix", *SMALL)[0] == 0
    assert call("diagnose", "mix", "--only", "noise", *FAST)[0] == 0
    assert [part.share for part in seen[-1]] == [0.75, 0.25]


def test_tokens_are_scored_in_windows_that_overlap_by_half(tiny, monkeypatch):
    monkeypatch.setattr(diagnose.inside, "token_scores", lambda config, params, text, k, stride: (k, stride))
    for n, stride in ((20, 4), (6, 2), (2, 1)):
        subject = Subject(tiny, {}, np.arange(20), np.arange(n), LETTERS)
        assert DIAGNOSES["tokens"](subject) == (5, stride)


def test_each_figure_of_a_diagnosis_is_in_its_line(tiny):
    subject = Subject(tiny, {}, np.arange(13), np.arange(13)[::-1], LETTERS)

    def shown(name, found):
        return [line.strip() for line in view.lines(name, found, subject)]

    assert shown("noise", NoiseScale(*np.float32([120, 30, 0.5, 60]), norms=np.ones(8))) == [
        "noise      gradient noise scale 120 ± 30 windows of 8 tokens; trained with batches of 4",
        "squared gradient 0.5, summed variance over windows 60 (nats/token)²",
    ]
    first, _ = shown("noise", NoiseScale(*np.float32([0.36, 0.04, 0.5, 0.18]), norms=np.ones(8)))
    assert " 0.36 ± 0.04 windows" in first, "a scale below one is not shown as 0"
    first, _ = shown("noise", NoiseScale(*np.float32([1.4, np.nan, 0.3, 0.4]), norms=np.ones(3)))
    assert "more than 3 windows are needed" in first, "a NaN is not shown"
    spectrum = Lanczos(np.array([-0.5, 2.0]), np.ones(2) / 2, np.array([0.1, 0.2]), np.ones(2))
    first, second = shown("curvature", diagnose.Curvature(spectrum, [1.0, 3.0, 5.0], None, None, None))
    assert first.endswith("Hessian eigenvalues from -0.5 ± 0.1 to 2 ± 0.2, trace 3 ± 1.2, nats/token")
    assert second.endswith("parameters; gradient descent is stable up to a learning rate of 1")
    lens = Lens(np.array([[[4.0, 2.0]], [[1.0, 2.0]]]), np.array([[[0.5, 0.25]], [[0.0, -1e-7]]]), None, None)
    assert [line.split() for line in shown("lens", lens)] == [
        ["lens", "depth", "0", "1"],
        ["loss", "3.000", "1.500"],
        ["KL", "to", "last", "0.375", "0.000"],
    ]
    heads = diagnose.Attention(None, np.array([[-0.0, 1.25]]), 0.0, np.array([[0.0, 3.0]]))
    assert shown("attention", heads)[1] == "block 0   0.00/0  1.25/3"
    _, line = shown("influence", diagnose.Influence(np.array([1.0]), np.array([2])))
    assert line == "lowered most by        +1  'cdefghijk'", "a window of the training tokens"
    _, line = shown("influence", diagnose.Influence(np.zeros(3), np.arange(3)))
    assert line == "not changed by any of the 3 windows (--windows)"
    scores = Scores(np.array([1.0, 5.0, 0.0]), np.array([[0], [7], [2]]), np.array([[0.9], [0.25], [0.8]]))
    first, worst, *_ = shown("tokens", scores)
    assert first == "tokens     mean loss 2.0000 nats over 3 tokens; the least expected:"
    assert worst == "5.00  'ml' -> 'k'; likelier: 'h' 0.25"


def test_non_finite_numbers_are_null_in_json():
    assert view.plain({"x": np.array([1.0, np.inf, -np.inf, np.nan])}) == {"x": [1.0, None, None, None]}


def test_the_map_of_a_head_has_its_queries_as_rows_and_its_keys_as_columns():
    maps = np.tril(np.random.default_rng(0).random((2, 3, 4, 4)))
    spec = view.attention_maps(maps)
    rows = spec["data"]["values"]
    assert len(rows) == 2 * 3 * 10
    for row in rows:
        assert row["weight"] == pytest.approx(maps[row["block"], row["head"], row["t"], row["s"]], rel=1e-5)
    assert (spec["facet"]["row"]["field"], spec["facet"]["column"]["field"]) == ("block", "head")
    axes = spec["spec"]["encoding"]
    assert (axes["x"]["field"], axes["y"]["field"], axes["color"]["field"]) == ("s", "t", "weight")


def test_the_chart_of_curvature_has_the_parabola_of_slope_and_eigenvalue(tiny):
    spectrum = Lanczos(np.array([-1.0, 2.0]), np.array([0.25, 0.75]), np.zeros(2), np.ones(2))
    found = diagnose.Curvature(spectrum, [1.0], np.array([-1.0, 0.0, 1.0]), np.array([3.0, 1.0, 4.0]), 0.5)
    sticks, lines = view.curvature_chart(found, Subject(tiny, {}, None, None, LETTERS))["hconcat"]
    assert [(row["value"], row["weight"]) for row in sticks["layer"][1]["data"]["values"]] == [
        (-1.0, 0.25),
        (2.0, 0.75),
    ]
    losses = {}
    for row in lines["layer"][0]["data"]["values"]:
        losses.setdefault(row["line"], []).append((row["distance"], row["loss"]))
    assert losses["loss"] == [(-1.0, 3.0), (0.0, 1.0), (1.0, 4.0)]
    assert losses["parabola of the largest eigenvalue"] == [(-1.0, 1.5), (0.0, 1.0), (1.0, 2.5)]


def test_the_second_direction_of_a_landscape_is_drawn_upwards(tiny):
    losses = np.arange(9.0).reshape(3, 3)  # [y, x]
    found = diagnose.Landscape(np.array([-1.0, 0.0, 1.0]), losses, np.arange(2.0), np.array([4.0, 3.0]))
    heat, line = view.landscape_chart(found, Subject(tiny, {}, None, None, LETTERS))["hconcat"]
    (cells,) = heat["layer"]
    for row in cells["data"]["values"]:
        assert row["loss"] == losses[int(row["y"]) + 1, int(row["x"]) + 1]
    assert cells["encoding"]["y"]["sort"] == "descending"
    assert [tuple(row.values()) for row in line["layer"][0]["data"]["values"]] == [(0.0, 4.0), (1.0, 3.0)]


def test_the_chart_of_a_lens_has_the_guess_of_each_depth_above_the_token_read(tiny):
    top, probability = np.array([[[0, 1]], [[2, 3]]]), np.array([[[0.1, 0.2]], [[0.3, 0.4]]])
    text = np.array([4, 5, 6])
    spec = view.lens_chart(Lens(np.zeros((2, 1, 2)), None, top, probability), Subject(tiny, {}, None, text, LETTERS))
    cells, guesses = (layer["data"]["values"] for layer in spec["layer"])
    assert [tuple(row.values()) for row in cells] == [
        (0, 0, 0.1, "a"), (0, 1, 0.2, "b"), (1, 0, 0.3, "c"), (1, 1, 0.4, "d"),
    ]  # fmt: skip
    assert guesses == cells
    assert spec["layer"][0]["encoding"]["x"]["axis"]["labelExpr"] == '["e", "f"][datum.value]'
    assert spec["layer"][0]["encoding"]["y"]["sort"] == "descending", "the last depth at the top"
