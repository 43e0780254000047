"""Every field of trl's SFTConfig as a pydantic section. Generated: do not edit.

Written by scripts/generate_training_fields.py from trl 1.16.0
and transformers 5.23.0. Names, types and defaults are trl's own, except where a comment says
why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# Fields that are set elsewhere, and where.
OWNED_ELSEWHERE = {
    "output_dir": "set output_dir at the top level of the recipe",
    "resume_from_checkpoint": "resume with: qhybrid sft RECIPE --resume auto",
    "deepspeed": "use the section distributed",
    "fsdp": "use the section distributed",
    "fsdp_config": "use the section distributed",
    "parallelism_config": "use the section distributed",
    "local_rank": "the launcher sets it",
    "model_init_kwargs": "use the section model",
    "trust_remote_code": "code from a model repository is never run",
    "do_train": "qhybrid sft always trains",
    "do_eval": "set eval_strategy",
    "do_predict": "use: qhybrid eval",
    "dataset_kwargs": "use the section data",
    "dataset_text_field": "use data.sources[].columns",
    "pad_token": "the tokenizer's pad token is used",
    "hub_token": "log in with: hf auth login (a token does not belong in a recipe)",
    "ignore_data_skip": "a resumed run would take other rows",
    "auto_find_batch_size": "it restarts training with weights that are already changed",
    "push_to_hub": "it would push checkpoints, not the adapter; use: hf upload NAME RUN/adapter",
    "hub_model_id": "use: hf upload NAME RUN/adapter",
    "hub_strategy": "use: hf upload NAME RUN/adapter",
    "hub_always_push": "use: hf upload NAME RUN/adapter",
    "hub_private_repo": "use: hf upload NAME RUN/adapter",
    "hub_revision": "use: hf upload NAME RUN/adapter",
    "enable_jit_checkpoint": "its checkpoints cannot be verified",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "disable_tqdm": "qhybrid draws the progress",
    "label_names": "the labels come with the data",
    "include_for_metrics": "only the loss is evaluated during training",
    "batch_eval_metrics": "only the loss is evaluated during training",
    "prediction_loss_only": "only the loss is evaluated during training",
    "eval_do_concat_batches": "only the loss is evaluated during training",
    "length_column_name": "the data has no such column",
    "restore_callback_states_from_checkpoint": "a resumed run restores its own state",
}

# Fields that are ours and not trl's.
OUR_FIELDS = (
    "early_stopping_patience", "early_stopping_threshold", "preconditioner", "preconditioner_delta",
)  # fmt: skip

Tracker = Literal[
    "all",
    "none",
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]


def _without_owned(schema: dict[str, Any]) -> None:
    """Editors need not offer what is refused."""
    for name in OWNED_ELSEWHERE:
        del schema["properties"][name]


class TrainingSection(BaseModel):
    """Training arguments, by the names that trl gives them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra=_without_owned,
    )

    output_dir: str | None = None
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: int = -1
    learning_rate: Annotated[float, Field(ge=0)] = (
        0.0002  # QLoRA's rate for 7B and 13B models (arXiv 2305.14314, table 9)
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
        "greedy",
    ] = "linear"
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
        "adafactor",
        "adamw_anyprecision",
        "adamw_torch_4bit",
        "adamw_torch_8bit",
        "ademamix",
        "sgd",
        "adagrad",
        "adamw_bnb_8bit",
        "adamw_8bit",
        "ademamix_8bit",
        "lion_8bit",
        "lion_32bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "rmsprop",
        "rmsprop_bnb",
        "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit",
        "galore_adamw",
        "galore_adamw_8bit",
        "galore_adafactor",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "lomo",
        "adalomo",
        "grokadamw",
        "schedule_free_radam",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "apollo_adamw",
        "apollo_adamw_layerwise",
        "stable_adamw",
    ] = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-08
    optim_target_modules: str | list[str] | None = None
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    average_tokens_across_devices: bool = True
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing_factor: float = 0.0
    bf16: bool | None = None
    fp16: bool = False
    bf16_full_eval: bool = False
    fp16_full_eval: bool = False
    tf32: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    use_liger_kernel: bool = False
    liger_kernel_config: dict[str, bool] | None = None
    use_cache: bool = False
    neftune_noise_alpha: float | None = None
    torch_empty_cache_steps: int | None = None
    auto_find_batch_size: bool = False
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    logging_steps: Annotated[float, Field(gt=0)] = 10
    logging_first_step: bool = False
    log_on_each_node: bool = True
    logging_nan_inf_filter: bool = False  # a NaN must be seen
    include_num_input_tokens_seen: str | bool = "no"
    log_level: str = "passive"
    log_level_replica: str = "warning"
    disable_tqdm: bool | None = None
    report_to: Tracker | list[Tracker] | None = "none"
    run_name: str | None = None
    project: str = "huggingface"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | Literal[False] | None = None
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    prediction_loss_only: bool = False
    eval_on_start: bool = False
    eval_do_concat_batches: bool = True
    eval_use_gather_object: bool = False
    eval_accumulation_steps: int | None = None
    include_for_metrics: list[str] = []
    batch_eval_metrics: bool = False
    save_only_model: bool = False
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: float = 500
    save_on_each_node: bool = False
    save_total_limit: int | None = None
    enable_jit_checkpoint: bool = False
    push_to_hub: bool = False
    hub_token: str | None = None
    hub_private_repo: bool | None = None
    hub_model_id: str | None = None
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "every_save"
    hub_always_push: bool = False
    hub_revision: str | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    ignore_data_skip: bool = False
    restore_callback_states_from_checkpoint: bool = False
    full_determinism: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    data_seed: int | None = None
    use_cpu: bool = False
    accelerator_config: dict[str, Any] | str | None = None
    parallelism_config: Any | None = None
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_multiprocessing_context: str | None = None
    dataloader_in_order: bool = True
    remove_unused_columns: bool = True
    label_names: list[str] | None = None
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"] = "random"
    length_column_name: str = "length"
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    ddp_backend: str | None = None
    ddp_timeout: int = 1800
    fsdp: str | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None
    debug: str | list[Literal["underflow_overflow", "tpu_metrics_debug"]] = ""
    skip_memory_metrics: bool = True
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    resume_from_checkpoint: str | None = None
    local_rank: int = -1
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    chat_template_path: str | None = None
    dataset_text_field: str = "text"
    dataset_kwargs: dict[str, Any] | str | None = None
    dataset_num_proc: int | None = None
    eos_token: str | None = None
    max_length: Annotated[int | None, Field(ge=1)] = 1024
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    shuffle_dataset: bool = False
    packing: bool = False
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    padding_free: bool = False
    pad_to_multiple_of: int | str | None = "auto"
    eval_packing: bool | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    loss_type: Literal["nll", "dft", "chunked_nll"] = "nll"
    activation_offloading: bool = False
    pad_token: str | None = None

    # Not in SFTConfig: stop when metric_for_best_model has not improved for this many evaluations.
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    # Not in SFTConfig: multiplies the adapters' gradients by the inverse of (metric + delta·I), arXiv 2402.02347.
    preconditioner: Literal["riemannian"] | None = None
    preconditioner_delta: Annotated[float, Field(ge=1e-8)] = 0.01

    @field_validator(*OWNED_ELSEWHERE, mode="before")
    @classmethod
    def _owned_elsewhere(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if value != cls.model_fields[name].default:
            raise ValueError(f"cannot be set here: {OWNED_ELSEWHERE[name]}")
        return value
