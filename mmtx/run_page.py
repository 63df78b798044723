"""`mmtx report`: a finished run on one self-contained HTML page: curves, figures, samples, sounds, configuration."""

import ast
import base64
import csv
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from mmtx.errors import InputError, escape
from mmtx.files import read_bytes
from mmtx.json_files import read_json
from mmtx.saved_folder import CONFIG

WIDE, TALL, POINTS = 420, 150, 400   # pixels of a chart; most points of a curve
MOST_BYTES = 2 ** 28                 # of a file
COLOURS = {"train": "var(--soft)", "val": "var(--mark)"}
EVALUATION = "evaluation.txt"        # written to the folder of the run by mmtx report --evaluate
# Section -> pattern of the names of its curves without train/ or val/; the last takes the rest.
SECTIONS = {"Loss": "loss$", "Loss by modality": "loss_", "Codebook": "perplexity|dead_codes",
            "Gradients and stability": "gradient_norm|skipped|last_norm|log_sum_exp|adversarial_scale",
            "Schedule and batches": "lr-|share_|weight_decay", "Other figures": ""}
LITERAL = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
WINDOW, ROWS, COLUMNS, DEPTH = 1024, 128, 400, 70  # samples, pixels, and dB of a spectrogram
STYLE = """
:root { --back: #fafaf7; --card: #fff; --ink: #1d1d1b; --soft: #85837a; --line: #dedcd5; --mark: #b4411f; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --back: #161614; --card: #20201d; --ink: #ecebe6; --line: #393833; --mark: #ff9a70; } }
body { margin: 0 auto; max-width: 82rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .8rem;
  margin: 0; overflow-x: auto; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; overflow-wrap: normal; } pre { overflow-x: auto; }
audio, .sound img { width: 100%; } .sound img { height: 7rem; border-radius: .3rem; } .wrong { color: var(--mark); }
"""

Curve = list[tuple[float, float]]    # (step, value) in order


def run_page(folder: str | Path, evaluation: str | None = None) -> str:
    """The page of a run, with the output of `mmtx evaluate`, by default the one stored in the folder, if any.

    Raises InputError if the folder is not that of a run, or if files are damaged.
    """
    folder = Path(folder)
    metrics = folder / "metrics" / "metrics.csv"
    if not metrics.is_file():
        raise InputError(f"{folder}: found no metrics/metrics.csv, expected the output folder of mmtx fit")
    curves = read_curves(metrics)
    sections = [f"<h1>{_text(folder.resolve().name)}</h1>", _model(folder / "model"),
                _environment(folder / "metrics" / "environment.json"), _figures(curves), _evaluation(folder / EVALUATION, evaluation),
                "<h2>Curves</h2><p>The validation's in colour, the training's in grey.</p>", *_charts(curves),
                *_samples(folder / "samples"), *_sounds(folder / "samples"), _config(folder / "metrics" / "config.yaml")]
    return ("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">"
            f"<title>{_text(folder.resolve().name)}</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n")


def read_curves(path: Path) -> dict[str, Curve]:
    """Columns of metrics.csv -> their values by step, without blanks and values that are not finite."""
    curves: dict[str, Curve] = {}
    rows = csv.DictReader(read_bytes(path, MOST_BYTES).decode("utf-8", "replace").splitlines())
    for number, row in enumerate(rows, 2):
        for name, word in row.items():
            if name in ("epoch", "step", None) or not word:
                continue
            try:
                step, value = float(row["step"]), float(word)
            except (KeyError, TypeError, ValueError):
                raise InputError(f"{path}: row {number}, {name}: found {word!r:.40} at step {row.get('step')!r:.40}, "
                                 "expected numbers") from None
            if math.isfinite(value) and math.isfinite(step):
                curves.setdefault(name, []).append((step, value))
    return curves


