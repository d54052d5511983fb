"""view.py: what a run leaves of its tokens, and the page of it in a real browser, by clicks."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, easy_problems, read_metrics, run_script

SMALL = ["--model", "tiny", "--steps", "3", "--test_data", ""]
LISTS = ("ids", "logprobs", "entropy", "gradient", "sampler_logprobs", "old_logprobs")


def samples(out: Path, step: int) -> list[dict]:
    """The rows of a step that have tokens, their lists as numbers."""
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] == step and "row" in row]
    return [row | {name: [float(x) for x in row[name].split()] for name in LISTS} for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """LUFFY with a narrow clip on problems that are solved sometimes, and SFT."""
    out = tmp_path_factory.mktemp("view")
    easy_problems(out / "easy.jsonl")
    flags, clip = [*SMALL, "--data", str(out / "easy.jsonl")], "--clip_low 0.01 --clip_high 0.01 --entropy_coef 0"
    clip += " --updates_per_step 2 --problems_per_step 8 --group_size 4 --seed 3"
    run_script("luffy.py", *flags, *clip.split(), "--out", str(out / "luffy"))
    run_script("sft.py", *flags, "--problems_per_step", "4", "--out", str(out / "sft"))
    return {name: out / name for name in ("luffy", "sft")}


# What a run leaves --------------------------------------------------------------------------------
def test_samples_are_what_the_update_saw(runs):
    """SFT's four rows are all of its step: they give loss, entropy, and 1 / tokens as gradient."""
    for line in read_metrics(runs["sft"])[:3]:
        rows, tokens = samples(runs["sft"], line["step"]), line["trained_tokens"]
        assert len(rows) == 4 and sum(len(row["ids"]) for row in rows) == tokens
        assert -sum(sum(row["logprobs"]) for row in rows) / tokens == pytest.approx(line["loss"], abs=1e-3)
        assert sum(sum(row["entropy"]) for row in rows) / tokens == pytest.approx(line["entropy"], abs=1e-3)
        assert all(x == pytest.approx(-1 / tokens, rel=0.06) for row in rows for x in row["gradient"])
        assert all(row["expert_tokens"] == row["tokens"] and not row["sampler_logprobs"] for row in rows)


def test_samples_of_two_updates(runs):
    """Of each update all sixteen rows; outside the clip on A's side a token has no gradient."""
    rows, cut = [row for step in range(3) for row in samples(runs["luffy"], step)], 0
    assert len(rows) == 3 * 32 and {row["row"] for row in rows} == set(range(16))
    for row in rows:
        own = slice(row["expert_tokens"], None)
        assert len(row["old_logprobs"]) == len(row["ids"]) == len(row["sampler_logprobs"]) + row["expert_tokens"]
        lists = (row[name][own] for name in ("logprobs", "old_logprobs", "gradient"))
        for new, old, gradient in zip(*lists, strict=True):
            outside = (new - old) * (1 if row["advantage"] > 0 else -1)
            if row["advantage"] and abs(abs(new - old) - 0.01) > 0.0015:  # of three decimals
                assert (gradient == 0) == (outside > 0.01)
                cut += gradient == 0
    assert cut > 5


def test_samples_of_two_ranks(runs, tmp_path):
    """The same rows, with their texts, whichever rank made and trained them."""
    flags = ["--problems_per_step", "4", "--data", str(runs["sft"].parent / "easy.jsonl"), "--out", str(tmp_path / "x")]
    run_script("sft.py", *SMALL, *flags, nproc=2)
    one, two = (sorted(samples(out, 0), key=lambda row: row["id"]) for out in (runs["sft"], tmp_path / "x"))
    for a, b in zip(one, two, strict=True):
        assert b["completion"] and all(a[k] == b[k] for k in ("id", "problem", "completion", "ids", "reward"))
        for name in ("logprobs", "entropy", "gradient"):
            assert b[name] == pytest.approx(a[name], rel=0.06, abs=2e-3)


# The page -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    """Headless Chromium of the machine, by playwright."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("NO BROWSER: the page of view.py is not tested on this machine (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="NO PLAYWRIGHT: the page of view.py is not tested")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture
def opened(browser):
    """A page from disk, in which nothing may go wrong and nothing be asked of a network."""
    page, asked, said = browser.new_page(viewport={"width": 1400, "height": 1000}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked) and said == []
    page.close()


def title(span, name: str) -> str:
    """What a token says of itself under a name when one points at it."""
    return re.search(rf"^{name}: (.*)$", span.get_attribute("title"), re.M)[1]


