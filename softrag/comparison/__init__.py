"""What memories cost and save on a set of questions: modes, models and codecs side by side."""

from softrag.comparison.calibration import Calibration, calibrate
from softrag.comparison.intervals import Bootstrap, Interval
from softrag.comparison.rows import Comparison, LoadedModel, Row, answer_rows

__all__ = [
    "Bootstrap",
    "Calibration",
    "Comparison",
    "Interval",
    "LoadedModel",
    "Row",
    "answer_rows",
    "calibrate",
]
