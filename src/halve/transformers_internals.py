"""Everything of transformers beside its public interface that Halve uses, in one place.

`LEANINGS` says what for and what breaks without it. The classes and functions among them are imported from here by
their own names, which imports transformers only then::

    from halve.transformers_internals import WeightConverter
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

from halve.leaning import Leaning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOADING = "transformers.core_model_loading"
_LAYOUT = "tests/checkpoint/test_disk_layout.py"
_LOAD = "tests/checkpoint/test_load.py"
_ONE_CALL = "tests/runtime/decoding/test_next_token.py"
_GENERATION = "tests/text/test_generation.py"
_WRITTEN_BACK = "no checkpoint whose tensors transformers renames, fuses or splits could be written back"

LEANINGS = (
    Leaning(
        path=f"{_LOADING}.WeightConverter",
        use="the rules by which tensors on disk are fused or split into parameters",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=("source_patterns", "target_patterns", "operations"),
    ),
    Leaning(
        path=f"{_LOADING}.WeightConverter.rename_source_key",
        use="which rule a tensor falls under",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=("self", "source_key"),
    ),
    Leaning(
        path=f"{_LOADING}.WeightConverter.reverse_transform",
        use="which parameters are written together",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=("self",),
    ),
    Leaning(
        path=f"{_LOADING}.WeightConverter.add_tensor",
        use="loading what would be written, to see that the parameter comes back",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=("self", "target_key", "source_key", "source_pattern", "future"),
    ),
    Leaning(
        path=f"{_LOADING}.WeightConverter.convert",
        use="loading what would be written, to see that the parameter comes back",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=("self", "layer_name", "model", "config"),
    ),
    Leaning(
        path=f"{_LOADING}.WeightRenaming",
        use="the rules by which tensors on disk are renamed",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
    ),
    Leaning(
        path=f"{_LOADING}.Transpose",
        use="whether a rule swaps dimensions",
        breaks="Halve would look for the groups of fused experts along the wrong dimension of the file",
        test=_LAYOUT,
        parameters=("dim0", "dim1", "check_dims"),
    ),
    Leaning(
        path=f"{_LOADING}.dot_natural_key",
        use="the order in which tensors of one parameter are collected",
        breaks="experts could be written in another order than they are loaded in",
        test=_LAYOUT,
    ),
    Leaning(
        path=f"{_LOADING}.rename_source_key",
        use="from a tensor's name on disk to the parameter's",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=(
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
        ),
    ),
    Leaning(
        path=f"{_LOADING}.revert_weight_conversion",
        use="from parameters to tensors on disk",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=("model", "state_dict"),
    ),
    Leaning(
        path="transformers.conversion_mapping.get_model_conversion_mapping",
        use="the rules of a model",
        breaks=_WRITTEN_BACK,
        test=_LAYOUT,
        parameters=("model",),
    ),
    Leaning(
        path="transformers.PreTrainedModel._weight_conversions",
        use="the rules that a model was loaded by",
        breaks="the rules of its class are taken, which may be more than were used",
        test=_LAYOUT,
        on_instances=True,
    ),
    Leaning(
        path="transformers.modeling_utils.remove_tied_weights_from_state_dict",
        use="which of several names of a tied weight is written",
        breaks="models from memory would be written with their tied weights twice",
        test=_LAYOUT,
        parameters=("state_dict", "model"),
    ),
    Leaning(
        path="transformers.PreTrainedModel._keys_to_ignore_on_save",
        use="what a checkpoint leaves out",
        breaks="models from memory would be written with more than save_pretrained writes",
        test=_LAYOUT,
    ),
    Leaning(
        path="transformers.PreTrainedModel._from_config",
        use="building a model of a given class without its weights",
        breaks="halve plan could not look at a model without loading it",
        test=_LOAD,
        parameters=("config", "kwargs"),
    ),
    Leaning(
        path="transformers.initialization.no_init_weights",
        use="building a model without spending minutes on random weights",
        breaks="halve plan would take minutes before it measures",
        test="tests/planner/test_rest.py",
    ),
    Leaning(
        path="transformers.dynamic_module_utils.get_class_from_dynamic_module",
        use="the class of a model that comes with its own code",
        breaks="a packed model with trusted code of its own could not be loaded",
        test="tests/checkpoint/test_remote_code.py",
        parameters=("class_reference", "pretrained_model_name_or_path"),
    ),
    Leaning(
        path="transformers.GgufConfig",
        use="asking for plain weights of a GGUF file",
        breaks="versions that have it could keep the quantised blocks; older ones always give plain weights",
        test="tests/checkpoint/test_gguf.py",
        parameters=("dequantize",),
        optional=True,
    ),
    Leaning(
        path="transformers.PreTrainedModel.hf_quantizer",
        use="what a model remembers of its quantisation",
        breaks="a pruned checkpoint of a GGUF file would say that it is quantised",
        test="tests/checkpoint/test_gguf.py",
        on_instances=True,
    ),
    Leaning(
        path="transformers.modeling_gguf_pytorch_utils.tqdm",
        use="silencing the bar that is shown while a GGUF file is read",
        breaks="the bar would be printed into Halve's own",
        test="tests/checkpoint/test_gguf.py",
        optional=True,
    ),
    Leaning(
        path="transformers.cache_utils.DynamicCache",
        use="recognising a plain key-value cache",
        breaks="a model could not write its own calibration text",
        test=_GENERATION,
    ),
    Leaning(
        path="transformers.cache_utils.DynamicLayer",
        use="keys and values in memory that is taken once",
        breaks="a model could not write its own calibration text",
        test=_GENERATION,
    ),
    Leaning(
        path="transformers.cache_utils.DynamicLayer.update",
        use="keys and values in memory that is taken once",
        breaks="a model could not write its own calibration text",
        test=_GENERATION,
        parameters=("self", "key_states", "value_states"),
    ),
    Leaning(
        path="transformers.cache_utils.DynamicLayer.lazy_initialization",
        use="keys and values in memory that is taken once",
        breaks="a model could not write its own calibration text",
        test=_GENERATION,
        parameters=("self", "key_states", "value_states"),
    ),
    Leaning(
        path="transformers.models.llama.modeling_llama.LlamaModel.forward",
        use="computing the next token in one call in its place",
        breaks="small models would generate text half as fast",
        test=_ONE_CALL,
        parameters=("self", "input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache"),
    ),
    Leaning(
        path="transformers.modeling_outputs.BaseModelOutputWithPast",
        use="what an inner model returns",
        breaks="small models would generate text half as fast",
        test=_ONE_CALL,
    ),
    Leaning(
        path="transformers.utils.output_capturing",
        use="telling the hooks of transformers from a user's",
        breaks="once a model has been asked for hidden states, its next tokens would be computed module by module",
        test=_ONE_CALL,
        optional=True,
    ),
    Leaning(
        path="transformers.integrations.sdpa_attention.use_gqa_in_sdpa",
        use="letting the queries that share keys go through attention together",
        breaks="on the CPU, attention over a long text takes up to twice as long in float32",
        test=_GENERATION,
        optional=True,
    ),
    Leaning(
        path="transformers.integrations.sdpa_attention.pack_gqa",
        use="whether transformers can let them go together",
        breaks="on the CPU, attention over a long text takes up to twice as long in float32",
        test=_GENERATION,
        optional=True,
    ),
    Leaning(
        path="transformers.pytorch_utils.Conv1D",
        use="the linear layers of GPT-2, whose weights lie the other way round",
        breaks="models of GPT-2's kind could not be pruned",
        test="tests/model/test_classify.py",
    ),
    Leaning(
        path="transformers.PreTrainedModel.get_experts_implementation",
        use="how a mixture multiplies its fused experts",
        breaks="products of fused experts could not be observed one by one",
        test="tests/model/test_collect.py",
        parameters=("self",),
        optional=True,
    ),
    Leaning(
        path="transformers.PreTrainedModel.set_experts_implementation",
        use="letting a mixture multiply its fused experts one by one",
        breaks="products of fused experts could not be observed one by one",
        test="tests/model/test_collect.py",
        parameters=("self", "experts_implementation"),
        optional=True,
    ),
    Leaning(
        path="transformers.Trainer._get_train_sampler",
        use="letting the sequences come in the order that was chosen",
        breaks="sequences would be shuffled anew, and texts would not share the training as their weights say",
        test="tests/learning/training/test_trainer.py",
        parameters=("self", "train_dataset"),
    ),
    Leaning(
        path="transformers.Trainer._save",
        use="writing what is trained alone into a state",
        breaks="every state would hold the whole model and the pickled arguments of the training",
        test="tests/learning/training/test_trainer.py",
        parameters=("self", "output_dir", "state_dict"),
    ),
    Leaning(
        path="transformers.Trainer._save_checkpoint",
        use="marking a state as whole when all of it is on the disk",
        breaks="a training would go on from states that were never finished",
        test="tests/learning/training/test_trainer.py",
        parameters=("self", "model", "trial"),
    ),
    Leaning(
        path="transformers.Trainer._load_from_checkpoint",
        use="putting back what is trained from a state",
        breaks="a training that was stopped could not go on",
        test="tests/learning/training/test_trainer.py",
        parameters=("self", "resume_from_checkpoint", "model"),
    ),
    Leaning(
        path="transformers.Trainer.model_accepts_loss_kwargs",
        use="letting the Trainer count the labels of a whole step",
        breaks="tokens of unevenly filled passes would weigh unequally",
        test="tests/learning/training/test_trainer.py",
        on_instances=True,
    ),
    Leaning(
        path="transformers.Trainer.current_gradient_accumulation_steps",
        use="sharing a learner's penalty out over the passes of a step",
        breaks="penalties would count once a pass",
        test="tests/learning/training/test_trainer.py",
        on_instances=True,
    ),
    Leaning(
        path="transformers.Trainer._created_lr_scheduler",
        use="saying that the schedule is made anew when a training goes on",
        breaks="a second training with the same Trainer would keep the first one's schedule",
        test="tests/learning/training/test_trainer.py",
        on_instances=True,
    ),
    Leaning(
        path="transformers.TrainingArguments._n_gpu",
        use="training on one GPU a process",
        breaks="several visible GPUs in one process would be used by nn.DataParallel, which keeps no masks",
        test="tests/learning/training/test_trainer.py",
        on_instances=True,
    ),
    Leaning(
        path="transformers.integrations.get_available_reporting_integrations",
        use="which trackers are installed",
        breaks="a tracker that is not there would be found out after the models are loaded",
        test="tests/learning/test_options.py",
    ),
)

OUTPUT_CAPTURING = "transformers.utils.output_capturing"
"""The module of hooks that stay on a model once it has been asked for more than its output."""

_IMPORTED = {
    entry.name: entry for entry in LEANINGS if entry.path.count(".") == 2 and "PreTrainedModel" not in entry.path
}


def __getattr__(name: str) -> Any:
    """Import one of the classes and functions in the table.

    Raises:
        HalveError: this version of transformers does not have it.
        AttributeError: the table does not have it.
    """
    if name not in _IMPORTED:
        raise AttributeError(f"{name} is not in the table of what Halve uses of transformers")
    found = _IMPORTED[name].find()
    globals()[name] = found
    return found


def cache_keyword(forward: Any) -> str:
    """Return what a model's forward calls its cache of keys and values: past_key_values until transformers 5.24."""
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


