"""plot.py as it is called: what stands in the figure, on which axis, of which runs; bad input."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import run_script
from safetensors.torch import save_file

import plot


def a_run(folder: Path, rows: list[dict], tail: str = "", **flags) -> str:
    """A run's folder with these lines, and a config.json where flags are given."""
    folder.mkdir()
    lines = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows))
    (folder / "metrics.jsonl").write_text(lines + tail)
    if flags:
        config = {"argv": ["grpo.py", "--lr", str(flags.get("lr"))], "commit": "c" * 40, "dirty": False}
        (folder / "config.json").write_text(json.dumps(config | {"flags": flags}))
    return str(folder)


def texts(path: Path) -> list[str]:
    """What an SVG says, in its order."""
    return [found.strip() for found in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())]


ROWS = [{"reward": 0.1 * s, "entropy": 1.0, "completion_tokens": 9.0, "sampled_tokens": 10.0} for s in range(4)]


def test_plot(tmp_path):
    """Runs with different keys in one picture, and a notice of a torn line."""
    a = a_run(tmp_path / "a", ROWS, '{"step": 4, "rew')
    b = a_run(tmp_path / "b", [row | {"search_rate": 0.5, "test_accuracy": 0.1} for row in ROWS])
    done = run_script("plot.py", a, b, "--out", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "metrics.jsonl:5 is damaged and left out" in done.stdout
    run_script("plot.py", a)
    assert (tmp_path / "a/curves.png").is_file()


@pytest.mark.parametrize(("content", "sentence"), [(None, "there is no"), ("", "holds no step yet")])
def test_plot_without_metrics(content, sentence, tmp_path):
    """No file and an empty one end with a sentence."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = run_script("plot.py", str(tmp_path), check=False)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr


def test_legend_and_range_without_a_test_set(tmp_path):
    """Both runs are named, no panel is empty, and a reward from -3 to 5 is all there."""
    a = a_run(tmp_path / "first", [{"reward": value, "entropy": 1.0} for value in (-3, 0, 5)])
    b = a_run(tmp_path / "second", ROWS)
    run_script("plot.py", a, b, "--out", str(tmp_path / "x.svg"), "--no-captions")
    said = texts(tmp_path / "x.svg")
    assert said.count("first") == said.count("second") == 1 and "test accuracy" not in said
    assert {"−2", "4", "reward (training)", "entropy (nats)"} <= set(said)


def test_seeds_are_a_mean_in_a_band(tmp_path):
    """Three runs that differ by --seed (and --out) alone are one curve; another --lr is its own."""
    names = []
    for seed in range(3):
        rows = [{"reward": seed * 1.0 + step, "sampled_tokens": seed * 2.0} for step in range(3 + seed)]
        names.append(a_run(tmp_path / f"s{seed}", rows, seed=seed, out=f"s{seed}", lr=1))
    names.append(a_run(tmp_path / "other", ROWS, seed=0, out="other", lr=2))
    run_script("plot.py", *names, "--out", str(tmp_path / "x.svg"), "--keys", "reward")
    said = texts(tmp_path / "x.svg")
    assert "s0 (3 runs)" in said and "other" in said and not {"s0", "s1", "s2"} & set(said)
    assert "s1: grpo.py --lr 1 @ cccccccccc" in said
    runs = [[*plot.places(plot.Config(x="tokens"), Path(name), plot.read_metrics(Path(name)))] for name in names[:3]]
    x, mean, low, high = plot.curve(runs, "reward").tolist()
    assert x == [0, 2, 4]  # steps 0 to 2, which all have; before them 0, 1, 2 times 0, 2 and 4 tokens
    assert mean == [1, 2, 3] and low == [0, 1, 2] and high == [2, 3, 4]


def test_tokens_and_flops(tmp_path):
    """What was spent before a step: tokens, or 2N a sampled and 6N a trained one, N of final/."""
    rows = [{"reward": 0.0, "sampled_tokens": 10.0, "trained_tokens": 4.0}, {"reward": 1.0, "trained_tokens": 1.0}, {}]
    folder = Path(a_run(tmp_path / "a", rows))
    lines = plot.read_metrics(folder)
    assert [x for x, _ in plot.places(plot.Config(x="tokens"), folder, lines)] == [0, 14, 15]
    done = run_script("plot.py", str(folder), "--x", "flops", check=False)
    assert done.returncode and f"error: --x flops: {folder} has no final/" in done.stderr
    (folder / "final").mkdir()
    for i, shape in enumerate([(3, 4), (5,)]):
        save_file({"w": torch.zeros(shape, dtype=torch.bfloat16)}, folder / f"final/model-{i}.safetensors")
    spent = [x for x, _ in plot.places(plot.Config(x="flops"), folder, lines)]
    assert spent == [0, 17 * (2 * 10 + 6 * 4), 17 * (2 * 10 + 6 * 5)]
    for x in ("tokens", "flops"):
        run_script("plot.py", str(folder), "--x", x, "--out", str(tmp_path / f"{x}.svg"))
        assert plot.AXES[x] in texts(tmp_path / f"{x}.svg")


def test_a_new_metric_is_a_panel(tmp_path):
    """--keys names any key of metrics.jsonl; one that no run has ends with a sentence."""
    folder = a_run(tmp_path / "a", [row | {"my_metric": 3.0} for row in ROWS])
    run_script("plot.py", folder, "--keys", "my_metric", "reward", "--out", str(tmp_path / "x.svg"))
    said = texts(tmp_path / "x.svg")
    assert said.index("my metric") < said.index("reward (training)") and "entropy (nats)" not in said
    done = run_script("plot.py", folder, "--keys", "mine", check=False)
    assert "error: --keys (apart by spaces): no run has mine; there are completion_tokens, entropy, my_" in done.stderr
    done = run_script("plot.py", a_run(tmp_path / "b", [{"mine": 1.0}]), check=False)
    assert "error: plot.py knows no key of these runs; name --keys: mine" in done.stderr


def test_a_figure_for_a_paper(tmp_path):
    """SVG by the name, as wide as asked, with a title, text as text; other names are refused."""
    folder = a_run(tmp_path / "a", ROWS)
    flags = ["--width", "3.25", "--title", "Ours & theirs", "--no-captions"]
    run_script("plot.py", folder, *flags, "--out", str(tmp_path / "x.svg"))
    assert 'width="234pt"' in (tmp_path / "x.svg").read_text() and "Ours &amp; theirs" in texts(tmp_path / "x.svg")
    done = run_script("plot.py", folder, "--width", "0", check=False)
    assert done.returncode and "a --width above 0" in done.stderr
    for out in ("x.doc", "nowhere/x.png"):
        done = run_script("plot.py", folder, "--out", str(tmp_path / out), check=False)
        assert done.returncode and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_one_step_axis_for_all_panels(tmp_path, monkeypatch):
    """A panel of few points is as wide as the others, and none is cut."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: figures.append(figure))
    rows = [*ROWS, {"test_accuracy": 0.5}]
    rows[0] = rows[0] | {"test_accuracy": 0.25}
    plot.main(plot.Config(runs=(Path(a_run(tmp_path / "a", rows)),)))
    limits = {axis.get_xlim() for axis in figures[0].axes}
    assert len(figures[0].axes) == 4 and len(limits) == 1 and min(limits)[0] <= 0 and min(limits)[1] >= 4
