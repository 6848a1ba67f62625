"""What every engine's trainer owes alike: a base class in front of TRL's ``SFTTrainer``.

TRL 1.15 computes every SFT loss through a triton kernel (``trl/kernels/chunked_logprob.py``)
and has no other path: without triton, or on a CPU, its trainer fails at the first step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_kit.engines.rank_rows import ExactEvaluation, RankedRows, is_blank
from qlora_kit.values import IGNORED_LABEL

__all__ = [
    "NoDraftCards",
    "NoTelemetry",
    "PortableLoss",
    "StepRecorder",
    "TrainerBase",
    "TrlSteps",
    "has_triton_loss",
]

# Losses stay on the device until this many steps are done, so that recording never waits for it.
_FLUSH_EVERY = 256


class StepRecorder:
    """Mixin for ``transformers.Trainer``: tokens taken and the loss of each optimizer step.

    Counting in the collator would include evaluation and prefetched batches; the trainer's
    own log rounds losses and averages them over ``logging_steps``. In a distributed run the
    properties speak of all ranks, so every rank has to read them.
    """

    _tokens_seen: Any = 0
    _trained_tokens: Any = 0
    _starts_step: bool = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take one optimizer step's micro-batches, counting their tokens."""
        samples, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._starts_step = True
        for batch in samples:
            if is_blank(batch):
                continue
            mask = batch.get("attention_mask")
            if mask is not None and mask.dim() == 2:
                self._tokens_seen = self._tokens_seen + mask.sum()
            else:
                self._tokens_seen = self._tokens_seen + batch["input_ids"].numel()
            # The first token of a row is never predicted, whatever its label says.
            trained = (batch["labels"][..., 1:] != IGNORED_LABEL).sum()
            self._trained_tokens = self._trained_tokens + trained
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch; its share of the step's mean loss is added up."""
        returned = super().training_step(*args, **kwargs)  # type: ignore[misc]
        # Losses that are not numbers are filtered from the trainer's log, and recorded here.
        loss = self.__dict__.pop("_unfiltered_loss", returned)
        pending = self.__dict__.setdefault("_pending_losses", [])
        if self._starts_step:
            if len(pending) >= _FLUSH_EVERY:
                self._flush()
            pending.append(loss)
            self._starts_step = False
        else:
            pending[-1] = pending[-1] + loss
        return returned

    @property
    def tokens_seen(self) -> int:
        """Tokens of the micro-batches taken so far, padding excluded."""
        return int(self._sum_over_ranks([self._tokens_seen])[0])

    @property
    def trained_tokens(self) -> int:
        """Of those, the tokens whose prediction carried loss."""
        return int(self._sum_over_ranks([self._trained_tokens])[0])

    @property
    def step_losses(self) -> list[float]:
        """Mean loss per trained token of each step begun so far, in order."""
        self._flush()
        own = list(self.__dict__.get("_done_losses", ()))
        # Each rank's loss is its share times the number of ranks, whose mean the gradients are.
        ranks = self.accelerator.num_processes  # type: ignore[attr-defined]
        return [total / ranks for total in self._sum_over_ranks(own)]

    def _sum_over_ranks(self, values: list[Any]) -> list[float]:
        accelerator = self.accelerator  # type: ignore[attr-defined]
        own = [float(value) for value in values]
        if accelerator.num_processes == 1 or not own:
            return own
        import torch

        # float32 is exact up to 16 million tokens only.
        summed = accelerator.gather(
            torch.tensor([own], dtype=torch.float64, device=accelerator.device)
        ).sum(0)
        return [float(value) for value in summed]

    def _flush(self) -> None:
        pending = self.__dict__.setdefault("_pending_losses", [])
        done = self.__dict__.setdefault("_done_losses", [])
        # A later micro-batch of a step that was read early would start an entry of its own.
        done.extend(float(loss) for loss in pending)
        pending.clear()


def has_triton_loss(device_type: str) -> bool:
    """Whether TRL's fused loss runs on a device."""
    return device_type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


