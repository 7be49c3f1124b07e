"""Answer published comparisons again, under the rules of today, from the figures in their answer.json; nothing is trained.

    python tools/answer_again.py docs/results/report-mnist.json --epochs 5 --margin 0.05 --claims '{coordconv: -0.15}'

Several files are blocks of one question, corrected together. The first is written anew, with all blocks, and a Markdown page beside it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stn_pipeline.comparing.answer import Answer, answers_of
from stn_pipeline.comparing.arms import SinglePair, Table, Trained
from stn_pipeline.comparing.measures import MEASURES, measures_of
from stn_pipeline.comparing.page import advice, markdown_table
from stn_pipeline.comparing.verdicts import Rules


def table_of(block: dict[str, Any]) -> Table:
    """Return what came of each training, as a published block says."""
    figures = block["figures"]
    return {
        arm: {
            int(seed): Trained(
                state=run["state"],
                figures={name: by_arm[arm][seed] for name, by_arm in figures.items() if seed in by_arm[arm]},
                collapsed=run["collapsed"],
                run_id=run["run_id"],
            )
            for seed, run in runs.items()
        }
        for arm, runs in block["runs"].items()
    }


def answer(blocks: Sequence[dict[str, Any]], epochs: int, rules: Rules, claims: dict[str, float]) -> list[Answer]:
    """Return the answers of published blocks, decided together."""
    tables = [(block["title"], f"{block['title']} ({epochs} epoch{'s' * (epochs != 1)})", table_of(block)) for block in blocks]
    seeds = sorted({seed for _, _, table in tables for by_seed in table.values() for seed in by_seed})
    found = answers_of(tables, blocks[0]["baseline"], rules, seeds, None, measures=measures_of(rules.measure.name), claims=claims)
    pairs = {block["title"]: tuple(SinglePair(**pair) for pair in block["single_pairs"]) for block in blocks}
    return [Answer(**(vars_of(one) | {"single_pairs": pairs[one.title]})) for one in found]


def vars_of(one: Answer) -> dict[str, Any]:
    """Return an answer's fields by name."""
    return {name: getattr(one, name) for name in Answer.__dataclass_fields__}


def page(question: str, answers: Sequence[Answer], made: str, file: str) -> str:
    """Return the Markdown page: the sentences first, then a table a block, then what is to be known beside them."""
    parts = [f"# {question}", "\n".join(f"* **{line}**" for one in answers for line in one.verdict_sentences().values())]
    for one in answers:
        parts += [
            f"## {one.title}",
            markdown_table(one.rows()),
            "\n".join(f"* {line}" for line in [*one.notes(), *one.single_pairs_in_words()]),
        ]
    return "\n\n".join([*parts, *advice(answers), f"{made} Figures: `{file}`."]) + "\n"


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--epochs", type=int, required=True, help="of every training")
    parser.add_argument("--decide", choices=list(MEASURES), default="test/loss")
    parser.add_argument("--margin", type=float)
    parser.add_argument("--claims", type=yaml.safe_load, default={})
    parser.add_argument("--made", default="", help="a sentence: when, on what, from which commit the figures are")
    given = parser.parse_args()
    found = [json.loads(file.read_text()) for file in given.files]
    answers = answer(
        [block for one in found for block in one["blocks"]], given.epochs, Rules(MEASURES[given.decide], given.margin), given.claims
    )
    question, first = found[0]["question"], given.files[0]
    made = given.made or found[0].get("made", "")
    content = {"question": question, "made": made, "blocks": [one.plain() for one in answers]}
    first.write_text(json.dumps(content, indent=1) + "\n")
    first.with_suffix(".md").write_text(page(question, answers, made, first.name))


if __name__ == "__main__":
    main()
