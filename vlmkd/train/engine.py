"""DeepSpeed around one task; only this module imports it, and only for a run."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd import distributed
from vlmkd.config import RunConfig, merged, require
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_object
from vlmkd.tensor_files import read_torch
from vlmkd.train.task import Task

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TAG = "deepspeed"


def batch_triple(cfg: RunConfig, world_size: int) -> tuple[int, int]:
    """Micro-batch per rank and accumulation steps that make up `cfg.batch_size`."""
    micro = cfg.micro_batch_size or cfg.batch_size // world_size
    unit = max(1, cfg.micro_batch_size) * world_size
    lower, rest = cfg.batch_size // unit * unit, cfg.batch_size % unit
    of = f"micro_batch_size x ranks = {micro} x {world_size} =" if cfg.micro_batch_size else "the ranks ="
    near = f"{lower} or {lower + unit}" if lower else unit
    told = f"is {cfg.batch_size}, which is no multiple of {of} {unit}; nearest valid: batch_size={near}"
    require(not rest, "batch_size", told)
    return micro, cfg.batch_size // (micro * world_size)


def deepspeed_json(cfg: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: generated, or the user's file, its "auto" values filled in."""
    micro, accumulation = batch_triple(cfg, world_size)
    given = cfg.deepspeed
    alone = world_size == 1 and given.precision == "fp32" and given.offload == "none"
    zero: dict[str, Any] = {"stage": given.zero_stage if given.zero_stage >= 0 else int(not alone)}
    if given.offload != "none":
        place: dict[str, Any] = {"device": given.offload, "pin_memory": torch.cuda.is_available()}
        place |= {"nvme_path": given.nvme_path} if given.nvme_path else {}
        zero |= {"offload_optimizer": place} | ({"offload_param": place} if zero["stage"] == 3 else {})
    config: dict[str, Any] = {
        "train_batch_size": cfg.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": cfg.optim.clip_grad_norm,
        "zero_optimization": zero,
        **_half(PRECISIONS[given.precision]),
        "steps_per_print": 2**31 - 1,  # the run's own log speaks
    }
    if cfg.optim.name == "sgd":
        config["zero_allow_untested_optimizer"] = True  # tests/multiproc compares it with plain torch
    if given.file:
        config = _fill_auto(read_object(given.file, "config field deepspeed.file:"), config, given.file)
    config = merged(config, given.extra)
    for key in ("optimizer", "scheduler"):
        require(key not in config, "deepspeed", f"brings its own {key}, which would be ignored; set optim")
    # Without ZeRO, DeepSpeed 0.19's half-precision optimisers begin with a step of their own.
    sections = (config.get(name) for name in ("bf16", "fp16", "zero_optimization"))
    bf16, fp16, zero = (section if isinstance(section, dict) else {} for section in sections)
    plain = not (bf16.get("enabled") or fp16.get("enabled") or "offload_optimizer" in zero)
    told = "is 0, which works in fp32 and without offload only; use 1"
    require(plain or zero.get("stage", 0) != 0, "deepspeed.zero_stage", told)
    return config


def _half(dtype: torch.dtype) -> dict[str, Any]:
    return {name: {"enabled": dtype is PRECISIONS[name]} for name in ("bf16", "fp16")}


def check_machine(cfg: RunConfig) -> None:
    """Refuse what this machine cannot do."""
    precision, gpu, field = cfg.deepspeed.precision, torch.cuda.is_available(), "deepspeed.precision"
    require(precision != "fp16" or gpu, field, "is fp16, which needs a GPU; use bf16 or fp32")
    fits = precision != "bf16" or not gpu or torch.cuda.is_bf16_supported()
    require(fits, field, "is bf16, which this GPU lacks; use fp16 or fp32")


