"""The `model` section of a recipe: what the network is, and what follows from that by arithmetic."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, model_validator

DEFAULT_ROPE_THETA = 10_000.0


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{value} is a truth value; expected a number")
    return value


# YAML 1.1 reads 1e-5 (no dot) as text, so text that spells a number is taken for one; true and false are not.
Number = Annotated[float, BeforeValidator(_refuse_bool)]
PositiveNumber = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, gt=0)]


class RopeScaling(BaseModel, frozen=True, extra="forbid"):
    """Llama 3.1's stretch of the rotary wavelengths: long ones by `factor`, short ones not, a ramp in between."""

    factor: Annotated[Number, Field(ge=1, allow_inf_nan=False)]  # how many times longer the longest wavelengths become
    low_freq_factor: PositiveNumber  # wavelengths over original_seq_len / low_freq_factor are stretched in full
    high_freq_factor: PositiveNumber  # wavelengths under original_seq_len / high_freq_factor stay as they are
    original_seq_len: Count  # tokens; the context before the stretch

    @model_validator(mode="after")
    def _ramp_has_a_width(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}; Llama 3.1 has 4 and 1"
            )
        return self


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """One decoder. The defaults are those of a Llama without grouped queries; recipes state what differs."""

    vocab_size: Count  # rows of the embedding and of the head
    seq_len: Count  # tokens; the longest sequence the model takes
    d_model: Count  # width of the residual stream
    n_layers: Count  # blocks
    n_heads: Count  # query heads in each block
    n_kv_heads: Count | None = None  # key/value heads in each block; None: as many as n_heads
    head_dim: Count | None = None  # width of one head; None: d_model // n_heads
    d_ff: Count  # hidden width of the MLP
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # before attention, before the MLP, and at the end
    norm_eps: PositiveNumber = 1e-5  # added to the mean square (rmsnorm) or the variance (layernorm)
    positions: Literal["rope", "learned"] = "rope"  # rotary in every block, or a table added to the embedding
    rope_theta: PositiveNumber = DEFAULT_ROPE_THETA  # base of the rotary wavelengths
    rope_scaling: RopeScaling | None = None  # None: the wavelengths as rope_theta gives them
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu is the tanh approximation, as in GPT-2
    qk_norm: StrictBool = False  # a norm over head_dim on queries and keys, before rotary (Qwen3)
    attention_bias: StrictBool = False  # biases on wq, wk and wv
    attention_output_bias: StrictBool = False  # bias on wo
    mlp_bias: StrictBool = False  # biases on all of the MLP's projections
    tie_embeddings: StrictBool = False  # the head uses the embedding's own parameter
    dropout: Annotated[Number, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0  # probability; GPT-2's three places
    init_std: PositiveNumber = 0.02  # standard deviation of freshly drawn matrices
    scale_residual_init: StrictBool = True  # draw wo and w_down with init_std / sqrt(2 * n_layers) (GPT-2)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ModelConfig":
        if self.head_dim is None and self.d_model % self.n_heads:
            below = self.d_model // self.n_heads * self.n_heads
            either = f"{below} or {below + self.n_heads}" if below else f"{self.n_heads}"
            raise ValueError(
                f"model.d_model={self.d_model} is not a multiple of model.n_heads={self.n_heads}; "
                f"use d_model {either}, or set model.head_dim"
            )
        if self.n_heads % self.kv_heads:
            divisors = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ValueError(
                f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads={self.n_kv_heads}; "
                f"n_kv_heads can be one of {divisors}"
            )
        if self.positions == "rope" and self.dim_per_head % 2:
            raise ValueError(
                f"model.positions='rope' turns pairs of features and needs an even head width, got "
                f"{self.dim_per_head}; set model.head_dim to an even number, or positions to 'learned'"
            )
        if self.positions == "learned" and self.rope_scaling is not None:
            raise ValueError("model.rope_scaling has no effect with model.positions='learned'; remove it")
        if self.positions == "learned" and self.rope_theta != DEFAULT_ROPE_THETA:
            raise ValueError(
                f"model.rope_theta={self.rope_theta} has no effect with model.positions='learned'; remove it"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads in each block, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def dim_per_head(self) -> int:
        """Width of one head, resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def n_matrix_params(self) -> int:
        """Parameters that each token is multiplied by: every matrix of the blocks, and the head (tied or not).

        Without the token and position embeddings, which are looked up, and without norms and biases.
        """
        attention = 2 * self.d_model * self.dim_per_head * (self.n_heads + self.kv_heads)  # wq and wo, wk and wv
        mlp = (3 if self.mlp == "swiglu" else 2) * self.d_model * self.d_ff
        return self.n_layers * (attention + mlp) + self.vocab_size * self.d_model

    @property
    def n_params(self) -> int:
        """All parameters, a shared one counted once."""

        def norm(width: int) -> int:
            return width * (2 if self.norm == "layernorm" else 1)

        block = 2 * norm(self.d_model)
        if self.qk_norm:
            block += 2 * norm(self.dim_per_head)
        if self.attention_bias:
            block += self.dim_per_head * (self.n_heads + 2 * self.kv_heads)
        if self.attention_output_bias:
            block += self.d_model
        if self.mlp_bias:
            block += self.d_model + self.d_ff * (2 if self.mlp == "swiglu" else 1)
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.d_model  # tied: counted as the head
        positions = self.seq_len * self.d_model if self.positions == "learned" else 0
        return self.n_matrix_params + self.n_layers * block + norm(self.d_model) + embedding + positions

    def flops_per_token(self, seq_len: int) -> int:
        """Floating point operations of forward and backward for one token of a `seq_len` sequence.

        6 N + 12 L H Q T as in PaLM (arXiv:2204.02311, appendix B), N being n_matrix_params. Attention is counted in
        full, without a discount for the causal half, so that utilisation compares with what others report.
        """
        attention = 12 * self.n_layers * self.n_heads * self.dim_per_head * seq_len
        return 6 * self.n_matrix_params + attention