def test_page_of_a_run(runs, opened, tmp_path):
    """Curves with hover, config, steps; a click shows a step, and each measure as colour."""
    done = run_script("view.py", str(runs["luffy"]))
    path = runs["luffy"] / "view.html"
    assert done.stdout.startswith(f"wrote {path}") and path.stat().st_size < 6e6
    opened.goto(f"file://{path}")
    assert opened.locator("#curves .js-plotly-plot").count() == 8
    opened.hover("#curve-entropy .nsewdrag")
    opened.wait_for_selector("#curve-entropy .hovertext")
    value = " ".join(opened.locator("#curve-entropy .hoverlayer text").all_text_contents())
    assert float(value.split()[-1]) == pytest.approx(read_metrics(runs["luffy"])[1]["entropy"], rel=1e-3)
    opened.click("button[data-key=lr]")
    opened.click("button[data-key=reward]")
    assert opened.locator("#curve-lr .trace.scatter").count() == 1 and not opened.locator("#curve-reward").count()
    opened.click("summary")
    assert "0.01" in opened.locator("#config tr", has_text="clip_high").inner_text()
    assert opened.locator("#steps tbody tr").count() == 4

    opened.click("tr[data-step='1']")
    assert opened.inner_text("#step") == "of step 1"
    rows = sorted(samples(runs["luffy"], 1), key=lambda row: row["row"])
    groups = [[row for row in rows if row["id"] == name] for name in dict.fromkeys(row["id"] for row in rows)]
    for pane, group in zip(opened.locator(".pane").all(), groups[:2], strict=True):
        assert pane.locator(".row").count() == 4 and pane.locator(".problem").inner_text() == group[0]["problem"]
    pane, shown = opened.locator(".pane").first, groups[0]
    assert pane.locator(".tokens").first.inner_text().replace("↵", "").startswith(shown[0]["completion"])
    spans, expert = pane.locator(".row").nth(3).locator(".tokens span"), shown[3]
    assert spans.count() == expert["expert_tokens"] == expert["tokens"] and title(spans.first, "author") == "expert"
    token = pane.locator(".row").first.locator(".tokens span").nth(2)
    assert float(title(token, "log-probability")) == pytest.approx(shown[0]["logprobs"][2], rel=0.01)
    assert float(title(token, "push")) == pytest.approx(-shown[0]["gradient"][2], rel=0.01)

    looks, colours = {}, "spans => spans.map(span => span.style.background)"
    for button in opened.locator("#measures button").all():
        button.click()
        looks[button.inner_text()] = opened.locator(".pane .tokens span").evaluate_all(colours)
    assert len({tuple(look) for look in looks.values()}) == len(looks) == 8
    authors = [i >= row["expert_tokens"] for group in groups[:2] for row in group for i in range(row["tokens"])]
    assert [look == "rgb(207, 227, 255)" for look in looks["author"]] == authors
    opened.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "page.png"), full_page=True)


def test_clipped_tokens_are_red(runs, opened, tmp_path):
    """As many as have no gradient in the update, in all groups of all steps."""
    run_script("view.py", str(runs["luffy"]), "--out", str(tmp_path / "x.html"))
    opened.goto(f"file://{tmp_path / 'x.html'}")
    opened.click("#measures >> text=clipping")
    red, found = "all => all.filter(t => t.style.background == 'rgb(255, 106, 92)').map(t => t.title)", []
    for step in range(3):
        opened.click(f"tr[data-step='{step}']")
        for group in range(8):
            opened.locator(".pane").first.locator("select").select_option(str(group))
            found += opened.locator(".pane").first.locator(".tokens span").evaluate_all(red)
    rows = [row for step in range(3) for row in samples(runs["luffy"], step)]
    for sign in (1, -1):
        mine = [row["gradient"][row["expert_tokens"] :] for row in rows if sign * row["advantage"] > 0]
        none, shown = (
            sum(x == 0 for part in mine for x in part),
            sum(("advantage: -" in t) == (sign < 0) for t in found),
        )
        assert none > 3 and abs(shown - none) <= 1 + none // 10  # three decimals can lie on either side of the bound


def test_two_runs(runs, opened, tmp_path):
    """Both in every curve and table; what differs in the config is marked; a pane for each."""
    run_script("view.py", str(runs["luffy"]), str(runs["sft"]), "--out", str(tmp_path / "two.html"), "--steps", "2")
    opened.goto(f"file://{tmp_path / 'two.html'}")
    assert opened.locator("#curve-entropy .trace.scatter").count() == 2
    assert [text.split()[0] for text in opened.locator("#steps tr.shown").all_inner_texts()] == ["0", "2"]
    marked = opened.locator("#config tr.differs").all_text_contents()
    assert any("lr" in text for text in marked) and not any("max_prompt_tokens" in text for text in marked)
    assert [s.input_value() for s in opened.locator(".pane select:first-child").all()] == ["0", "1"]
    opened.locator("#curve-entropy .nsewdrag").click()
    assert "of step" in opened.inner_text("#step")
    opened.screenshot(path=os.environ.get("SCREENSHOT_TWO", tmp_path / "two.png"), full_page=True)


def test_bad_input_is_one_sentence(runs, tmp_path):
    """No run, three, a file, a run without config.json, a page that cannot be written."""
    (tmp_path / "bare").mkdir()
    shutil.copy(runs["sft"] / "metrics.jsonl", tmp_path / "bare")
    for names, said in (
        ([], "error: name one run's folder, or two to compare"),
        ([str(runs["sft"])] * 3, "error: name one run's folder, or two to compare"),
        ([str(tmp_path / "none")], "error: there is no run's folder"),
        ([str(tmp_path / "bare")], "config.json is missing or damaged"),
        ([str(runs["sft"]), "--out", str(tmp_path / "no/x.html")], "cannot be written (No such file or directory)"),
    ):
        done = run_script("view.py", *names, check=False)
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr


def test_without_plotly(runs, tmp_path):
    """The sentence says which file installs it."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['plotly'] = None\n"
    code += f"import pathlib, view; view.main(view.Config((pathlib.Path({str(runs['sft'])!r}),)))\n"
    (tmp_path / "x.py").write_text(code)
    done = run_script(str(tmp_path / "x.py"), check=False, fresh=True)
    assert "error: plotly is missing: pip install -r requirements-view.txt" in done.stderr


def test_the_page_is_small():
    """Script and template together."""
    assert sum(len((ROOT / name).read_text().splitlines()) for name in ("view.py", "view.html")) <= 250