class Engine:
    """Trains `task.student`, in whose place it puts DeepSpeed's wrapper."""

    def __init__(self, task: Task, cfg: RunConfig) -> None:
        self.task = task
        self.dtype = PRECISIONS[cfg.deepspeed.precision]
        config = deepspeed_json(cfg, distributed.world_size())
        self._scalars = {name for name, p in task.student.named_parameters() if p.ndim == 0}
        _give_dimensions(task.student)
        groups = [
            {"peak_lr": group.get("lr", cfg.optim.lr), "schedule": True, **group}
            for group in task.param_groups(cfg.optim)
        ]
        if any(map(_is_expert, task.student.parameters())):
            from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

            groups = split(groups)
        import deepspeed

        if cfg.deepspeed.extra or cfg.deepspeed.file:
            _check_json(config)
        optimizer = _optimizer(groups, cfg)
        engine, self.optimizer, _, _ = deepspeed.initialize(
            model=task.student, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.zero_stage = int(engine.zero_optimization_stage())
        self._norm = math.nan
        if not self.zero_stage:
            engine.clip_fp32_gradients = lambda: None  # `_clip` does it, and keeps the norm
            engine.enable_backward_allreduce = distributed.world_size() > 1  # it copies, even for one rank
        # DeepSpeed's own reader runs what a file names, and a run folder may come from anybody.
        engine.checkpoint_engine.load = _read_state
        self._engine = task.student = engine
        self.device: torch.device = engine.device
        self.module: nn.Module = engine.module  # the student without its wrapper
        self.backward: Callable[[Tensor], object] = engine.backward
        self._read_masters()

    def set_lr(self, factor: float) -> float:
        """Give every scheduled group `factor` times its peak; returns the first one's rate."""
        scheduled = [group for group in self.optimizer.param_groups if group["schedule"]]
        for group in scheduled:
            group["lr"] = group["peak_lr"] * factor
        return float(scheduled[0]["lr"]) if scheduled else 0.0

    def update(self) -> bool:
        """Count one micro-batch; True when it completed an optimiser step."""
        boundary = bool(self._engine.is_gradient_accumulation_boundary())
        if boundary and not self.zero_stage:
            self._norm = self._clip()
        self._engine.step()
        if boundary:
            self._clamp()
            self._read_masters()
        return boundary

    def grad_norm(self) -> float:
        """Gradient norm of the last optimiser step, before clipping."""
        norm = self._engine.get_global_grad_norm() if self.zero_stage else self._norm
        return math.nan if norm is None else float(norm)

    def _clip(self) -> float:
        """The gradients' norm; they are clipped as by ZeRO, where what no loss has touched has gradient 0."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return float(nn.utils.clip_grad_norm_(parameters, self._engine.gradient_clipping() or math.inf))

    @torch.no_grad()
    def _clamp(self) -> None:
        """Apply `task.bounds()` to the weights and this rank's part of the fp32 master weights."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        parameter: Any  # DeepSpeed hangs its own attributes on it
        for parameter, low, high in self.task.bounds():
            # Empty where ZeRO 3 has freed it; small parameters it keeps whole.
            parameter.data.clamp_(low, high)
            if hasattr(parameter, "ds_id"):
                local = safe_get_local_fp32_param(parameter)
                safe_set_local_fp32_param(parameter, local.clamp(low, high))
                parameter.ds_tensor.data.clamp_(low, high)
                continue
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:  # None: another rank holds this parameter's master weights
                mapping.get_hp_fragment().data.clamp_(low, high)

    def _read_masters(self) -> None:
        """Give the parameters of `task.masters()` the values that `master_value` reads; a collective."""
        if self.dtype is torch.float32:
            return
        from deepspeed.utils import safe_get_full_fp32_param

        parameter: Any
        for parameter in self.task.masters():
            parameter.master = safe_get_full_fp32_param(parameter)

    @staticmethod
    @contextmanager
    def whole_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, each rank has the complete parameters of `modules` and may call what it likes of them; a collective.

        Also under ZeRO 3 and with spread experts.
        """
        parts: list[Any] = [part for module in modules for part in module.modules()]
        with ExitStack() as stack:
            for part in parts:
                if hasattr(part, "whole_experts"):
                    stack.enter_context(part.whole_experts())
            parameters = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
            if parameters:
                import deepspeed

                stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
                stack.enter_context(_unhooked(parts))
            yield

    def student_weights(self) -> dict[str, Tensor] | None:
        """Complete fp32 state dict of the student on rank 0's CPU, None elsewhere; a collective."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        def whole(parameter: Tensor) -> Tensor:
            value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if value is None:
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    value = parameter.detach().float()
            return value.detach().float()

        full: dict[int, Tensor] = {}  # by identity, because parameters may be tied
        for parameter in self.module.parameters():
            if not _is_expert(parameter):
                value = whole(parameter)
                if distributed.is_main():
                    full[id(parameter)] = value.cpu().clone()
        weights: dict[str, Tensor] = {}
        for name, layer in self.module.named_modules():
            if hasattr(layer, "deepspeed_moe"):
                experts = all_experts(layer, whole)
                weights |= {f"{name}.{leaf}": value.cpu() for leaf, value in experts.items()}
        if not distributed.is_main():
            return None
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not _is_expert(value):
                weights[name] = full[id(value)] if id(value) in full else value.detach().cpu().clone()
        for name in self._scalars & weights.keys():
            weights[name] = weights[name].reshape(())
        return weights

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, bit for bit; nothing that a file carries is run."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        assert path is not None, f"checkpoint {folder} was checked"
        self._read_masters()

    def place_teacher(self, teacher: nn.Module, shard: bool) -> None:
        """Bring a frozen teacher to compute precision on this rank, or shard it by ZeRO stage 3."""
        teacher.to(self.dtype)
        if not shard:
            teacher.to(self.device)
            return
        _give_dimensions(teacher)
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **_half(self.dtype)}
        deepspeed.initialize(model=teacher, config=config, dist_init_required=False)


