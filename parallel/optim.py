"""AdamW, the learning-rate schedule and which parameters decay. The schedule is a function of the step, not a state."""

import math
from collections.abc import Callable, Iterable

import torch

from parallel.config import OptimConfig


def lr_at(step: int, steps: int, cfg: OptimConfig) -> float:
    """Learning rate of update `step` (the first is 0) of `steps`.

    Warm-up is linear and reaches the peak at update `warmup_steps`; the last update runs at about min_lr_ratio * lr.
    cosine: SGDR's half period (arXiv:1608.03983); wsd: warm-up, stable, decay (arXiv:2404.06395).
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    if cfg.schedule == "constant":
        return cfg.lr
    start = steps - cfg.decay_steps if cfg.schedule == "wsd" else cfg.warmup_steps
    progress = min(max((step - start) / max(steps - start, 1), 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share)


class CheckedAdamW(torch.optim.AdamW):
    """AdamW that measures the gradient norm, clips to it and skips an update whose gradients are not finite.

    `allowed` is asked between the norm and the update, which is left out where it says no.

    For ZeRO 0 in fp32, where DeepSpeed steps the plain optimizer: there it clips but lets NaN into every weight.
    DeepSpeed reads `overflow` and `_global_grad_norm` after each step from whichever optimizer it drives.
    """

    def __init__(self, groups: list[dict], grad_clip: float, **kwargs: object) -> None:
        super().__init__(groups, **kwargs)  # type: ignore[arg-type]
        self.grad_clip = grad_clip
        self.overflow = False
        self.allowed: Callable[[], bool] = lambda: True
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow or not self.allowed():
            return
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm, foreach=True)
        super().step()


def gate(optimizer: torch.optim.Optimizer, allowed: Callable[[], bool]) -> None:
    """Have `allowed` asked before each part of an update, once the gradient norm is known; the update is made if it says so.

    The method is changed on the instance because DeepSpeed admits optimizers by their exact type.
    """
    if isinstance(optimizer, CheckedAdamW):
        optimizer.allowed = allowed
        return
    step = optimizer.step
    optimizer.step = lambda *args, **kwargs: step(*args, **kwargs) if allowed() else None  # type: ignore[assignment, method-assign]


def build_adamw(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], cfg: OptimConfig, *, checked: bool
) -> torch.optim.AdamW:
    """AdamW over two groups of what is trained: matrices (two dimensions or more) decay; norms, biases and other vectors
    do not."""
    decay: list[torch.nn.Parameter] = []
    keep: list[torch.nn.Parameter] = []
    for parameter in (parameter for _, parameter in named_parameters if parameter.requires_grad):
        ndim = len(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO 3 the tensor itself is empty
        (decay if ndim >= 2 else keep).append(parameter)
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "fused": True}
    if checked:
        return CheckedAdamW(groups, cfg.grad_clip, **options)
    return torch.optim.AdamW(groups, **options)  # type: ignore[arg-type]
