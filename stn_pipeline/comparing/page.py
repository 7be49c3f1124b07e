"""What a comparison's own run shows: the answer first, tables, pictures, every figure as JSON, and one HTML file to send to a colleague."""

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import torch

from stn_pipeline import figures
from stn_pipeline.comparing import pictures
from stn_pipeline.comparing.answer import Answer
from stn_pipeline.data import Splits
from stn_pipeline.errors import StnError
from stn_pipeline.questions import in_keys
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import Run, load_checkpoint, metric_by_epoch, read_file

SHOWN_IMAGES = 8
PROVENANCE = {
    "device": "device", "engine": "engine", "mlflow.source.git.commit": "commit", "version.code": "code", "version.torch": "torch"
}  # fmt: skip
CAPTIONS = {
    "forest": "Each arm against the baseline. The thick line is the 95 % interval by t, the thin one by bootstrap; an interval that "
    "holds 0 is no evidence of a difference, and one that ends in an arrow goes on. A cross is a difference that was claimed; a band is "
    "the margin.",
    "losses": "Loss per epoch, mean ± sd over the seeds. The test split is read once, at the end, so it has no curve.",
    "seeds": "One line a seed, from the baseline to the arm, both trained with that seed; its colour says which is better. "
    "A single run shows one of these lines.",
    "diagnostics": "What the localiser does on 256 validation images, a thin line a seed: dotted ones collapsed, "
    "and may lie far beyond the axes.",
    "confusions": "Errors by class, summed over the seeds.",
    "warps": "The same test images under one trained network of each arm (one seed).",
}


def publish(
    run: Run,
    answers: Sequence[Answer],
    title: str,
    question: str = "",
    command: str = "",
    splits: Callable[[Answer], Splits | None] | None = None,
    looks: Sequence[int] = (),
) -> None:
    """Put the answers of all blocks on a comparison's run.

    looks: after how many seeds the data were to be looked at, where that was more than once.
    splits: returns the data of a block, whose test images are shown under each arm; None where they are not to be had.
    """
    drawn: dict[str, bytes] = {}
    parts: list[dict[str, Any]] = []
    overview = pictures.forest(answers, title)
    if overview is not None:
        drawn["forest.png"] = overview
    for answer in answers:
        own = {name: content for name, content in _pictures(answer, splits).items() if content is not None}
        folder = f"{in_keys(answer.title)}/" if len(answers) > 1 else ""
        drawn |= {f"{folder}{name}.png": content for name, content in own.items()}
        parts.append({"answer": answer, "pictures": {name: _embedded(content) for name, content in own.items()}, "seeds": _by_seed(answer)})
    report = _template().render(
        title=title,
        question=question,
        command=command,
        parts=parts,
        captions=CAPTIONS,
        forest=_embedded(overview) if overview else None,
        provenance=_provenance(answers),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        run_id=run.id,
        decides=answers[0].decisive.words,
        looks=looks,
        advice=advice(answers),
        several=len(answers) > 1,
    )
    run.log_files({"report.html": report.encode(), "runs.csv": _csv(answers).encode()} | drawn)
    run.log_json("answer.json", {"question": question, "blocks": [answer.plain() for answer in answers]})
    for answer in answers:
        prefix = f"{in_keys(answer.title)}/" if len(answers) > 1 else ""
        differences = {
            f"compare/{prefix}{in_keys(contrast.arm)}/{measure.name.split('/')[1]}_difference": contrast.t.difference
            for measure in answer.measures
            for contrast in answer.contrasts[measure]
        }
        run.log_metrics(differences)
    run.tag({"answer": " ".join(told(answers))})
    run.describe(_description(answers, question))


def told(answers: Sequence[Answer]) -> list[str]:
    """Return the answers as the console shows them: first the verdicts of all blocks, then what is to be known beside them."""
    lines = [line for answer in answers for line in answer.verdict_sentences().values()]
    for answer in answers:
        prefix = f"{answer.title}: " if len(answers) > 1 else ""
        lines += [prefix + line for line in [*answer.notes(), *answer.single_pairs_in_words()]]
    return lines + advice(answers)


def advice(answers: Sequence[Answer]) -> list[str]:
    """Return how more could be known, where no difference is shown and no margin is named."""
    verdicts = [verdict for answer in answers for verdict in answer.verdicts.values()]
    if any(verdict.kind == "not shown" and verdict.margin is None and verdict.test for verdict in verdicts):
        return [
            "No difference shown is not equality: name a margin below which a difference does not matter (margin: 0.05) to ask for "
            "that, and to be told how many seeds it takes."
        ]
    return []


def _pictures(answer: Answer, splits: Callable[[Answer], Splits | None] | None) -> dict[str, bytes | None]:
    histories = {
        arm: {seed: {name: metric_by_epoch(one.run_id, name) for name in pictures.HISTORIES} for seed, one in by_seed.items() if one.run_id}
        for arm, by_seed in answer.table.items()
    }
    return {
        "losses": pictures.losses(answer, histories, f"{answer.title}: loss per epoch"),
        "seeds": pictures.seeds(answer, f"{answer.title}: seed by seed"),
        "confusions": pictures.confusions(_confusions(answer), f"{answer.title}: errors"),
        "diagnostics": pictures.diagnostics(answer, histories, f"{answer.title}: the localiser"),
        "warps": _warps(answer, splits(answer) if splits else None),
    }