@contextmanager
def _unhooked(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, DeepSpeed does nothing around a call: it would free weights and want the call from all ranks."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    before = [(part, kind, getattr(part, kind)) for part in parts for kind in kinds]
    for part, kind, hooks in before:
        others = {key: hook for key, hook in hooks.items() if not hook.__module__.startswith("deepspeed.")}
        setattr(part, kind, OrderedDict(others))
    try:
        yield
    finally:
        for part, kind, hooks in before:
            setattr(part, kind, hooks)


def spread_experts(experts: Sequence[nn.Module], ranks: int, dim: int) -> nn.Module:
    """DeepSpeed-MoE without its router, with these experts, of which each of `ranks` ranks keeps its share.

    From tokens [S, D] and (experts [S, K], weights [S, K]) it makes their weighted sums [S, D], the first of a tuple; a token
    of weight 0 is not sent. A call is a collective.
    """
    from deepspeed.moe.layer import MoE

    with torch.random.fork_rng(devices=[]):  # the unused router draws
        layer = MoE(dim, experts[0], len(experts), ep_size=ranks)
    layer.deepspeed_moe.gate = _Slots(len(experts))
    first = distributed.rank() % ranks * layer.num_local_experts
    for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts, first):
        expert.load_state_dict(experts[number].state_dict())
    return layer


class _Slots(nn.Module):
    """In place of DeepSpeed's gate: where each routed token lies among those of its expert."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.group = count, None

    def _set_ep_group(self, group: Any) -> None:
        self.group = group

    def forward(self, x: Tensor, routed: tuple[Tensor, Tensor], *_: bool) -> tuple[Any, ...]:
        experts, weights = (part.T for part in routed)
        chosen = nn.functional.one_hot(experts, self.count) * (weights > 0).unsqueeze(-1)
        number = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        place = number.gather(-1, experts.unsqueeze(-1)).squeeze(-1) - 1
        room = chosen.sum((0, 1)).max()
        torch.distributed.all_reduce(room, torch.distributed.ReduceOp.MAX, group=self.group)
        return None, room, self.count, experts.where(weights > 0, -1), place, weights, None


@torch.no_grad()
def all_experts(layer: Any, value: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """`value` of all experts' parameters in a layer of `spread_experts`, each [E, ...], by name; a collective."""
    inner, found = layer.deepspeed_moe, {}
    own = inner.experts.deepspeed_experts
    for name, _ in own[0].named_parameters():
        mine = torch.stack([value(expert.get_parameter(name)) for expert in own])
        parts = [torch.empty_like(mine) for _ in range(layer.ep_size)]
        torch.distributed.all_gather(parts, mine, group=inner.ep_group)
        found[name] = torch.cat(parts)
    return found


def _is_expert(parameter: Any) -> bool:
    """Whether other ranks have others in its place (DeepSpeed's mark)."""
    return not getattr(parameter, "allreduce", True)


def _optimizer(groups: list[dict[str, Any]], cfg: RunConfig) -> torch.optim.Optimizer:
    optim = cfg.optim
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
    if cfg.deepspeed.offload == "none":
        return (torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam)(groups, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, **settings, adamw_mode=optim.name == "adamw")


def _give_dimensions(module: nn.Module) -> None:
    """Scalars become vectors, because DeepSpeed 0.19 cannot broadcast what has no dimensions."""
    for parameter in module.parameters():
        if parameter.ndim == 0:
            parameter.data = parameter.data.reshape(1)


def _read_state(path: str, map_location: Any = None) -> Any:
    """A file of DeepSpeed's checkpoint, on the CPU, from where DeepSpeed copies."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]
    return read_torch(path, what="checkpoint file", plain=plain)


def start_ranks() -> None:
    """Join the process group, for one process too."""
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns
    # The restricted reader where DeepSpeed calls torch.load; torch refuses to be asked for both.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        import deepspeed
    except ImportError:
        raise UserError("training needs the package deepspeed: pip install deepspeed") from None
    # For inference on CPUs; building it takes a C++ compiler and half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(distributed.environment())
    if gpu:
        torch.cuda.set_device(distributed.device())
    backend = "nccl" if gpu else "gloo"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend)
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)


def _check_json(config: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except (AssertionError, AttributeError, TypeError, ValueError, DeepSpeedConfigError) as error:
        told = f"holds what DeepSpeed refuses: {one_line(error)}"
        raise UserError(f"config field deepspeed.extra (or deepspeed.file) {told}") from None


def _fill_auto(given: dict[str, Any], generated: dict[str, Any], origin: str) -> dict[str, Any]:
    """`given` with each "auto" taken from the same place of `generated`."""
    filled = {}
    for key, value in given.items():
        own = generated.get(key)
        if isinstance(value, dict):
            value = _fill_auto(value, own if isinstance(own, dict) else {}, origin)
        elif value == "auto":
            told = f'{origin} asks for "auto" at {key}, which vlmkd does not set'
            require(own is not None, "deepspeed.file:", told)
            value = own
        filled[key] = value
    return filled