def conversions_when_loaded(model: "PreTrainedModel") -> list[Any] | None:
    """Return the rules that a model was loaded by, None for one that was not loaded."""
    return getattr(model, "_weight_conversions", None)


def note_conversions(model: "PreTrainedModel", rules: list[Any]) -> None:
    """Set the rules that a model was loaded by."""
    vars(model)["_weight_conversions"] = rules


def left_out_when_saved(model: "PreTrainedModel") -> set[str]:
    """Return the state-dict names that ``save_pretrained`` leaves out."""
    return set(model._keys_to_ignore_on_save or ())  # noqa: SLF001


def build(model_class: Any, config: Any, **options: Any) -> Any:
    """Build a model of a class of transformers, which have no public way to; ``options`` are its own."""
    return model_class._from_config(config, **options)  # noqa: SLF001


def skipped_initialisation() -> AbstractContextManager[Any]:
    """Build models with whatever is in memory for weights."""
    from transformers.initialization import no_init_weights

    context: AbstractContextManager[Any] = no_init_weights()
    return context


def dequantising() -> dict[str, Any]:
    """Return the arguments that ask for plain weights of a GGUF file: transformers could also keep the blocks."""
    import transformers

    configure = getattr(transformers, "GgufConfig", None)
    return {} if configure is None else {"quantization_config": configure(dequantize=True)}


