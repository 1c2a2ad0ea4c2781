"""Deterministic text for the reference model; everything comes from the `random.Random` that is handed in."""

from .documents import Looks, Piece, Says, chat_document, problem_document, prose_document, question_document
from .expository import expository
from .held_out import draw, is_held_out
from .questions import Question, format_question, question
from .stories import story
from .word_problems import WordProblem, format_problem, word_problem

__all__ = [
    "Looks",
    "Piece",
    "Question",
    "Says",
    "WordProblem",
    "chat_document",
    "draw",
    "expository",
    "format_problem",
    "format_question",
    "is_held_out",
    "problem_document",
    "prose_document",
    "question",
    "question_document",
    "story",
    "word_problem",
]
