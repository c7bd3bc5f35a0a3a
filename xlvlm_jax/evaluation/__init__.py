"""Evaluates what steering does to answers and captions: predicts, scores, compares and stores."""

from xlvlm_jax.evaluation.answer_effects import (
    MEAN_OVER_TYPES,
    Accuracy,
    Changes,
    answer_changes,
    answer_type,
    count_answers,
    count_by_type,
    count_types,
    describe,
    fall_of_others,
    question_type_scores,
    require_answers,
    substring_counts,
    truths,
    vqa_scores,
)
from xlvlm_jax.evaluation.answer_types import (
    count_listed_types,
    read_types,
    token_of_interest_accuracy,
)
from xlvlm_jax.evaluation.baseline import read_baseline
from xlvlm_jax.evaluation.caption_effects import (
    CaptionChanges,
    caption_changes,
    count_said,
    count_valid,
)
from xlvlm_jax.evaluation.hallucination import chair_figures, paired_tests, pope_figures
from xlvlm_jax.evaluation.hallucination_tasks import (
    Descriptions,
    ObjectCaptions,
    ObjectDescriptions,
    Presence,
)
from xlvlm_jax.evaluation.judge import (
    CHAT,
    Verdict,
    chats_of,
    describe_verdicts,
    judge_run,
    read_chat,
    read_run,
    read_verdict,
)
from xlvlm_jax.evaluation.method_sweep import (
    Attempt,
    Sweep,
    attempts,
    best_within,
    pareto_front,
    run_sweep,
)
from xlvlm_jax.evaluation.predict import PLAIN, Condition, Predictions, Steering, aligned, predict
from xlvlm_jax.evaluation.preflight import EvaluationNeeds, preflight
from xlvlm_jax.evaluation.safety import deference_figures
from xlvlm_jax.evaluation.stage import describe_sweep, evaluate, evaluate_steering, select
from xlvlm_jax.evaluation.sweep import Quantity, Trial, choose, grid, names
from xlvlm_jax.evaluation.tasks import Captions, Questions, Task

Needs = EvaluationNeeds  # its name in version 0.1

__all__ = [
    "CHAT",
    "MEAN_OVER_TYPES",
    "PLAIN",
    "Accuracy",
    "Attempt",
    "CaptionChanges",
    "Captions",
    "Changes",
    "Condition",
    "Descriptions",
    "EvaluationNeeds",
    "Needs",
    "ObjectCaptions",
    "ObjectDescriptions",
    "Predictions",
    "Presence",
    "Quantity",
    "Questions",
    "Steering",
    "Sweep",
    "Task",
    "Trial",
    "Verdict",
    "aligned",
    "answer_changes",
    "answer_type",
    "attempts",
    "best_within",
    "caption_changes",
    "chair_figures",
    "chats_of",
    "choose",
    "count_answers",
    "count_by_type",
    "count_listed_types",
    "count_said",
    "count_types",
    "count_valid",
    "deference_figures",
    "describe",
    "describe_sweep",
    "describe_verdicts",
    "evaluate",
    "evaluate_steering",
    "fall_of_others",
    "grid",
    "judge_run",
    "names",
    "paired_tests",
    "pareto_front",
    "pope_figures",
    "predict",
    "preflight",
    "question_type_scores",
    "read_baseline",
    "read_chat",
    "read_run",
    "read_types",
    "read_verdict",
    "require_answers",
    "run_sweep",
    "select",
    "substring_counts",
    "token_of_interest_accuracy",
    "truths",
    "vqa_scores",
]