def forget_quantisation(model: "PreTrainedModel") -> None:
    """A dequantised model is an ordinary one: what is written from it must not say otherwise."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)


@contextmanager
def queries_packed() -> Iterator[None]:
    """Let the queries of one token that share keys go through attention as rows of one product.

    PyTorch's own way for such queries reads the keys once for each of them on the CPU. Versions of transformers that
    would repeat the keys in memory instead stay as they are.
    """
    module = import_module("transformers.integrations.sdpa_attention")
    before = getattr(module, "use_gqa_in_sdpa", None)
    if before is None or not hasattr(module, "pack_gqa"):
        yield
        return
    module.use_gqa_in_sdpa = lambda *_args, **_options: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.use_gqa_in_sdpa = before  # type: ignore[attr-defined]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from printing bars; the user's own setting, and that of the hub's, come back afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    shown, hub_silent = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    gguf = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(gguf, "tqdm", None)  # this one heeds no setting
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if bar is not None:
        gguf.tqdm = lambda items, **_how: items  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if bar is not None:
            gguf.tqdm = bar  # type: ignore[attr-defined]
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            if hub_silent:
                disable_progress_bars()


def trackers() -> list[str]:
    """Return the trackers of trainings that transformers knows and that are installed."""
    leaning = next(each for each in LEANINGS if each.name == "get_available_reporting_integrations")
    return list(leaning.find()())
