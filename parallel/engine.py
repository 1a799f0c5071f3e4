"""A plain model in, a sharded engine out: DeepSpeed is driven here, and its optimizer state is read and set here.

The order in which a model is changed, written down once: empty parameters on the device (partitioned as they are made
under ZeRO 3), recomputation, `deepspeed.initialize`. Values come afterwards, from `Engine.load_state`: from the init
function on a fresh run, from a checkpoint on a resumed one.
"""

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from parallel.checkpoint import CheckpointError
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.optim import OptimConfig, build_adamw, gate
from parallel.own_time import OwnTime
from parallel.recompute import apply_recompute
from parallel.state import EXP_AVG, EXP_AVG_SQ, WEIGHT, Fragment, StateSource

log = logging.getLogger(__name__)

COMPARED = 2**22  # elements of a weight that are compared at a time


@dataclass(frozen=True)
class UpdateResult:
    grad_norm: float  # global, before clipping; inf when it was not finite
    made: bool  # False: left out on all ranks, because gradients were not finite or at the caller's wish


class Engine:
    """A DeepSpeed engine with the few operations that the train loop and the checkpoint need."""

    def __init__(self, ds: Any, mesh: Mesh, cfg: ParallelConfig) -> None:
        self.ds = ds
        self.mesh = mesh
        self.zero_stage = cfg.zero_stage
        self.offloaded = cfg.offload_optimizer != "none"
        self.module: nn.Module = ds.module
        self.parameters = dict(self.module.named_parameters())
        self.shapes = {
            name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()
        }  # whole shapes, also under ZeRO 3
        self.trained = frozenset(name for name, p in self.parameters.items() if p.requires_grad)
        self._veto: Callable[[float], bool] = lambda grad_norm: False
        self._vetoed: bool | None = None  # None: not asked yet in this update
        gate(self._base_optimizer(), self._allowed)
        self.own_time = OwnTime(self.module, self.zero_stage)

    # -- training ---------------------------------------------------------------------------------------------------

    def train_mode(self) -> None:
        self.ds.train()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """No dropout and no gradients; gives the module to call. Under ZeRO 3 all ranks must make the same calls."""
        self.ds.eval()
        try:
            with torch.no_grad():
                yield self.ds
        finally:
            self.ds.train()

    def forward(self, tokens: Tensor, targets: Tensor, *more: Tensor) -> Tensor:
        """Sum of the token losses in nats, fp32; all are (B, T) on the device.

        more: documents as Transformer.forward's, and what else the model takes.
        """
        return self.ds(tokens, targets, *more)

    def backward(self, loss_sum: Tensor, n_targets: int) -> None:
        """Add this micro-batch's share of the gradient of the mean over `n_targets`, the targets of the whole step.

        DeepSpeed averages over ranks, which would weight a rank with few targets like one with many; multiplying by
        the number of ranks turns its average into the sum that a token-weighted mean needs.
        """
        self.ds.backward(loss_sum * (self.mesh.dp_size / n_targets), scale_wrt_gas=False)
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()  # counts the micro-batch; the update comes with `update`

    def update(self, lr: float, veto: Callable[[float], bool] = lambda grad_norm: False) -> UpdateResult:
        """Clip, and take one AdamW step at learning rate `lr`, after the last micro-batch of the step.

        veto: given the global gradient norm before clipping; True leaves the update out. All ranks must answer alike.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        skipped, self._veto, self._vetoed = self.ds.skipped_steps, veto, None
        self.ds.step()
        norm = self.ds.get_global_grad_norm()
        norm = float(norm) if norm is not None else 0.0
        finite = self.ds.skipped_steps == skipped
        if not finite and self.offloaded and self.zero_stage < 3:
            # DeepSpeed 0.19.8 keeps the sum that it could not use, and adds all later gradients to its NaN.
            gradients = self.ds.optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))
        made = finite and not self._vetoed
        return UpdateResult(norm if math.isfinite(norm) else math.inf, made)

    def _allowed(self) -> bool:
        """Asked by the optimizer, once for each part that DeepSpeed updates on its own; the first answer holds for all."""
        if self._vetoed is None:
            self._vetoed = self._veto(float(self.ds.optimizer._global_grad_norm))
        return not self._vetoed

    # -- state ------------------------------------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """All state of this rank, in the parameters' order. Under ZeRO 0 that is everything."""
        _create_moments(self._base_optimizer(), self._masters())
        return [fragment for name, p in self.parameters.items() for fragment in self._fragments_of(name, p)]

    def owned_fragments(self) -> list[Fragment]:
        """The fragments that this rank writes: each element of each parameter's state belongs to exactly one rank."""
        owned = []
        for f in self.fragments():
            if self.zero_stage == 3 or (self.zero_stage > 0 and f.name in self.trained):
                owned.append(f)
                continue
            n = f.tensor.numel()
            start, stop = n * self.mesh.dp_rank // self.mesh.dp_size, n * (self.mesh.dp_rank + 1) // self.mesh.dp_size
            if stop > start:
                owned.append(Fragment(f.name, f.kind, start, f.tensor[start:stop]))
        return owned

    @torch.no_grad()
    def load_state(self, source: StateSource, adam_steps: int, loss_scaler: dict | None = None) -> None:
        """Set this rank's weights and moments from `source`, whatever topology that came from.

        Raises CheckpointError on all ranks where one of them could not read its part; the state is of no use then.
        """
        wrong = ""
        try:
            for f in self.fragments():
                f.tensor.copy_(source.read(f.name, f.kind, f.start, f.start + f.tensor.numel()))
        except (CheckpointError, OSError, SafetensorError) as error:
            wrong = f"rank {self.mesh.rank}: {error}"
        if told := next(filter(None, self.mesh.gather(wrong)), None):
            raise CheckpointError(told)
        for state in self._base_optimizer().state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), float(adam_steps))
        self._refresh_model()
        self._set_loss_scaler(loss_scaler)

    @torch.no_grad()
    def differs_from(self, source: StateSource) -> str | None:
        """Which weight that the model computes with is not what `source` says, rounded to its format; None for none.

        All ranks get the same answer. It looks at what a forward pass reads, which is not what load_state sets; of what
        ranks hold alike (ZeRO 0 to 2) each looks at its part, and parallel/replicas.py compares the rest.
        """
        wrong = None
        for name, p in self.parameters.items():
            for start, here in self._computing(name, p):
                for at in range(0, here.numel(), COMPARED):
                    part = here[at : at + COMPARED]
                    said = source.read(name, WEIGHT, start + at, start + at + part.numel())
                    if wrong is None and not torch.equal(said.to(part.device, part.dtype), part):
                        wrong = f"the model's {name} is not what was loaded, on rank {self.mesh.rank}"
        return next(filter(None, self.mesh.gather(wrong)), None)

    def _computing(self, name: str, p: Any) -> Iterator[tuple[int, Tensor]]:
        """Stretches, (place of the first element, 1-D), of the memory that a forward pass takes a parameter from."""
        n, rank, size = math.prod(self.shapes[name]), self.mesh.dp_rank, self.mesh.dp_size
        start, stop = n * rank // size, n * (rank + 1) // size
        if p.numel() == n:  # whole here: always but under ZeRO 3, where small ones are
            yield start, p.detach().view(-1)[start:stop]
        if self.zero_stage == 3:
            start = min(p.partition_numel() * rank, n)
            yield start, p.ds_tensor.detach().view(-1)[: n - start]  # the last is padded

    @property
    def adam_steps(self) -> int:
        """Updates that AdamW has made; skipped ones are not among them."""
        states = list(self._base_optimizer().state.values())
        return int(states[0]["step"]) if states else 0

    def loss_scaler_state(self) -> dict | None:
        """The dynamic loss scale of fp16, None in other formats."""
        scaler = self._loss_scaler()
        if scaler is None:
            return None
        return {key: getattr(scaler, key) for key in _SCALER_FIELDS if hasattr(scaler, key)}

    def _set_loss_scaler(self, state: dict | None) -> None:
        scaler = self._loss_scaler()
        if scaler is None or state is None:  # another precision than the checkpoint's: it starts from the default scale
            return
        for key, value in state.items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)

    def _loss_scaler(self) -> Any:
        if not self.ds.fp16_enabled():
            return None
        optimizer = self.ds.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer under DeepSpeed's wrappers."""
        optimizer = self.ds.optimizer
        return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that AdamW updates: whole parameters (ZeRO 0) or flat partitions of many (ZeRO 1 to 3).

        They are on the host where the optimizer is offloaded, and AdamW's moments with them.
        """
        optimizer = self.ds.optimizer
        if self.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._base_optimizer().param_groups for p in group["params"]]

    def _fragments_of(self, name: str, p: Any) -> Iterator[Fragment]:
        if name not in self.trained:
            yield from self._frozen(name, p)
            return
        if self.zero_stage == 0:
            master = self._zero0_masters().get(p, p)
            start, part = 0, slice(None)
        elif self.zero_stage == 3:
            z3 = p._z3_optimizer
            group, offset, _ = z3.grad_position[z3.get_param_id(p)]
            master = z3.fp32_partitioned_groups_flat[group]
            size = p.partition_numel()
            start = min(size * self.mesh.dp_rank, math.prod(self.shapes[name]))
            stop = min(start + size, math.prod(self.shapes[name]))  # the last partition is padded
            part = slice(offset, offset + stop - start)
        else:
            mapping = p._hp_mapping  # None: no element of it is on this rank
            if mapping is None:
                return
            master = self._masters()[mapping.param_group_index]
            start = mapping.lp_fragment_address.start
            address = mapping.hp_fragment_address
            part = slice(address.start, address.start + address.numel)
        flat = master.detach().view(-1)
        if flat[part].numel() == 0:
            return
        yield Fragment(name, WEIGHT, start, flat[part])
        state = self._base_optimizer().state[master]
        for kind in (EXP_AVG, EXP_AVG_SQ):
            yield Fragment(name, kind, start, state[kind].view(-1)[part])

    def _frozen(self, name: str, p: Any) -> Iterator[Fragment]:
        """Of a parameter that is not trained, and of which the optimizer knows nothing."""
        if self.zero_stage < 3:  # every rank has it whole
            yield Fragment(name, WEIGHT, 0, p.detach().view(-1))
            return
        start = p.partition_numel() * self.mesh.dp_rank
        here = p.ds_tensor.detach().view(-1)[: max(0, math.prod(self.shapes[name]) - start)]  # the last is padded
        if here.numel():
            yield Fragment(name, WEIGHT, start, here)

    def _zero0_masters(self) -> dict[nn.Parameter, Tensor]:
        """fp32 copies of bf16 or fp16 parameters; empty in fp32, where the parameters are the masters."""
        optimizer = self.ds.optimizer
        if not hasattr(optimizer, "fp32_groups"):
            return {}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def _refresh_model(self) -> None:
        """Bring the weights that the model computes with to the values of the fp32 masters."""
        optimizer = self.ds.optimizer
        if self.zero_stage == 0:
            for low, high in self._zero0_masters().items():
                low.data.copy_(high.data)
        elif self.zero_stage == 3:
            for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[i].data.copy_(master.data)
                optimizer._unflatten_partitioned_parameters(i)
            if optimizer.persistent_parameters:  # small ones that are kept whole on every rank
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        else:
            optimizer.update_lp_params()

    def close(self) -> None:
        self.ds.destroy()


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _create_moments(optimizer: torch.optim.Optimizer, masters: list[Tensor]) -> None:
    """Give AdamW its state before its first step makes it; DeepSpeed links to it then."""
    for master in masters:
        if "exp_avg" not in optimizer.state[master]:
            optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, dtype=torch.float32).detach(),
                "exp_avg_sq": torch.zeros_like(master, dtype=torch.float32).detach(),
            }


def parallelize(
    build_model: Callable[[], nn.Module],
    cfg: ParallelConfig,
    optim: OptimConfig,
    ds_config: dict[str, Any],
    mesh: Mesh,
) -> Engine:
    """Build the model with empty parameters where they belong and wrap it with DeepSpeed.

    build_model: makes the model without giving its parameters values; its blocks are `model.blocks`.
    ds_config: what `deepspeed_config` returned.    Parameters have no meaning until `Engine.load_state`.
    """
    with contextlib.ExitStack() as stack:
        if cfg.zero_stage == 3:
            # The format comes from ds_config. zero.Init's dtype argument must not be given: where fp16 is not to be had,
            # 0.19.8 reads any dtype as bf16, and an fp32 run would compute in bf16 without a word.
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=ds_config))
        else:
            stack.enter_context(torch.device(mesh.device))
        model = build_model()
    if cfg.zero_stage < 3:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()  # DeepSpeed copies and sums what is there; uninitialised memory could hold NaN
    apply_recompute(model.blocks, cfg)  # type: ignore[arg-type]
    checked = cfg.zero_stage == 0 and cfg.precision == "fp32"
    if checked:
        ds_config = {**ds_config, "gradient_clipping": 0.0}  # CheckedAdamW clips
    optimizer = build_adamw(model.named_parameters(), optim, checked=checked)
    with contextlib.redirect_stdout(io.StringIO()) as said:  # DeepSpeed prints its memory at each of its own steps
        ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    log.debug("%s", said.getvalue())
    return Engine(ds, mesh, cfg)
