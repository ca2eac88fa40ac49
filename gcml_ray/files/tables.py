"""The CSV tables of a run: case scores (``cases.csv``, ``cross_site.csv``) and pushes (``transfers.csv``)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast, get_args

from gcml_ray.errors import CheckpointError
from gcml_ray.records import CaseScore, PushReceipt, Split
from gcml_ray.wording import in_shell

CASE_COLUMNS = ("site", "case", "split", "model", "class_name", "dice", "hd95", "surface_dice")
TRANSFER_COLUMNS = ("round", "sender", "receiver", "accepted", "reason", "size_bytes", "seconds")


def case_table(scores: Iterable[CaseScore]) -> str:
    """Case scores as ``cases.csv`` has them; an undefined number is an empty cell."""
    return _csv_text([CASE_COLUMNS, *map(case_row, scores)])


def read_case_table(path: Path) -> tuple[CaseScore, ...]:
    """The scores of a :func:`case_table`; none where there is no such file.

    Raises:
        CheckpointError: a row cannot be read, or the file is cut.
    """
    if not path.exists():
        return ()
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("it ends within a row")
        return tuple(case_score(row) for row in csv.DictReader(io.StringIO(text), strict=True))
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        problem = f"no column {error}" if isinstance(error, KeyError) else error or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({problem}); its columns must be {', '.join(CASE_COLUMNS)}. Bring the file back, "
            f"or delete it and let `gcml run --resume {in_shell(path.parent)}` test again"
        ) from error


def transfer_table(receipts: Iterable[PushReceipt]) -> str:
    """Pushes as ``transfers.csv`` has them."""
    return _csv_text([TRANSFER_COLUMNS]) + transfer_rows(receipts)


def transfer_rows(receipts: Iterable[PushReceipt]) -> str:
    """Further rows of a :func:`transfer_table`."""
    return _csv_text(map(_transfer_row, receipts))


def _csv_text(rows: Iterable[Iterable[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _transfer_row(receipt: PushReceipt) -> tuple[object, ...]:
    accepted = "yes" if receipt.accepted else "no"
    return (
        receipt.round_number,
        receipt.sender,
        receipt.receiver,
        accepted,
        receipt.reason,
        receipt.size_bytes,
        receipt.seconds,
    )


def case_row(score: CaseScore) -> tuple[object, ...]:
    """The cells of a score, as :data:`CASE_COLUMNS` names them; an undefined number is an empty one."""
    numbers = ("" if math.isnan(value) else value for value in (score.dice, score.hd95, score.surface_dice))
    return (score.site, score.case, score.split, score.model, score.class_name, *numbers)


def _is_share(value: float) -> bool:
    """Whether a number is from 0 to 1, or NaN for one that is not defined."""
    return math.isnan(value) or 0 <= value <= 1 + 1e-6


def case_score(row: dict[str, str]) -> CaseScore:
    """The score of a row by the names of :data:`CASE_COLUMNS`; others are left out.

    Raises:
        KeyError, ValueError: a cell is missing or too many, or a number cannot be one of a score.
    """
    if None in row or None in row.values() or row["split"] not in get_args(Split):  # too many cells, or too few
        raise ValueError(f"not a case's score: {row}")
    dice, hd95, surface_dice = (float(row[key] or "nan") for key in ("dice", "hd95", "surface_dice"))
    if not (_is_share(dice) and _is_share(surface_dice) and (math.isnan(hd95) or 0 <= hd95 < math.inf)):
        raise ValueError(f"numbers out of range: {row}")
    return CaseScore(
        site=row["site"],
        case=row["case"],
        split=cast(Split, row["split"]),
        model=row["model"],
        class_name=row["class_name"],
        dice=dice,
        hd95=hd95,
        surface_dice=surface_dice,
    )