def _confusions(answer: Answer) -> dict[str, tuple[Any, list[str], int]]:
    found: dict[str, tuple[Any, list[str], int]] = {}
    for arm in answer.arms:
        for one in answer.table[arm].values():
            content = read_file(one.run_id, "confusion_matrix.json") if one.state == "done" else None
            if content is not None:
                matrix = json.loads(content)
                counts, classes, n = found.get(arm, (0, matrix["classes"], 0))
                if classes == matrix["classes"]:
                    found[arm] = (counts + np.array(matrix["counts"]), classes, n + 1)
    return found


def _warps(answer: Answer, splits: Splits | None) -> bytes | None:
    """Return the same test images under each arm's network, of the first seed that all arms have done."""
    done = [{seed for seed, one in by_seed.items() if one.state == "done"} for by_seed in answer.table.values()]
    shared = sorted(set.intersection(*done)) if done else []
    if splits is None or not shared:
        return None
    seed, arms = shared[0], {}
    images = splits.test.images[splits.test.spread(SHOWN_IMAGES)].cpu().float() / 255
    for arm in answer.arms:
        try:
            with torch.inference_mode():
                warped, points = load_checkpoint(answer.table[arm][seed].run_id).build_best().warp(images)
        except StnError:
            continue  # its checkpoint is gone, or is of other images
        arms[arm] = warped.numpy(), None if points is None else points.numpy()
    if not arms:
        return None
    title = f"{answer.title}: the same test images under each arm, seed {seed}"
    return figures.to_png(figures.warps_by_arm(images.numpy(), arms, title))


def _by_seed(answer: Answer) -> list[list[str]]:
    """Return a table: a heading, then a seed a row with each arm's figures."""
    what = ", ".join(measure.words for measure in answer.measures)
    rows = [["seed", *(f"{arm}: {what}" for arm in answer.arms)]]
    pairs = {(pair.arm, pair.seed): pair for pair in answer.single_pairs}
    for seed in sorted({seed for by_seed in answer.table.values() for seed in by_seed}):
        row = [str(seed)]
        for arm in answer.arms:
            one, pair = answer.table[arm].get(seed), pairs.get((arm, seed))
            text: str = "–" if one is None else one.state
            if one is not None and one.state == "done":
                text = ", ".join(f"{one.figures[measure.name]:.4f}" for measure in answer.measures if measure.name in one.figures)
                text += " (collapsed)" if one.collapsed else ""
            row.append(text + (f"; McNemar p {pair.p:.2g}" if pair else ""))
        rows.append(row)
    return rows


def _provenance(answers: Sequence[Answer]) -> dict[str, list[str]]:
    """Return on what, and from which code, the runs were trained: each value once."""
    found: dict[str, dict[str, None]] = {name: {} for name in PROVENANCE.values()}
    for one in (one for answer in answers for by_seed in answer.table.values() for one in by_seed.values()):
        for tag, name in PROVENANCE.items():
            if tag in one.tags:
                found[name][one.tags[tag][:12] if name == "commit" else one.tags[tag]] = None
    return {name: list(values) for name, values in found.items() if values}


def _csv(answers: Sequence[Answer]) -> str:
    text = io.StringIO()
    out = csv.writer(text)
    measures = answers[0].measures
    out.writerow(["block", "arm", "seed", "state", "collapsed", *(measure.name for measure in measures), "run_id", "why"])
    for answer in answers:
        for arm in answer.arms:
            for seed, one in sorted(answer.table[arm].items()):
                figures = [one.figures.get(measure.name) for measure in measures]
                out.writerow([answer.title, arm, seed, one.state, one.collapsed, *figures, one.run_id, one.why])
    return text.getvalue()


def _description(answers: Sequence[Answer], question: str) -> str:
    parts = []
    for answer in answers:
        parts += [f"**{markdown(answer.title)}**"] if len(answers) > 1 else []
        lines = [f"* **{markdown(verdict)}**" for verdict in answer.verdict_sentences().values()]
        parts.append("\n".join(lines + [f"* {markdown(line)}" for line in [*answer.notes(), *answer.single_pairs_in_words()]]))
        parts.append(markdown_table(answer.rows()))
    parts += advice(answers)
    parts += [f"*{markdown(question)}*"] if question else []
    parts.append(
        "Under Artifacts: `report.html` (everything in one file, to download and to send on), `forest.png`, the loss curves, seeds, "
        "confusion matrices and warps of each block; every figure in `answer.json`, every run in `runs.csv`."
    )
    return "\n\n".join(parts)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table, whose first row is its heading, as Markdown."""
    head, *body = [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _embedded(content: bytes) -> dict[str, Any]:
    """Return a picture for an <img>: its content, and a width at which the letters of all pictures are of one size."""
    pixels = int.from_bytes(content[16:20], "big")  # of the PNG's header
    return {"src": "data:image/png;base64," + base64.b64encode(content).decode(), "width": round(0.76 * pixels)}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((files("stn_pipeline.comparing") / "report.html").read_text())
