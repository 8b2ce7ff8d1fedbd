"""Results kept as they finish, so that the same command goes on after an interruption.

OUT/probe.json            what all results in OUT have in common: recipe, data, device
OUT/01-NAME/result.json   one of the weights, with its fingerprint
OUT/results.json  table.txt
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from dupr_cli.artifacts.files import remove_leftovers, write_json
from dupr_cli.artifacts.results import RESULTS, WeightsResult
from dupr_cli.errors import UsageError
from dupr_cli.models.compared import RANDOM_WEIGHTS, ComparedWeights

CLAIM_FILE = "probe.json"
RESULT_FILE = "result.json"
TABLE_FILE = "table.txt"

Fingerprint = Mapping[str, object]


def claim(out: Path, fingerprint: Fingerprint, overwrite: bool) -> None:
    """Make `out` the folder of this probe, or make sure that it is already.

    fingerprint: what must be the same for results to stand side by side, by name. Raises
    UsageError when `out` holds something else and `overwrite` is not set.
    """
    file = out / CLAIM_FILE
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; --out needs a directory.")
    if file.is_file():
        if overwrite:
            _clear(out)
        else:
            _require_same(out, file, fingerprint)
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"{out}: the directory is not empty and holds no probe. Give another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    write_json(file, fingerprint)


def _clear(out: Path) -> None:
    """Delete what a probe wrote, and nothing else; the claim goes last."""
    for result in out.glob(f"[0-9]*-*/{RESULT_FILE}"):
        shutil.rmtree(result.parent)
    for name in (RESULTS, TABLE_FILE, CLAIM_FILE):
        (out / name).unlink(missing_ok=True)


def _require_same(out: Path, file: Path, now: Fingerprint) -> None:
    try:
        before = json.loads(file.read_bytes())
        changed = [
            f"  {key}: {_brief(before.get(key))} there, {_brief(now.get(key))} now"
            for key in sorted({*before, *now})
            if before.get(key) != json.loads(json.dumps(now.get(key)))
        ]
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{file} is damaged ({error}). Use --overwrite to start anew.") from error
    if changed:
        raise UsageError(
            f"{out}: a probe that would not compare is there:\n" + "\n".join(changed) + "\nGive "
            "the same recipe and data to continue it, another --out, or --overwrite to replace it."
        )


def _brief(value: object) -> str:
    """A value for a message; of a digest, enough to tell it from another."""
    text = str(value)
    return text if len(text) < 64 else text[:12] + "..."


def _of_candidate(fingerprint: Fingerprint, candidate: ComparedWeights) -> dict[str, object]:
    weights = candidate.sha256 or RANDOM_WEIGHTS
    return {**fingerprint, "architecture": candidate.architecture, "weights": weights}


def read_finished(
    out: Path, candidate: ComparedWeights, fingerprint: Fingerprint
) -> WeightsResult | None:
    """A result that an earlier call wrote, or None. Raises UsageError when it is not of these."""
    folder = out / candidate.folder
    if not (folder / RESULT_FILE).is_file():
        return None
    try:
        values = json.loads((folder / RESULT_FILE).read_bytes())
        before, result = values["fingerprint"], WeightsResult(**values["result"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{folder}: the result there is damaged ({error}). Delete the folder, or use "
            f"--overwrite."
        ) from error
    if before != json.loads(json.dumps(_of_candidate(fingerprint, candidate))):
        raise UsageError(
            f"{folder}: the result there is of other weights than {candidate.address} has now. "
            f"Give another --out, or --overwrite to replace it."
        )
    return replace(result, weights=candidate.address)


def write_finished(
    out: Path, candidate: ComparedWeights, fingerprint: Fingerprint, result: WeightsResult
) -> None:
    """From here on these weights count as finished."""
    folder = out / candidate.folder
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    write_json(
        folder / RESULT_FILE,
        {"fingerprint": _of_candidate(fingerprint, candidate), "result": asdict(result)},
    )
