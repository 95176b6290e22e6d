"""`swarm calibrate`: measures once what a model needs of its KV cache, for servers to compress by."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console
from swarm.errors import BadInputError, LengthLimitError

if TYPE_CHECKING:
    from swarm.kvpolicy.calibration_file import Calibration

__all__ = ["calibrate"]

_SHORTEST_STRETCH: Final = 256
_AGAIN = "\n\nRepeat the previous context:\n\n"


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to measure.", show_default=False)],
    text: Annotated[
        Path,
        typer.Option("--text", metavar="FILE", help="Text of many kinds, UTF-8; 100 kB or more.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to write; by default where servers here look for it."),
    ] = None,
    stretches: Annotated[
        int, typer.Option("--stretches", metavar="N", min=1, help="How many stretches of the text are read.")
    ] = 12,
    stretch_tokens: Annotated[
        int, typer.Option("--stretch-tokens", metavar="N", min=_SHORTEST_STRETCH, help="Length of each.")
    ] = 2048,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure how much each layer and KV head of a model can forget, and how its keys and values are best stored.

    Takes minutes for small models on a CPU. The file holds no text.
    """
    prepare_process(verbose)
    with json_only(json):
        content = _read(text)
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.kvpolicy.calibration import calibrate as measure
            from swarm.kvpolicy.calibration import choose_stretches
            from swarm.kvpolicy.calibration_file import calibration_path, write_calibration
            from swarm.kvpolicy.reference_model import load_reference_model
            from swarm.models.source import default_cache_dir, load_tokenizer, resolve_model

            source = resolve_model(model, report=progress)
            _check_length(model, source.max_positions, stretch_tokens)
            path = out or calibration_path(default_cache_dir() / "kv", source.model_hash)
            _check_writable(path)
            tokenizer: Any = load_tokenizer(model, report=progress)
            chosen = choose_stretches(
                tokenizer(content, verbose=False)["input_ids"], num_stretches=stretches, stretch_tokens=stretch_tokens
            )
            progress.start("Loading the model", None, "")
            measured = measure(
                load_reference_model(source),
                chosen,
                again=tokenizer(_AGAIN, add_special_tokens=False)["input_ids"],
                model_hash=source.model_hash,
                report=progress,
            )
            write_calibration(path, measured)
        if json:
            print_json({"model": model, "model_hash": source.model_hash, "file": str(path), "stretches": len(chosen)})
        else:
            _print_curve(path, measured)


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is no UTF-8 text; give a plain text file") from error
    except OSError as error:
        raise BadInputError(f"{path} can not be read ({error.strerror}); give a text file with --text") from error
    if not content.strip():
        raise BadInputError(f"{path} has no text in it; give 100 kB or more, of many kinds")
    return content


def _check_writable(path: Path) -> None:
    """Refuse, before minutes of measuring, what could not be written after them. Raises BadInputError or OSError."""
    if path.is_dir():
        raise BadInputError(f"--out {path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        # The error itself names a file that nobody has asked for.
        raise OSError(error.errno, f"{error.strerror}; choose another place with --out", str(path)) from error


def _check_length(model: str, max_positions: int | None, stretch_tokens: int) -> None:
    """Every stretch is read twice. Raises LengthLimitError for a model that can not hold that."""
    if max_positions is None or 2 * stretch_tokens <= max_positions:
        return
    if max_positions < 2 * _SHORTEST_STRETCH:
        advice = f"models that hold less than {2 * _SHORTEST_STRETCH} are compressed by defaults, without a measurement"
    else:
        advice = f"lower --stretch-tokens to {max(max_positions // 2 - 64, _SHORTEST_STRETCH)} or less"
    raise LengthLimitError(f"{model} holds {max_positions} tokens, and every stretch is read twice; {advice}")


def _print_curve(path: Path, measured: Calibration) -> None:
    console = results_console()
    console.print("share of tokens that a layer keeps where the model keeps a quarter (mean over its KV heads)")
    curve = measured.curve
    for layer, heads in enumerate(curve.shares):
        share = sum(curve.share(layer, head, 0.25) for head in range(len(heads))) / len(heads)
        console.print(f"{layer:4d}  {share:4.0%}  {'█' * round(40 * share)}")
    console.print(f"written to {path}", style="dim")