class PortableLoss:
    """Mixin for ``SFTTrainer``: the model's own cross-entropy where triton does not run.

    The same number: the sum over trained tokens divided by ``num_items_in_batch``. It builds
    the logits of a micro-batch, which the fused loss avoids, and logs no entropy or accuracy.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of one micro-batch, a scalar."""
        from transformers import Trainer

        if has_triton_loss(self.args.device.type):  # type: ignore[attr-defined]
            with warnings.catch_warnings():
                # Whoever gives compute_metrics asks for logits; it is no mistake of theirs.
                warnings.filterwarnings("ignore", "`return_outputs=True`", FutureWarning)
                return super().compute_loss(  # type: ignore[misc]
                    model, inputs, return_outputs=return_outputs,
                    num_items_in_batch=num_items_in_batch,
                )  # fmt: skip
        inputs["use_cache"] = False
        loss, outputs = Trainer.compute_loss(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if getattr(self, "aux_loss_enabled", False):
            loss = loss + self._mend_balance(model, outputs["aux_loss"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _mend_balance(self, model: Any, balance: Any, items: Any) -> Any:
        """What turns the model's share of its routers' balance in the loss into TRL's.

        The model adds all of it in every micro-batch, with the coefficient it was made with, and
        the trainer multiplies it by the number of ranks.
        """
        accelerator = self.accelerator  # type: ignore[attr-defined]
        unwrapped = accelerator.unwrap_model(model)
        base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
        averages = self.args.average_tokens_across_devices and items is not None  # type: ignore[attr-defined]
        added = float(base.router_aux_loss_coef) * (accelerator.num_processes if averages else 1)
        steps = 1 if items is None else self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return (self.router_aux_loss_coef / steps - added) * balance  # type: ignore[attr-defined]


class NoTelemetry:
    """Mixin for TRL's trainers, which report their use to the hub when they are made.

    ``HF_HUB_DISABLE_TELEMETRY`` would do, but it is read from the environment when
    huggingface_hub is imported, and this library writes no environment.
    """

    def _send_telemetry(self) -> None:
        """Send nothing."""


class NoDraftCards:
    """Mixin for TRL's trainers: no ``README.md`` from a template that knows nothing of the run.

    TRL's says "a fine-tuned version of None" for a base on disk, with code that loads "None", and
    peft's is "[More Information Needed]" throughout. The run's manifest says what a run was, and
    exports carry a card of their own.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a checkpoint without the card that peft puts into it."""
        folder = output_dir or self.args.output_dir  # type: ignore[attr-defined]
        card = Path(folder) / "README.md"
        had_card = card.exists()
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if not had_card:
            card.unlink(missing_ok=True)


class TrlSteps:
    """Mixin that says that TRL and peft compute the steps; a trainer's own step overrides it."""

    @property
    def uses_fast_step(self) -> bool:
        """Whether steps are computed by this trainer's own code."""
        return False

    @property
    def fast_plan(self) -> Any:
        """What was decided about them."""
        return None


class TrainerBase(
    StepRecorder, RankedRows, ExactEvaluation, PortableLoss, NoTelemetry, NoDraftCards, TrlSteps
):
    """What training asks of a trainer beside what transformers' ``Trainer`` has.

    For an engine's trainer: ``class MyTrainer(TrainerBase, SFTTrainer)``. TRL 1.15 rounds every
    trainable parameter of a quantized model to bfloat16 when the trainer is made, which loses
    small updates; it also replaces the model's ``forward`` by one with a fused language-model
    head. The parameters stay as they are with this class, and :meth:`release` puts the model's
    own ``forward`` back.

    Args:
        model: A ``PeftModel``.
        *args: ``SFTTrainer``'s.
        **kwargs: ``SFTTrainer``'s.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._own_forward = model.get_base_model().__dict__.get("forward")
        before = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        try:
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        # TRL changes the model before transformers has looked at the settings, and may refuse them.
        except BaseException:
            self._put_forward_back(model)
            raise
        finally:
            for name, parameter in model.named_parameters():
                if name in before and parameter.dtype != before[name].dtype:
                    parameter.data = before[name].to(parameter.device)

    #: Entered while a checkpoint is written; training sets it, so that no signal tears one apart.
    while_saving: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def save_checkpoint(self) -> bool:
        """Write a checkpoint of the steps done; whether there were any."""
        if self.state.global_step == 0 or self.optimizer is None:  # type: ignore[attr-defined]
            return False
        self._save_checkpoint(self.model, trial=None)  # type: ignore[attr-defined]
        return True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.while_saving():
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        found = super()._init_training_state(max_steps, *args)  # type: ignore[misc]
        # A checkpoint brings its own run's, which would go on whatever is asked for now.
        self.state.compute_steps(self.args, max_steps)  # type: ignore[attr-defined]
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, and keep to the settings of this run where the checkpoint's differ."""
        import torch

        optimizer, scheduler = self.optimizer, self.lr_scheduler  # type: ignore[attr-defined]
        asked = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        if not (Path(checkpoint) / "scheduler.pt").is_file():
            with warnings.catch_warnings():
                # torch expects steps of the optimizer between them.
                warnings.simplefilter("ignore")
                for _ in range(self.state.global_step):  # type: ignore[attr-defined]
                    scheduler.step()
            return
        for group, settings in zip(optimizer.param_groups, asked, strict=True):
            group.update(settings)
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            # The rate of the next step, from this run's schedule; the same to the bit where the
            # checkpoint's was the same.
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            rates = [
                base * rate(scheduler.last_epoch)
                for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def release(self) -> None:
        """Give the model back its own ``forward``."""
        model = self.model  # type: ignore[attr-defined]
        # accelerate wraps forward in autocast and never takes it off by itself.
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # type: ignore[attr-defined]
        # What it took off it binds to the instance.
        if getattr(model.__dict__.get("forward"), "__func__", None) is type(model).forward:
            del model.forward
        model.__dict__.pop("_is_accelerate_prepared", None)
        self._put_forward_back(model)

    def _put_forward_back(self, model: Any) -> None:
        base = model.get_base_model()
        if self._own_forward is None:
            base.__dict__.pop("forward", None)
        else:
            base.forward = self._own_forward
