"""The `parallel`, `optim` and `checkpoint` sections of a recipe. Importing them costs neither torch nor DeepSpeed."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

# DeepSpeed's top-level keys (0.19.8). DeepSpeed ignores a key that it does not know, so a typo would be silent.
# OWNED ones are written by Longhaul from its own config; the rest may be passed through `parallel.deepspeed`.
OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation is derived)",
    "managed_gradient_accumulation": "nothing: the train loop relies on its default",
    "optimizer": "the optim section",
    "scheduler": "optim.schedule",
    "fp16": "parallel.precision",
    "bf16": "parallel.precision",
    "data_types": "parallel.grad_accum_dtype",
    "gradient_clipping": "optim.grad_clip",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "checkpoint": "the checkpoint section",
    "tensorboard": "the log section",
    "prescale_gradients": "nothing: losses are weighted by tokens before DeepSpeed sees them",
    "gradient_predivide_factor": "nothing: losses are weighted by tokens before DeepSpeed sees them",
    "gradient_allreduce_op": "nothing: losses are weighted by tokens before DeepSpeed sees them",
    "zero_force_ds_cpu_optimizer": "nothing: offloaded state is updated by Longhaul's own AdamW",
    "load_universal_checkpoint": "nothing: a checkpoint is read at any world size and ZeRO stage",
}
PASS_KEYS = frozenset(
    {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "comms_logger",
        "flops_profiler",
        "wall_clock_breakdown",
        "memory_breakdown",
        "timers",
        "steps_per_print",
        "dump_state",
        "disable_allgather",
        "disable_python_gc",
        "aio",
        "compile",
        "log_level",
    }
)
# Of the zero_optimization section, what is Longhaul's own or would need wiring that is not there.
OWNED_ZERO_KEYS = {
    "stage": "parallel.zero_stage",
    "offload_optimizer": "parallel.offload_optimizer",
    "offload_param": "parallel.offload_param",
    "cpu_offload": "parallel.offload_optimizer",
    "cpu_offload_param": "parallel.offload_param",
    "cpu_offload_use_pin_memory": "parallel.offload_optimizer or parallel.offload_param",
    "zenflow": "nothing yet: it needs another optimizer",
    "elastic_checkpoint": "the checkpoint section",
    "compute_grad_norm": "nothing: the norm is needed to notice a bad step",
}


class ParallelConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How the model, its gradients and its optimizer state are divided, and in which number formats."""

    zero_stage: Literal[0, 1, 2, 3] = 1  # 0 replicates; 1 shards optimizer state; 2 gradients too; 3 weights too
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"  # of weights and activations; bf16 and fp16 keep fp32 masters
    # Gradients of micro-batches are summed in this format. None: fp32 where DeepSpeed can (ZeRO 1 to 3), else `precision`.
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    # cpu: fp32 weights and moments are in host memory and updated there; the weights that compute are fetched from it
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_param: Literal["none", "cpu"] = "none"
    activation_checkpointing: Literal["none", "full", "every_k", "selective"] = "none"
    checkpoint_every_k: PositiveInt = 2  # with every_k: recompute each k-th block
    timeout_s: int = Field(1800, gt=0, le=7 * 86_400)  # a collective that takes longer ends the run
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # further DeepSpeed keys, checked, passed on as they are

    @model_validator(mode="after")
    def _grad_accum_dtype_is_possible(self) -> Self:
        wanted = self.grad_accum_dtype
        if wanted is None or wanted == self.precision:
            return self
        if self.zero_stage == 0:
            raise ValueError(
                f"grad_accum_dtype={wanted} with precision={self.precision} needs parallel.zero_stage 1, 2 or 3; "
                f"DeepSpeed's stage 0 sums gradients in {self.precision} only"
            )
        if wanted != "fp32":
            raise ValueError(f"grad_accum_dtype={wanted} with precision={self.precision}; use fp32 or {self.precision}")
        return self

    @model_validator(mode="after")
    def _fp16_has_its_loss_scale(self) -> Self:
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError(
                "precision=fp16 with zero_stage=0: DeepSpeed divides gradients by a loss scale there that it never "
                "applied, and trains on next to nothing; use zero_stage 1, 2 or 3"
            )
        return self

    @field_validator("offload_optimizer", "offload_param", mode="before")
    @classmethod
    def _nvme_is_not_wired(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError(
                f"got {value!r}; checkpoints are written from memory, where state that is offloaded to NVMe is not to be "
                "found; use cpu"
            )
        return value

    @model_validator(mode="after")
    def _there_is_something_to_offload(self) -> Self:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer={self.offload_optimizer} with zero_stage=0; DeepSpeed offloads the shards of ZeRO 1, 2 "
                "and 3: set parallel.zero_stage to one of them (they need no second rank), or offload_optimizer to none"
            )
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_param={self.offload_param} with zero_stage={self.zero_stage}; DeepSpeed offloads the shards of "
                "ZeRO 3: set parallel.zero_stage to 3, or offload_param to none"
            )
        return self

    @property
    def resolved_grad_accum_dtype(self) -> str:
        if self.grad_accum_dtype is not None:
            return self.grad_accum_dtype
        return "fp32" if self.zero_stage > 0 else self.precision


class OptimConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """AdamW (arXiv:1711.05101) with warm-up and decay."""

    lr: float = Field(3e-4, gt=0, allow_inf_nan=False)  # peak learning rate, reached after warm-up
    min_lr_ratio: float = Field(0.1, ge=0, le=1, allow_inf_nan=False)  # last learning rate as a share of the peak
    warmup_steps: NonNegativeInt = 100  # optimizer steps; 0 means no warm-up
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_steps: NonNegativeInt = 0  # wsd only: the last so many steps decay, linearly
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)  # on matrices only, decoupled
    beta1: float = Field(0.9, ge=0, lt=1, allow_inf_nan=False)
    beta2: float = Field(0.95, ge=0, lt=1, allow_inf_nan=False)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    grad_clip: float = Field(1.0, ge=0, allow_inf_nan=False)  # largest global gradient norm; 0 means no clipping

    @model_validator(mode="after")
    def _decay_steps_belong_to_wsd(self) -> Self:
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"schedule={self.schedule} with decay_steps={self.decay_steps}; "
                "wsd needs decay_steps of at least 1 and no other schedule takes it"
            )
        return self


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When checkpoints are written and how many stay."""

    every: PositiveInt = 1000  # optimizer steps between saves; one more is written when a run ends or is stopped
    retry_every: PositiveInt = 50  # after a save that failed: steps to the next try, where that is sooner
    keep: NonNegativeInt = 3  # newest checkpoints that stay, beside the one that a start was resumed from; 0 keeps all
    keep_every: PositiveInt | None = None  # besides: those of steps that this divides
    # besides: the first of each so many hours of training, evaluation and stops not counted
    keep_every_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _something_is_retired(self) -> Self:
        if not self.keep and (self.keep_every is not None or self.keep_every_hours is not None):
            raise ValueError(
                f"keep=0 keeps all, so that keep_every={self.keep_every} and keep_every_hours={self.keep_every_hours} have "
                "no effect; leave them out, or set keep to the number of newest checkpoints that stay"
            )
        return self