def downsampled(curve: Curve) -> Curve:
    """At most POINTS points, each the mean of equally many neighbours; the last point is kept."""
    size = -(-len(curve) // POINTS)
    groups = [curve[first:first + size] for first in range(0, len(curve), size)]
    means = [tuple(sum(each) / len(group) for each in zip(*group)) for group in groups]
    return [*means[:-1], curve[-1]]


def _charts(curves: Mapping[str, Curve]) -> list[str]:
    """A chart for each figure, with the curves of all splits, grouped in sections."""
    names: dict[str, list[str]] = {}
    for name in sorted(curves):
        names.setdefault(re.sub(r"^(train|val|test)/", "", name), []).append(name)
    drawn: dict[str, str] = dict.fromkeys(SECTIONS, "")
    for title, together in names.items():
        section = next(section for section, pattern in SECTIONS.items() if re.match(pattern, title))
        chart = _chart([(name, downsampled(curves[name])) for name in together])
        drawn[section] += f"<figure><b>{_text(title)}</b>{chart}</figure>"
    return [f"<h3>{section}</h3><div class=\"charts\">{charts}</div>" for section, charts in drawn.items() if charts]


def _chart(curves: Sequence[tuple[str, Curve]]) -> str:
    steps, values = ([point[axis] for _, curve in curves for point in curve] for axis in (0, 1))
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    across, up = right - left or 1.0, high - low or 1.0
    place = lambda step, value: (8 + (step - left) / across * (WIDE - 16), 16 + (high - value) / up * (TALL - 34))
    lines = []
    for name, curve in curves:
        colour = COLOURS.get(name.split("/")[0], "var(--mark)")
        points = [place(*point) for point in curve]
        told = f"<title>{_text(name)}: {curve[-1][1]:.5g} at step {curve[-1][0]:g}</title>"
        dots = "".join(f"<circle cx=\"{x:.1f}\" cy=\"{y:.1f}\" r=\"2.5\" fill=\"{colour}\">{told}</circle>" for x, y in points[-1:])
        lines.append(f"<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\""
                     + " ".join(f"{x:.1f},{y:.1f}" for x, y in points) + f"\">{told}</polyline>{dots}")
    return (f"<svg viewBox=\"0 0 {WIDE} {TALL}\" role=\"img\">{''.join(lines)}<text x=\"8\" y=\"11\">{high:.4g}</text>"
            f"<text x=\"8\" y=\"{TALL - 4}\">{low:.4g}</text><text x=\"{WIDE - 8}\" y=\"{TALL - 4}\" text-anchor=\"end\">"
            f"step {right:g}</text></svg>")


def _figures(curves: Mapping[str, Curve]) -> str:
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{curve[-1][1]:.5g}</td><td>{min(value for _, value in curve):.5g}</td>"
                   f"<td>{max(value for _, value in curve):.5g}</td><td>{curve[-1][0]:g}</td></tr>"
                   for name, curve in sorted(curves.items()) if not name.startswith(("train/", "lr-")))
    return ("<h2>Figures</h2><div class=\"card\"><table><tr><th>figure</th><th>last</th><th>least</th><th>most</th><th>step</th></tr>"
            f"{rows}</table></div>")


def _model(folder: Path) -> str:
    if not (folder / CONFIG).is_file():
        return "<p>There is no model: the run has not ended.</p>"
    config = read_json(folder / CONFIG)
    sizes = config.get("decoder") or config if isinstance(config, dict) else {}
    told = ", ".join(f"{name} {value}" for name, value in sizes.items() if isinstance(value, int | float | str))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"<p>The model: {_text(told)}; {size / 1e6:.1f} MB with its tokenizers.</p>"


def _environment(path: Path) -> str:
    """The commit and the rest of the environment of the run, if recorded."""
    facts = read_json(path) if path.is_file() else {}
    told = [f"{name} {value}" for name, value in facts.items() if value is not None] if isinstance(facts, dict) else []
    return f"<p>Made with {_text(', '.join(told))}.</p>" if told else ""


def _evaluation(path: Path, text: str | None) -> str:
    """Figures with confidence intervals, next to those of controls."""
    if text is None and not path.is_file():
        return ""
    text = text or read_bytes(path, MOST_BYTES).decode("utf-8", "replace")
    return f"<h2>Held-out figures beside controls</h2><div class=\"card\"><pre>{_text(text)}</pre></div>"


