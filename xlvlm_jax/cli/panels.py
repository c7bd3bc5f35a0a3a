"""Help panels: how the help of a command with many options groups them."""

import copy
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args

from typer.models import OptionInfo

# Commands with at most this many options list them without panels.
FEW = 12
# Panel -> names of the command arguments listed in it.
PANELS = {
    "Data": "task dataset split negatives images prompt annotations questions objects containing "
    "excluding key any_case containing_match containing_in image_ids sample_ids dataset_size "
    "num_samples first test references",
    "Selection": "tokens rows match search_from include_prompt site source target words pairs "
    "features target_features target_site concepts concept finetuned_concepts num_words "
    "num_candidates num_images layer neighbours "
    "word_rules",
    "Method": "decomposition between_models matched source_concepts "
    "method methods num_concepts mode alpha k l1 learning_rate products dictionary skip "
    "tol max_iter n_init vector where edit add ablate "
    "together instruction context_site context_prompt contrast contrasts positive negative states "
    "keep steps rank epochs "
    "rate schedule warmup weight_decay choose_on wanted max_cost num_choose reduce by num_targets "
    "assign_by normalise_shifts normalise_shifted penalty threshold num_keys num_heads direction "
    "num_features feature_ids jacobian centred share num_masks fit_source fit_target budget "
    "budget_of",
    "Evaluation": "vqa_protocol without answer_types baseline "
    "clip bert bert_layer bert_idf bert_baseline stability seeds java "
    "evaluation_split evaluation_samples evaluate_every",
    "Model": "model processor adapter finetuned finetuned_model dtype through_norm max_new_tokens "
    "ignore_generation_config",
    "Scale": "batch_size at_once accumulate states_dtype mesh hosts workers stream save_every",
    "Run": "protocol beside store_samples output arrays overwrite strict "
    "dry_run ignore_disk profile seed",
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}


def into_panels(command: Callable[..., Any]) -> Callable[..., Any]:
    """Groups the options of a command with more than FEW of them into help panels.

    Args:
        command: a function with Typer annotations.

    Returns:
        The same function, with annotations that it shares with no other command.

    Raises:
        KeyError: an option has no panel, neither in its own annotation nor in PANELS.
    """
    options = {
        name: parameter.annotation
        for name, parameter in inspect.signature(command).parameters.items()
        if any(isinstance(each, OptionInfo) for each in get_args(parameter.annotation)[1:])
    }
    if len(options) <= FEW:
        return command
    for name, annotation in options.items():
        kind, *described = get_args(annotation)
        described = [copy.copy(each) for each in described]
        for each in described:
            if isinstance(each, OptionInfo):
                each.rich_help_panel = each.rich_help_panel or PANEL_OF[name]
        command.__annotations__[name] = Annotated[kind, *described]
    return command
