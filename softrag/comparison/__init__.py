"""What memories cost and save on a set of questions: modes, models and codecs side by side."""

from softrag.chat_endpoint import ChatEndpoint
from softrag.comparison.calibration import Calibration, calibrate
from softrag.comparison.chunks import FolderChunks, StoredChunks, retrieve_for
from softrag.comparison.intervals import Bootstrap, Interval
from softrag.comparison.judge import judge_answers
from softrag.comparison.question_writing import decoder_writer, endpoint_writer, write_questions
from softrag.comparison.report import examples, write_report
from softrag.comparison.rows import Comparison, LoadedModel, Row, Way, answer_rows, fall_back
from softrag.comparison.summary import summarize, summarize_calibration

__all__ = [
    "Bootstrap",
    "Calibration",
    "ChatEndpoint",
    "Comparison",
    "FolderChunks",
    "Interval",
    "LoadedModel",
    "Row",
    "StoredChunks",
    "Way",
    "answer_rows",
    "calibrate",
    "decoder_writer",
    "endpoint_writer",
    "examples",
    "fall_back",
    "judge_answers",
    "retrieve_for",
    "summarize",
    "summarize_calibration",
    "write_questions",
    "write_report",
]
