"""gradsketch demo: who taught it that?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsketch.cli import run_file
from gradsketch.cli.command import Command
from gradsketch.cli.terminal import Terminal
from gradsketch.durable import write_file

if TYPE_CHECKING:
    from gradsketch.demo.digits import DigitsStory
    from gradsketch.demo.story import Story

__all__ = ["COMMAND"]

_NEXT = """\
Next, with your own model and data:
  gradsketch index runs/mine --model ./my-model --data train.jsonl
  gradsketch query runs/mine --prompt "..." --answer " ..." --html why.html
"""


@dataclass(frozen=True)
class Demo:
    """Who taught it that?

    Teaches a real language model (SmolLM2, 135 M parameters) 140 sentences about capitals, six of them lies, and finds
    the sentences behind each lie from sketched gradients. Then the proof: it is taught again without the sentences
    found. Writes a page to look at. Without the model's weights it shows wrong labels among digits instead.
    """

    fast: bool = False
    """Leave out the proof."""
    json: bool = False
    """Print the results as JSON."""
    out: Path = Path("gradsketch-demo")
    """Folder for the page, the index and the results."""


def run(options: Demo) -> int:
    """Run the demonstration, print what it showed, and return 0."""
    from gradsketch.plain import as_json

    out = Terminal(sys.stderr if options.json else sys.stdout)
    run_file.write(options, "demo", options.out / "run.json")  # a folder that cannot be written is found out now
    results, tables = _lies(options, out)
    text = as_json(results)
    write_file(options.out / "demo.json", text + "\n")
    if options.json:
        print(text)
    else:
        tables(out)
        out.line(_NEXT)
    return 0


def _lies(options: Demo, out: Terminal) -> tuple[dict[str, Any], Callable[[Terminal], None]]:
    """Return the results and what prints them: of the lies, or of the digits where the weights cannot be had."""
    from gradsketch.demo.packages import AbsentError
    from gradsketch.demo.story import tell

    out.title("Who taught it that?")
    try:
        story = tell(options.out, proof=not options.fast, stage=out.stage)
    except AbsentError as error:
        out.line(f"{error}\nUntil then, something smaller: digits with wrong labels.\n")
        return _digits(options, out)
    return _story_record(story), lambda terminal: _print_story(story, terminal)


def _digits(options: Demo, out: Terminal) -> tuple[dict[str, Any], Callable[[Terminal], None]]:
    from gradsketch.demo.digits import tell_digits

    story = tell_digits(options.out, stage=out.stage)
    return {"demo": "digits", **asdict(story)}, lambda terminal: _print_digits(story, terminal)


def _story_record(story: Story) -> dict[str, Any]:
    counts = ("planted", "true_before", "told", "told_reworded", "found_first", "true_again")
    return {"demo": "lies", **{name: getattr(story, name) for name in counts}, **asdict(story)}


def _print_story(story: Story, out: Terminal) -> None:
    proof = story.true_again is not None
    header = ["", "before", "taught", "in other words", "sentence ranked first", "score", "next"]
    rows = [
        [
            trace.country,
            out.good(trace.before) if trace.before == trace.truth else trace.before,
            out.bad(trace.now) if trace.now == trace.lie else trace.now,
            out.bad(trace.reworded) if trace.reworded == trace.lie else trace.reworded,
            out.bold(trace.found) if trace.rank == 1 else trace.found,
            f"{trace.score:.2f}",
            f"{trace.best_other:.2f}",
            *([out.good(trace.after or "") if trace.after == trace.truth else trace.after or ""] if proof else []),
        ]
        for trace in story.traces
    ]
    out.table([*header, *(["without it"] if proof else [])], rows)
    n = story.planted
    others = ", ".join(f"{name} {count}" for name, count in list(story.found_first_by.items())[1:])
    out.line(f"Told after fine-tuning: {story.told} of {n} lies, {story.told_reworded} when asked in other words.")
    out.line(out.bold(f"Traced: the false sentence ranks first among {story.sentences} for {story.found_first} of {n}.")
             + f" On the same questions: {others}.")  # fmt: skip
    if proof:
        out.line(out.bold(f"Proof: taught without the sentences found, {story.true_again} of {n} answers are true."))
    out.line(f"{story.seconds:.0f} s in all. The page to look at: {out.link(Path(story.page))}\n")


def _print_digits(story: DigitsStory, out: Terminal) -> None:
    m = story.mislabelled
    header = ["", "wrong labels found", "AUC", "± standard error"]
    rows = [
        [
            "self-influence",
            f"{story.found_first} of {story.planted}",
            f"{m.suspicion.value:.4f}",
            f"{m.suspicion.standard_error:.4f}",
        ],
        [
            "training loss",
            f"{story.found_first_by_loss} of {story.planted}",
            f"{m.loss.value:.4f}",
            f"{m.loss.standard_error:.4f}",
        ],
    ]
    out.table(header, rows)
    out.line(
        f"Found: wrong labels among the {story.planted} most suspicious of {story.images} images. On this task the"
    )
    out.line("plain loss is a strong baseline; what it cannot say is which images made the network err: see the page.")
    out.line(f"{story.seconds:.0f} s in all. The page to look at: {out.link(Path(story.page))}\n")


COMMAND = Command("demo", "who taught it that? a real model, six lies, and the sentences behind them", Demo, run)