def step_of(path: Path) -> int:
    """The training step of a file of samples, such as step-000200.png or step-000200-07.ogg; -1 for other names."""
    found = re.fullmatch(r"step-(\d+)(-\d+)?\.(png|txt|ogg)", path.name)
    return int(found[1]) if found else -1


def _samples(folder: Path) -> list[str]:
    """The last pictures and the last texts that were sampled during training."""
    sections = []
    for path in (max(folder.glob(f"step-*.{kind}"), key=step_of, default=None) for kind in ("png", "txt")):
        if path is None:
            continue
        data = read_bytes(path, MOST_BYTES)
        if path.suffix == ".png":
            shown = f"<img alt=\"samples\" src=\"{_url(data, 'image/png')}\">"
        else:
            shown = f"<pre>{_text(data.decode('utf-8', 'replace'))}</pre>"
        sections.append(f"<h2>Samples at {_text(path.stem.replace('-', ' '))}</h2><div class=\"card\">{shown}</div>")
    return sections


def _sounds(folder: Path) -> list[str]:
    """Spectrograms and players for the sounds of the last validation that has any, with their captions."""
    last = max(folder.glob("step-*-*.ogg"), key=step_of, default=None)
    if last is None:
        return []
    step = last.name.rpartition("-")[0]
    said, cards = _captions(folder / f"{step}.txt"), ""
    for path in sorted(folder.glob(f"{step}-*.ogg")):
        data, row = read_bytes(path, MOST_BYTES), path.stem.rpartition("-")[2]
        number = int(row) if row.isdigit() else 0
        told = f"<b>{('original', 'reconstruction')[number % 2]}</b>"
        if number < len(said):
            predicted, true = said[number]
            told = f"<b class=\"{'right' if predicted == true else 'wrong'}\">{_text(predicted) or '(empty)'}</b><br>{_text(true)}"
        try:
            picture = _url(spectrogram(data), "image/png")
        except soundfile.SoundFileError as error:
            raise InputError(f"{path}: not a sound that can be read ({error})") from None
        cards += (f"<figure class=\"sound\"><img alt=\"spectrogram\" src=\"{picture}\"><audio controls preload=\"none\" "
                  f"src=\"{_url(data, 'audio/ogg')}\"></audio><figcaption>{told}</figcaption></figure>")
    return [f"<h2>Sounds at {_text(step.replace('-', ' '))}</h2><p>Decoded from their codes.</p><div class=\"charts\">{cards}</div>"]


def _captions(path: Path) -> list[list[str]]:
    """Rows of two texts, predicted and true, as written by ShowSamples; both are empty for any other row."""
    text = read_bytes(path, MOST_BYTES).decode("utf-8", "replace") if path.is_file() else ""
    rows = [re.findall(LITERAL, line) for line in text.splitlines()[1:]]
    return [[ast.literal_eval(word) for word in row] if len(row) == 2 else ["", ""] for row in rows]


def spectrogram(data: bytes) -> bytes:
    """An encoded sound -> a PNG: time to the right, frequency upwards to 8 kHz, loud is bright."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    padded = np.pad(samples[:, 0], WINDOW // 2)
    starts = np.linspace(0, max(0, len(padded) - WINDOW), COLUMNS).astype(int)
    frames = np.resize(padded, max(len(padded), WINDOW))[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames)))[:, :WINDOW * 8000 // rate]                       # (COLUMNS, bins)
    level = 10 * np.log10(np.maximum(power, 1e-9))
    shade = (np.clip((level - level.max()) / DEPTH + 1, 0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shade.T[::-1]).resize((COLUMNS, ROWS)).save(file, "PNG")
    return file.getvalue()


def _url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _config(path: Path) -> str:
    if not path.is_file():
        return ""
    text = read_bytes(path, MOST_BYTES).decode("utf-8", "replace")
    return f"<h2>Configuration</h2><details class=\"card\"><summary>{path.name}</summary><pre>{_text(text)}</pre></details>"


def _text(text: str) -> str:
    return html.escape(escape(text, keep="\n\t"))
